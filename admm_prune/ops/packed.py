"""Packed sparse matrices: a bit mask and the values of its set bits, and y = x W^T + b on them without unpacking.

The operators `admm_prune::packed_linear` and `admm_prune::packed_unpack` are registered with torch, so that
`torch.compile` and autograd know them. On the CPU they call a library in C++ (`admm_prune/csrc`), which setuptools
builds where there is a compiler; on CUDA, Triton's kernel. Without either, they unpack and multiply with torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from admm_prune.ops import backend, bits

_TORCH_C: Any = torch._C  # pyright: ignore[reportPrivateUsage]  # what intercepts operators has no public name
LANES = 32  # columns of a step of the kernel: groups of int8 values are multiples of it
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_LIBRARY = Path(__file__).with_name("_packed.so")
# From these numbers of tokens on, unpacking and a dense product were faster, measured with AVX2 at 4096 x 4096: in
# float32; in 16 bits where the processor has no products of those; the last, where it has them, is not measured.
PREFILL_TOKENS, PREFILL_TOKENS_16_BITS, PREFILL_TOKENS_NATIVE = 48, 128, 32
_SCRATCH = 1 << 25  # bytes of unpacked rows at once


@dataclass(eq=False)
class Packed:
    """A matrix W (rows, width). Its tensors are not replaced.

    Attributes:
        bits: uint8 (rows, ceil(width / 8)), as of `ops.bits.pack`: set where a value is stored.
        values: of the set bits, row by row; float32, bfloat16, float16, or int8 with scales.
        offsets: int32 (int64 from 2^31 values on) (rows + 1,): where the values of every row start, and their number.
            None where every byte of the mask has the same number of set bits, as for 2:4 sparsity.
        scales: float32 (rows, ceil(width / group)) for int8: W = scale * value. Else None.
        width: columns of W.
        group: columns that share a scale, a multiple of 32; the width without scales.
    """

    bits: Tensor
    values: Tensor
    offsets: Tensor | None
    scales: Tensor | None
    width: int
    group: int
    struct: Any = field(default=None, init=False, repr=False)  # for the library: the pointers, and what holds them

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: pointers are of this process and of these tensors."""
        return {**vars(self), "struct": None}

    @property
    def rows(self) -> int:
        return self.bits.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))


def pack(weight: Tensor, mask: Tensor | None = None) -> Packed:
    """Packs W (rows, width); its numbers are kept exactly, but for the sign of zeros.

    Args:
        weight: float32, bfloat16 or float16.
        mask: where values are stored; by default where the weight is not zero.

    Raises:
        TypeError: another dtype.
    """
    if weight.dtype not in FLOATS:
        raise TypeError(f"weights of {weight.dtype} cannot be packed, only float32, bfloat16 and float16")
    weight = weight.detach()
    if mask is None:
        mask = weight != 0
    width = weight.shape[1]
    filled = _evenly_filled(mask)
    even = filled is not None
    mask = mask if filled is None else filled
    return Packed(bits.pack(mask), weight[mask], None if even else offsets_of(mask.sum(1)), None, width, max(1, width))


def from_parts(packed_bits: Tensor, values: Tensor, width: int) -> Packed:
    """A matrix of its bits (rows, ceil(width / 8)) and values in order.

    Raises:
        ValueError: the number of values is not that of the set bits, or a bit beyond the width is set.
    """
    counts = _ones(packed_bits)
    beyond = width % 8
    if packed_bits.numel() and beyond and bool((packed_bits[:, -1] >> beyond).any()):
        raise ValueError("bits beyond the width of the matrix are set")
    check_counts(int(counts.sum()), values)
    even = width % 8 == 0 and counts.numel() > 0 and int(counts.min()) == int(counts.max())
    offsets = None if even else offsets_of(counts.sum(1))
    return Packed(packed_bits.contiguous(), values.contiguous(), offsets, None, width, max(1, width))


def check_counts(ones: int, values: Tensor) -> None:
    """Raises ValueError unless there are as many values as set bits."""
    if ones != values.numel():
        raise ValueError("the bits and the values do not belong together")


