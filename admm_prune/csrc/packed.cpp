// Products with packed sparse matrices: y = x W^T + b, where W is a bit mask and its non-zero values.
//
// A plain C interface, called through ctypes: it depends neither on Python's nor on torch's binary interface.
//
// The order of additions is a part of the interface: lane j of 32 sums the columns j, j + 32, j + 64, ... in ascending
// order by fused multiply-adds in float32, and the lanes are then added in halves (16 to 16, 8 to 8, ...). It depends
// neither on the instruction set, the number of threads and of tokens, nor on the mask: a zero adds 0 * x.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ADMM_PRUNE_X86 1
#include <cpuid.h>
#ifndef ADMM_PRUNE_EMULATED
#include <immintrin.h>
#endif
#endif
#if defined(__aarch64__)
#define ADMM_PRUNE_NEON 1
#endif
#if defined(ADMM_PRUNE_NEON) && !defined(ADMM_PRUNE_EMULATED)
#include <arm_neon.h>
#endif

// The loops are fast only if what they call is part of them, compiled for the same instruction set: compilers do not
// always choose that by themselves, and one call for a row, `write`, cost a third of its time.
#define ADMM_PRUNE_INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 32;     // columns of a step
constexpr int BLOCK = 512;    // columns expanded at once where several tokens share them
constexpr int ROWS = 4;       // rows expanded at once
constexpr int TOKENS = 16;    // tokens whose sums are in memory at once
constexpr int OVERREAD = 32;  // values that may be loaded past those of a row

constexpr int AHEAD = 8192;   // bytes, beyond a second row read meanwhile: processors' own prefetching ends at pages

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };

struct Float32 { using raw = float; static constexpr bool scaled = false; };
struct Bfloat16 { using raw = uint16_t; static constexpr bool scaled = false; };
struct Float16 { using raw = uint16_t; static constexpr bool scaled = false; };
struct Int8 { using raw = int8_t; static constexpr bool scaled = true; };

float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

ADMM_PRUNE_INLINE float widened(float x, Float32) { return x; }
ADMM_PRUNE_INLINE float widened(int8_t x, Int8) { return x; }
ADMM_PRUNE_INLINE float widened(uint16_t x, Bfloat16) { return float_of(static_cast<uint32_t>(x) << 16); }

ADMM_PRUNE_INLINE float widened(uint16_t x, Float16) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
    if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal or zero: exact
    return float_of(sign | bits_of(magnitude));
}

// To nearest, ties to even.
ADMM_PRUNE_INLINE float rounded(float x, Float32) { return x; }

ADMM_PRUNE_INLINE uint16_t rounded(float x, Bfloat16) {
    const uint32_t bits = bits_of(x);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

ADMM_PRUNE_INLINE uint16_t rounded(float x, Float16) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // from 65520 on
    if (magnitude < 0x38800000) {  // below the least normal number: the adder of the processor rounds
        const float shifted = float_of(magnitude) + 0.5f;  // an ulp of 0.5 is 2^-24, the least subnormal number
        return static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)));
    }
    const uint32_t even = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | ((even - 0x38000000) >> 13));
}

// Asks for memory that is read soon; an address past the end is ignored.
ADMM_PRUNE_INLINE void prefetch(const void* base, int64_t bytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(bytes);
    __builtin_prefetch(reinterpret_cast<const void*>(address));
}

ADMM_PRUNE_INLINE uint32_t word_at(const uint8_t* bits) {
    uint32_t word;
    std::memcpy(&word, bits, sizeof word);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap32(word);
#endif
    return word;
}

// The mask of the last columns of a row, fewer than 32.
uint32_t last_word(const uint8_t* bits, int64_t columns) {
    uint32_t word = 0;
    for (int64_t i = 0; 8 * i < columns; ++i) word |= static_cast<uint32_t>(bits[i]) << 8 * i;
    return word & ((1u << columns) - 1);
}

// Where the values of a byte of the mask go: entry i is the number of set bits below bit i, 0x80 if bit i is clear.
struct Tables {
    alignas(64) uint8_t index[256][8];
    alignas(64) uint8_t halves[256][16];   // bytes of 8 values of 2 bytes
    alignas(64) uint8_t uppers[256][32];   // the same, in the upper halves of 8 words, of which the lower are zero
    alignas(64) uint8_t words[16][16];     // bytes of 4 values of 4 bytes, by 4 bits of a mask

