"""Matrix products of a solve at a fixed precision, independent of the process's settings; autocast of a model.

`torch.set_float32_matmul_precision("high")`, TF32 on CUDA, bfloat16 in oneDNN, and autocast all
make products of float32 matrices keep 8 to 11 bits. These are settings of a training script, and must not change
a solve in the same process, which rounds explicitly where it multiplies in fewer bits (`products`).

A float32 number is a bfloat16 number, plus another one that holds the next 8 bits, up to a relative 2^-17. With
A = A1 + A2 and B = B1 + B2, A B = A1 B1 + A1 B2 + A2 B1 up to 2^-16 |A| |B|, summed in float32: one product of three
times the inner length, which tensor cores do in a fraction of the time of float32.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack  # pyright: ignore[reportPrivateUsage]
from torch.utils._pytree import tree_map

from admm_prune.ops import backend

_MKLDNN: Any = torch.backends.mkldnn  # its types lack `matmul`
_BACKENDS = (torch.backends.cuda.matmul, _MKLDNN.matmul)
_FULL = ("ieee", "none")
Precision = Literal["exact", "bfloat16x3", "bfloat16"]
_PANEL = 512  # rows converted to bfloat16 at once on the CPU


@contextmanager
def full() -> Generator[None]:
    """Within it float32 products are exact float32 products on every device; restores all settings afterwards.

    As a decorator it holds for a whole call. The settings are the process's: threads that multiply meanwhile have them
    too.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if not all(place.fp32_precision in _FULL for place in _BACKENDS):
            stack.enter_context(_set())
        yield


@contextmanager
def _set() -> Generator[None]:
    before = [place.fp32_precision for place in _BACKENDS]
    old_name = _legacy_precision()
    torch.set_float32_matmul_precision("highest")  # the old name sets both, and torch refuses what they disagree on
    try:
        yield
    finally:
        if old_name is not None:
            torch.set_float32_matmul_precision(old_name)
        for place, value in zip(_BACKENDS, before, strict=True):
            place.fp32_precision = "none"  # as torch.backends.fp32_precision says
            if place.fp32_precision != value:
                place.fp32_precision = value


def _legacy_precision() -> str | None:
    """The value set by `torch.set_float32_matmul_precision`; None if only the new settings were used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def at_least_float32(x: Tensor) -> Tensor:
    """A copy of x in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def prepared(b: Tensor, precision: Precision) -> Tensor:
    """B (..., k, n), as `multiply` takes it: itself; in bfloat16; or [B1; B2; B1] (..., 3 k, n)."""
    if precision == "exact":
        return b
    if precision == "bfloat16x3" and backend.uses_triton(b, torch.float32):
        from admm_prune.ops.triton import splitting as fused

        if b.is_contiguous():
            return fused.split(b, second=True, stacked=True)
        if b.mT.is_contiguous():  # products take a transposed factor as it lies
            return fused.split(b.mT, second=True).mT
    high = b.to(torch.bfloat16)
    if precision == "bfloat16":
        return high
    return torch.cat([high, (b - high).to(torch.bfloat16), high], dim=-2)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out <- A B, for A (m, k) and B as `prepared`, whose format follows from its dtype and shape. For several B
    (..., k, n) A and the product hold as many matrices: (..., m, k) and (..., m, n). A may be prepared too: in bfloat16
    if B is, [A1, A1, A2] if B is split.

    On the CPU several products have the bits that each has alone.
    """
    if b.ndim == 3:
        return _multiply_each(a, b, out)
    if b.dtype is out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(_left(a, b), b, out_dtype=out.dtype, out=out)
    for rows, panel in zip(out.split(_PANEL), a.split(_PANEL), strict=True):
        if _is_split(a, b) or a.dtype is b.dtype:  # no CPU product adds bfloat16 up in float32: the same numbers there
            torch.mm(_left(panel, b).to(out.dtype), b.to(out.dtype), out=rows)
        else:
            rows.copy_(panel.to(b) @ b)
    return out


def _multiply_each(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if not a.is_cuda:
        for one, by, into in zip(a, b, out, strict=True):
            multiply(one, by, out=into)
        return out
    if b.dtype is out.dtype:
        return torch.bmm(a, b, out=out)
    return torch.bmm(_left(a, b), b, out_dtype=out.dtype, out=out)


def _left(a: Tensor, b: Tensor) -> Tensor:
    """A as it meets B in a product."""
    if a.dtype is b.dtype:
        return a
    return _split(a) if _is_split(a, b) else a.to(b)


def _is_split(a: Tensor, b: Tensor) -> bool:
    return b.shape[-2] == 3 * a.shape[-1]


def _split(a: Tensor) -> Tensor:
    """[A1, A1, A2] (..., m, 3 k)."""
    if backend.uses_triton(a, torch.float32):
        from admm_prune.ops.triton import splitting as fused

        if a.is_contiguous():
            return fused.split(a)
        if a.mT.is_contiguous():
            return fused.split(a.mT, stacked=True).mT
    high = a.to(torch.bfloat16)
    return torch.cat([high, high, (a - high).to(torch.bfloat16)], dim=-1)


_PRODUCTS = (
    *("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d"),
    *("scaled_dot_product_attention", "grouped_mm", "_grouped_mm"),
)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """torch's autocast to a dtype narrower than float32, and nothing for float32.

    On the meta device, for which torch has none, the conversions before products alone, so that their bytes can be
    counted.
    """
    if dtype == torch.float32:
        return nullcontext()
    return _MetaAutocast(dtype) if device.type == "meta" else torch.autocast(device.type, dtype=dtype)


def function_modes() -> AbstractContextManager[None]:
    """A context with the function modes in force at this call: activation checkpointing does not restore them."""
    modes: list[TorchFunctionMode] = _get_current_function_mode_stack()

    @contextmanager
    def entered() -> Generator[None]:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            yield

    return entered()


class _MetaAutocast(TorchFunctionMode):
    """Arguments of products in `dtype`; a converted weight is kept, as by torch, until the context ends."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS:
            args, kwargs = tree_map(self._converted, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: object) -> None:
        self._weights.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # of torch

    def _converted(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(self._dtype)
        if id(x) not in self._weights:
            self._weights[id(x)] = (x, x.to(self._dtype))
        return self._weights[id(x)][1]