def quantize(matrix: Packed, group: int | None = None) -> Packed:
    """The matrix with values in int8: round(value / scale), with scale = max |value| / 127 over a row or a group.

    Args:
        group: columns that share a scale, a multiple of 32; None gives every row one.

    Raises:
        ValueError: the group is no positive multiple of 32; a value is NaN or Inf, for which int8 has no code.
    """
    if group is not None and (group <= 0 or group % LANES):
        raise ValueError(f"a group of {group} columns: it must be a multiple of {LANES}")
    if not bool(matrix.values.isfinite().all()):
        raise ValueError("NaN and Inf cannot be rounded to int8")
    size = max(1, matrix.width) if group is None else group
    groups = max(1, -(-matrix.width // size))
    rows, columns = bits.unpack(matrix.bits, matrix.width).nonzero(as_tuple=True)
    place = rows * groups + columns // size
    values = matrix.values.float()
    largest = values.new_zeros(matrix.rows * groups).scatter_reduce_(0, place, values.abs(), "amax")
    scales = torch.where(largest > 0, largest / 127, 1.0)
    codes = (values / scales[place]).round().clamp_(-127, 127).to(torch.int8)
    return replace(matrix, values=codes, scales=scales.view(matrix.rows, groups), group=size)


def offsets_of(counts: Tensor) -> Tensor:
    """Where the values of every row start, from the number of values of each (rows,)."""
    offsets = torch.nn.functional.pad(counts.long().cumsum(0), (1, 0))
    wide = len(counts) > 0 and int(offsets[-1]) >= 1 << 31
    return offsets if wide else offsets.int()


def linear(x: Tensor, matrix: Packed, bias: Tensor | None = None) -> Tensor:
    """y (..., rows) = x W^T + b for x (..., width), in the dtype of x. Differentiable in x and b."""
    if _is_plain(x) and not (
        torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    ):
        # The same function without the dispatcher, whose overhead is a good part of a small product.
        bias = None if bias is None else bias.to(x.dtype)
        return _linear_cpu(x.reshape(-1, matrix.width), matrix, bias).view(*x.shape[:-1], matrix.rows)
    parts = (matrix.bits, matrix.values, matrix.offsets, matrix.scales)
    result: Tensor = torch.ops.admm_prune.packed_linear(x, *parts, bias, matrix.width, matrix.group)
    return result


def unpack(matrix: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """W (rows, width), dense; by default in the dtype of the values, float32 where they are int8."""
    if dtype is None:
        dtype = torch.float32 if matrix.scales is not None else matrix.values.dtype
    parts = (matrix.bits, matrix.values, matrix.offsets, matrix.scales)
    result: Tensor = torch.ops.admm_prune.packed_unpack(*parts, matrix.width, matrix.group, dtype)
    return result


def described() -> str:
    """What multiplies on the CPU: "C++ (avx2)", or that there is no library."""
    library = _usable()
    return f"C++ ({library.isa})" if library else "torch, without the C++ library: slower"


def _is_plain(x: Tensor) -> bool:
    """Whether x is a tensor in memory on the CPU, and nothing traces or intercepts operators."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and _TORCH_C._get_tracing_state() is None
        and _TORCH_C._len_torch_dispatch_stack() == 0
        and not _TORCH_C._functorch.is_functorch_wrapped_tensor(x)
        and not backend.uses_triton(x)
    )


def _evenly_filled(mask: Tensor) -> Tensor | None:
    """The mask with as many set bits in every byte, where few are missing to that; else None."""
    if mask.shape[1] % 8 or not mask.numel():
        return None
    octets = mask.unflatten(1, (-1, 8))
    counts = octets.sum(-1, dtype=torch.int32)
    most, total = int(counts.max()), int(counts.sum())
    if most == 0 or most * counts.numel() > 1.02 * total:
        return None
    if most * counts.numel() == total:
        return mask
    clear = ~octets
    missing = (most - counts)[..., None]
    filled: Tensor = octets | (clear & (clear.cumsum(-1) <= missing))
    return filled.flatten(1)


def _ones(packed_bits: Tensor) -> Tensor:
    """The number of set bits of every byte, int32."""
    x = packed_bits
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x + (x >> 4)) & 0x0F).int()


class _Matrix(ctypes.Structure):
    """AdmmPrunePacked of csrc/packed.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("bits", "values", "offsets", "scales")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "count", "group")),
        *((name, ctypes.c_int32) for name in ("type", "wide", "per_byte")),
    )