    constexpr Tables() : index(), halves(), uppers(), words() {
        for (int byte = 0; byte < 256; ++byte) {
            int rank = 0;
            for (int i = 0; i < 8; ++i) {
                const bool set = byte >> i & 1;
                const uint8_t low = set ? static_cast<uint8_t>(2 * rank) : 0x80;
                const uint8_t high = set ? static_cast<uint8_t>(2 * rank + 1) : 0x80;
                index[byte][i] = set ? static_cast<uint8_t>(rank) : 0x80;
                halves[byte][2 * i] = low, halves[byte][2 * i + 1] = high;
                uppers[byte][4 * i] = uppers[byte][4 * i + 1] = 0x80;
                uppers[byte][4 * i + 2] = low, uppers[byte][4 * i + 3] = high;
                rank += set;
            }
        }
        for (int half = 0; half < 16; ++half) {
            int rank = 0;
            for (int i = 0; i < 4; ++i) {
                const bool set = half >> i & 1;
                for (int k = 0; k < 4; ++k)
                    words[half][4 * i + k] = set ? static_cast<uint8_t>(4 * rank + k) : 0x80;
                rank += set;
            }
        }
    }
};
constexpr Tables TABLES;

}  // namespace

// A packed matrix, as `admm_prune.ops.packed` describes it.
struct AdmmPrunePacked {
    const uint8_t* bits;
    const void* values;
    const void* offsets;  // of the first value of every row, and their number; null if every byte has `per_byte` values
    const float* scales;  // (rows, groups) for int8, else null
    int64_t rows, width, count, group;  // group: columns of a scale, a multiple of 32
    int32_t type, wide, per_byte;       // wide: whether offsets have 64 bits
};

namespace {

using Packed = AdmmPrunePacked;

ADMM_PRUNE_INLINE int64_t first_value(const Packed& matrix, int64_t row) {
    if (!matrix.offsets) return row * (matrix.width / 8) * matrix.per_byte;
    if (matrix.wide) return static_cast<const int64_t*>(matrix.offsets)[row];
    return static_cast<const int32_t*>(matrix.offsets)[row];
}

int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

struct Job {
    Packed matrix;
    const float* x;  // (tokens, padded width) for a product, null to unpack
    void* out;       // (tokens, rows), or (rows, width)
    const void* bias;
    int64_t tokens, first, last, rows_per_part;
    int32_t out_type;
    int64_t next;  // the next part to take
    int failed;  // a thread had no memory
    void (*work)(Job&, int64_t first, int64_t last);
};

ADMM_PRUNE_INLINE void write(const Job& job, int64_t token, int64_t row, float sum) {
    const int64_t place = token * job.matrix.rows + row;
    switch (job.out_type) {
        case FLOAT32:
            if (job.bias) sum += static_cast<const float*>(job.bias)[row];
            static_cast<float*>(job.out)[place] = sum;
            break;
        case BFLOAT16:
            if (job.bias) sum += widened(static_cast<const uint16_t*>(job.bias)[row], Bfloat16{});
            static_cast<uint16_t*>(job.out)[place] = rounded(sum, Bfloat16{});
            break;
        default:
            if (job.bias) sum += widened(static_cast<const uint16_t*>(job.bias)[row], Float16{});
            static_cast<uint16_t*>(job.out)[place] = rounded(sum, Float16{});
    }
}

}  // namespace

#define ADMM_PRUNE_ISA portable
#include "portable.inc"
#include "kernels.inc"
#undef ADMM_PRUNE_ISA

#ifdef ADMM_PRUNE_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")
#endif
#define ADMM_PRUNE_ISA avx2
#include "avx2.inc"
#include "kernels.inc"
#undef ADMM_PRUNE_ISA
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,fma,f16c,popcnt,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,fma,f16c,popcnt,bmi,bmi2")
#endif
#define ADMM_PRUNE_ISA avx512
#include "avx512.inc"
#include "kernels.inc"
#undef ADMM_PRUNE_ISA
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#ifdef ADMM_PRUNE_NEON
#define ADMM_PRUNE_ISA neon
#include "neon.inc"
#include "kernels.inc"
#undef ADMM_PRUNE_ISA
#endif

