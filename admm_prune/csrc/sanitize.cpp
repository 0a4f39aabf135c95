// Calls every kernel that this processor has on allocations without a byte to spare: compiled with address and
// undefined behaviour sanitizers and run by tests/ops/test_packed_sanitized.py.

#include "packed.cpp"

#include <cstdio>
#include <memory>
#include <vector>

namespace {

constexpr size_t BYTES[] = {4, 2, 2, 1};  // of a value of each `Type`

// A copy on the heap of exactly its size, so that the sanitizer sees every access beyond it.
template <class T> std::unique_ptr<T[]> exact(const std::vector<T>& content) {
    std::unique_ptr<T[]> copy(new T[content.size()]);
    if (!content.empty()) std::memcpy(copy.get(), content.data(), content.size() * sizeof(T));
    return copy;
}

struct Random {
    uint32_t state = 1;
    double operator()() { return ((state = state * 1664525 + 1013904223) >> 8) / 16777216.0; }
};

// Products and unpacked rows of one matrix in all instruction sets and dtypes; the number of calls, -1 of a failure.
int64_t call_all(const Packed& matrix) {
    int64_t calls = 0;
    const size_t rows = static_cast<size_t>(matrix.rows), width = static_cast<size_t>(matrix.width);
    for (int isa = 0; isa < ISA_COUNT; ++isa) {
        if (!ISAS[isa].supported()) continue;
        for (int32_t type : {FLOAT32, BFLOAT16, FLOAT16}) {
            for (size_t tokens : {1, 2, 3, 17}) {
                const auto x = exact(std::vector<uint8_t>(tokens * width * BYTES[type]));
                const auto bias = exact(std::vector<uint8_t>(rows * BYTES[type]));
                const auto y = exact(std::vector<uint8_t>(tokens * rows * BYTES[type]));
                const int64_t count = static_cast<int64_t>(tokens);
                if (admm_prune_linear(&matrix, x.get(), bias.get(), y.get(), count, type, isa, 1, nullptr)) return -1;
                ++calls;
            }
            const auto dense = exact(std::vector<uint8_t>(rows * width * BYTES[type]));
            if (admm_prune_unpack(&matrix, dense.get(), 0, matrix.rows, type, isa, 1, nullptr)) return -1;
            ++calls;
        }
    }
    return calls;
}

// A matrix with that fraction of values, or with `per_byte` values for every byte of the mask where it is not 0.
int64_t call_with(int32_t type, int64_t rows, int64_t width, double density, int per_byte, Random& random) {
    const int64_t octets = (width + 7) / 8, group = width > 64 ? 64 : width;
    std::vector<uint8_t> mask(static_cast<size_t>(rows * octets));
    std::vector<int32_t> starts{0};
    int32_t count = 0;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < width; ++column) {
            if (!(per_byte ? column % 8 < per_byte : random() < density)) continue;
            mask[static_cast<size_t>(row * octets + column / 8)] |= static_cast<uint8_t>(1u << column % 8);
            ++count;
        }
        starts.push_back(count);
    }
    const auto bits = exact(mask);
    const auto values = exact(std::vector<uint8_t>(static_cast<size_t>(count) * BYTES[type], 0x3c));
    const auto offsets = exact(starts);
    const auto scales = exact(std::vector<float>(static_cast<size_t>(rows * ((width + group - 1) / group)), 0.5f));
    return call_all({bits.get(), values.get(), per_byte ? nullptr : offsets.get(), type == INT8 ? scales.get() : nullptr,
                     rows, width, count, type == INT8 ? group : width, type, 0, per_byte});
}

}  // namespace

int main() {
    Random random;
    int64_t calls = 0;
    for (int32_t type : {FLOAT32, BFLOAT16, FLOAT16, INT8})
        for (int64_t width : {1, 7, 8, 31, 32, 33, 64, 97, 600, 1100})
            for (int64_t rows : {1, 2, 5, 9})
                for (double density : {0.0, 0.1, 0.5, 1.0})
                    for (int per_byte : {0, 1, 4}) {
                        if (per_byte && (width % 8 || density != 0.5)) continue;
                        const int64_t done = call_with(type, rows, width, density, per_byte, random);
                        if (done < 0) return std::puts("a call failed"), 1;
                        calls += done;
                    }
    std::printf("%lld calls\n", static_cast<long long>(calls));
}