class _Library:
    """The kernels of csrc/packed.cpp on one instruction set; by default the best of this processor."""

    def __init__(self, path: Path, isa: str | None = None) -> None:
        library = ctypes.CDLL(str(path))
        library.admm_prune_isa.restype = ctypes.c_char_p
        names: dict[str, int] = {}
        while (name := library.admm_prune_isa(len(names))) is not None:
            names[name.decode()] = len(names)
        self.supported = [name for name, number in names.items() if library.admm_prune_supports(number)]
        self.isa = isa or self.supported[0]
        self._number = names[self.isa]
        pointers: list[Any] = [ctypes.c_void_p] * 4
        threads: list[Any] = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
        self._linear = library.admm_prune_linear
        self._linear.argtypes = [*pointers, ctypes.c_int64, ctypes.c_int32, *threads]
        self._unpack = library.admm_prune_unpack
        self._unpack.argtypes = [*pointers[:2], ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, *threads]
        # The threads of torch's own OpenMP: a second pool would wait for the same processors.
        parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        self._parallel = None if parallel is None else ctypes.cast(parallel, ctypes.c_void_p)

    def linear(self, x: Tensor, matrix: Packed, bias: Tensor | None) -> Tensor:
        """x (tokens, width), contiguous -> (tokens, rows)."""
        if bias is not None and (tuple(bias.shape) != (matrix.rows,) or bias.device.type != "cpu"):
            raise ValueError(f"a bias {tuple(bias.shape)} on {bias.device} for {matrix.rows} rows on the CPU")
        out = x.new_empty(x.shape[0], matrix.rows)
        if out.numel():
            pointers = x.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()
            sizes = x.shape[0], _TYPES[x.dtype]
            self._check(self._linear(self._struct(matrix), *pointers, *sizes, *self._threads()))
        return out

    def unpack(self, matrix: Packed, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows first to last - 1, dense."""
        out = torch.empty(last - first, matrix.width, dtype=dtype)
        if out.numel():
            range_of_rows = first, last, _TYPES[dtype]
            self._check(self._unpack(self._struct(matrix), out.data_ptr(), *range_of_rows, *self._threads()))
        return out

    def _threads(self) -> tuple[int, int, Any]:
        return self._number, torch.get_num_threads(), self._parallel

    @staticmethod
    def _struct(matrix: Packed) -> Any:
        offsets, scales = matrix.offsets, matrix.scales
        pointers = (
            matrix.bits.data_ptr(),
            matrix.values.data_ptr(),
            None if offsets is None else offsets.data_ptr(),
            None if scales is None else scales.data_ptr(),
        )
        # The same tensors can move, as by `share_memory_`.
        if matrix.struct is not None and matrix.struct[0] == pointers:
            return matrix.struct[1]
        if matrix.bits.device.type != "cpu":  # the library would read the memory of another device
            raise RuntimeError(
                f"the inputs are on the CPU, the packed weights on {matrix.bits.device}: move one of them"
            )
        octets, count = matrix.bits.numel(), matrix.values.numel()
        struct = ctypes.byref(
            _Matrix(
                *pointers,
                matrix.rows,
                matrix.width,
                count,
                matrix.group,
                _TYPES[matrix.values.dtype],
                offsets is not None and offsets.dtype == torch.int64,
                count // octets if offsets is None and octets else 0,
            )
        )
        matrix.struct = pointers, struct
        return struct

    @staticmethod
    def _check(status: int) -> None:
        if status == 2:
            raise MemoryError("no memory for the inputs of a packed product")
        if status:
            raise RuntimeError(f"the library of packed products failed with status {status}")


@cache
def _library() -> _Library | None:
    """The library; None where it was not built, or cannot be loaded."""
    try:
        return _Library(_LIBRARY) if _LIBRARY.is_file() else None
    except (OSError, AttributeError):
        return None


def _usable() -> _Library | None:
    return None if backend.choice() == "torch" else _library()


def _torch_unpack(matrix: Packed, dtype: torch.dtype) -> Tensor:
    """The reference: with torch alone, on every device."""
    mask = bits.unpack(matrix.bits, matrix.width)
    values = matrix.values
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter_(mask, values)
    if matrix.scales is not None:
        scales = matrix.scales.repeat_interleave(matrix.group, 1)[:, : matrix.width]
        dense = dense * scales
    return dense.to(dtype)


def _dense_dtype(x: Tensor) -> torch.dtype:
    """In which the CPU multiplies a long prompt: in float32 where it has no products of the inputs' dtype."""
    if x.dtype == torch.float32:
        return x.dtype
    if not torch.backends.mkldnn.is_available():  # builds without it, as for macOS, lack the operators below
        return torch.float32
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    if x.dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return x.dtype


def _linear_cpu(x: Tensor, matrix: Packed, bias: Tensor | None) -> Tensor:
    library = _usable()
    if library is None or x.dtype not in FLOATS:
        return torch.nn.functional.linear(x, _torch_unpack(matrix, x.dtype), bias)
    dtype = _dense_dtype(x)
    native = PREFILL_TOKENS if dtype == torch.float32 else PREFILL_TOKENS_NATIVE
    if len(x) < (native if dtype == x.dtype else PREFILL_TOKENS_16_BITS):
        bias = None if bias is None else bias.contiguous()
        return library.linear(x.contiguous(), matrix, bias)
    # Blocks of rows, so that the dense matrix is never in memory.
    inputs, out = x.to(dtype), x.new_empty(len(x), matrix.rows)
    at_once = max(64, _SCRATCH // max(1, matrix.width * dtype.itemsize))
    for first in range(0, matrix.rows, at_once):
        last = min(first + at_once, matrix.rows)
        product = inputs @ library.unpack(matrix, first, last, dtype).T
        out[:, first:last] = product if bias is None else product.add_(bias[first:last])
    return out


def _linear_cuda(x: Tensor, matrix: Packed, bias: Tensor | None) -> Tensor:
    from admm_prune.ops.triton import packed as fused

    if len(x) <= fused.MOST_TOKENS and x.numel() and matrix.rows and x.dtype in FLOATS:
        y = fused.linear(x.contiguous(), matrix)
        return y if bias is None else y + bias
    return torch.nn.functional.linear(x, _torch_unpack(matrix, x.dtype), bias)


def _linear_impl(
    x: Tensor,
    packed_bits: Tensor,
    values: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    width: int,
    group: int,
) -> Tensor:
    matrix = Packed(packed_bits, values, offsets, scales, width, group)
    flat = x.reshape(-1, width)
    implementation = _linear_cuda if backend.uses_triton(x) else _linear_cpu
    return implementation(flat, matrix, None if bias is None else bias.to(x.dtype)).view(*x.shape[:-1], matrix.rows)


def _unpack_impl(
    packed_bits: Tensor,
    values: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    width: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    matrix = Packed(packed_bits, values, offsets, scales, width, group)
    library = _usable() if values.device.type == "cpu" and dtype in FLOATS else None
    return library.unpack(matrix, 0, matrix.rows, dtype) if library else _torch_unpack(matrix, dtype)


def _linear_shape(x: Tensor, packed_bits: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed_bits.shape[0])


def _unpacked_shape(packed_bits: Tensor, values: Tensor, _offsets: Any, _scales: Any, width: int, *rest: Any) -> Tensor:
    return values.new_empty(packed_bits.shape[0], width, dtype=rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *parts, bias, width, group = inputs
    ctx.save_for_backward(*parts)
    ctx.width, ctx.group, ctx.bias = width, group, bias is not None


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Of x and the bias; the matrix is constant."""
    of_x = None
    if ctx.needs_input_grad[0]:
        packed_bits, values, offsets, scales = ctx.saved_tensors
        matrix = Packed(packed_bits, values, offsets, scales, ctx.width, ctx.group)
        of_x = gradient @ unpack(matrix, gradient.dtype)
    of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.bias and ctx.needs_input_grad[5] else None
    return of_x, None, None, None, None, of_bias, None, None


_operators = torch.library.Library("admm_prune", "DEF")
_operators.define(
    "packed_linear(Tensor x, Tensor bits, Tensor values, Tensor? offsets, Tensor? scales, Tensor? bias, int width, "
    "int group) -> Tensor"
)
_operators.define(
    "packed_unpack(Tensor bits, Tensor values, Tensor? offsets, Tensor? scales, int width, int group, "
    "ScalarType dtype) -> Tensor"
)
for _name, _implementation, _shape in (
    ("packed_linear", _linear_impl, _linear_shape),
    ("packed_unpack", _unpack_impl, _unpacked_shape),
):
    _operators.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"admm_prune::{_name}", _shape, lib=_operators)
torch.library.register_autograd("admm_prune::packed_linear", _backward, setup_context=_save, lib=_operators)