namespace {

struct Isa {
    const char* name;
    bool (*supported)();
    void (*work)(Job&, int64_t, int64_t);
};

bool always() { return true; }

#ifdef ADMM_PRUNE_X86
bool has_avx2() {
    unsigned a, b, c, d;
    __builtin_cpu_init();
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
}
#endif

const Isa ISAS[] = {  // the fastest first
#ifdef ADMM_PRUNE_X86
    {"avx512", has_avx512, avx512::work},
    {"avx2", has_avx2, avx2::work},
#endif
#ifdef ADMM_PRUNE_NEON
    {"neon", always, neon::work},
#endif
    {"portable", always, portable::work},
};
constexpr int ISA_COUNT = sizeof ISAS / sizeof *ISAS;

// Any number of threads may run this on one job: each takes the next part that no other has taken.
void take_parts(void* data) {
    Job& job = *static_cast<Job*>(data);
    for (;;) {
        const int64_t first = job.first + job.rows_per_part * __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
        if (first >= job.last) return;
        const int64_t last = first + job.rows_per_part < job.last ? first + job.rows_per_part : job.last;
        job.work(job, first, last);
    }
}

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel

int run(Job& job, int isa, int threads, Parallel parallel) {
    if (isa < 0 || isa >= ISA_COUNT || !ISAS[isa].supported()) return 1;
    job.work = ISAS[isa].work;
    const int64_t rows = job.last - job.first, parts = threads > 1 && parallel ? 4 * threads : 1;
    job.rows_per_part = ((rows + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
    if (job.rows_per_part < ROWS) return 0;
    if (parts > 1 && rows > ROWS)
        parallel(take_parts, &job, static_cast<unsigned>(threads), 0);
    else
        take_parts(&job);
    return job.failed ? 2 : 0;
}

template <class T> void widen(const void* x, int64_t tokens, int64_t width, float* out) {
    const int64_t stride = padded(width);
    for (int64_t token = 0; token < tokens; ++token) {
        const typename T::raw* row = static_cast<const typename T::raw*>(x) + token * width;
        for (int64_t i = 0; i < width; ++i) out[token * stride + i] = widened(row[i], T{});
        for (int64_t i = width; i < stride; ++i) out[token * stride + i] = 0.0f;
    }
}

}  // namespace

extern "C" {

// The name of an instruction set that the library has code for, null from their number on.
const char* admm_prune_isa(int number) { return number >= 0 && number < ISA_COUNT ? ISAS[number].name : nullptr; }

// Whether this processor has it.
int admm_prune_supports(int number) { return number >= 0 && number < ISA_COUNT && ISAS[number].supported(); }

// y (tokens, rows) = x (tokens, width) W^T + bias, all contiguous and of one type. Returns 0; 1 where the instruction
// set is unsupported; 2 where there is no memory.
int admm_prune_linear(const AdmmPrunePacked* matrix, const void* x, const void* bias, void* y, int64_t tokens,
                      int32_t type, int isa, int threads, Parallel parallel) {
    float* wide = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(
        (tokens * padded(matrix->width) * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64 + 64)));
    if (!wide) return 2;
    if (type == FLOAT32) widen<Float32>(x, tokens, matrix->width, wide);
    else if (type == BFLOAT16) widen<Bfloat16>(x, tokens, matrix->width, wide);
    else widen<Float16>(x, tokens, matrix->width, wide);
    Job job{*matrix, wide, y, bias, tokens, 0, matrix->rows, 0, type, 0, 0, nullptr};
    const int status = run(job, isa, threads, parallel);
    std::free(wide);
    return status;
}

// Rows first to last - 1 of W, dense, (last - first, width), in float32, bfloat16 or float16.
int admm_prune_unpack(const AdmmPrunePacked* matrix, void* out, int64_t first, int64_t last, int32_t type, int isa,
                      int threads, Parallel parallel) {
    Job job{*matrix, nullptr, out, nullptr, 0, first, last, 0, type, 0, 0, nullptr};
    return run(job, isa, threads, parallel);
}
}
