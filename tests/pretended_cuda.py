"""Tensors that say they are on a CUDA device, where there is none: an operation that mixes them with tensors of the
host is refused, as it would be there.

They are computed on the CPU: in plain torch, and kernels in Triton's interpreter. What is not on the device by mistake,
such as an index made without `device=`, is found so, and nothing about speed, races or rounding.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_PRODUCTS = {torch.ops.aten.mm.dtype, torch.ops.aten.bmm.dtype}  # of bfloat16 in float32, which the CPU lacks
_PRODUCTS_OUT = {torch.ops.aten.mm.dtype_out, torch.ops.aten.bmm.dtype_out}


class OnDevice(Tensor):
    """A tensor of the CPU, `inner`, that says that it is on the device."""

    inner: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """On the CPU, unless tensors of the host that are not single numbers take part; a copy from them may."""
    name = func._schema.name.partition("::")[2]
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    wrappers = {id(x.inner): x for x in given if isinstance(x, OnDevice)}
    of_host = [tuple(x.shape) for x in given if not isinstance(x, OnDevice) and x.ndim > 0 and x.numel() > 0]
    if of_host and name != "copy_":
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {CUDA} and of the CPU {of_host}")
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if func in _PRODUCTS or func in _PRODUCTS_OUT:
        a, b, dtype = inner_args
        product = (a.float() @ b.float()).to(dtype)
        return kwargs["out"].copy_(product) if func in _PRODUCTS_OUT else OnDevice(product)
    if name == "_int_mm":
        a, b = inner_args
        assert a.shape[0] > 16, "rows of the first factor"
        assert all(size % 8 == 0 for size in b.shape), "multiples of 8"
        assert a.stride(1) == b.stride(0) == 1, "only TN products are on tensor cores"

    def wrapped(x: Any) -> Any:
        return wrappers.get(id(x), None if isinstance(x, OnDevice) else OnDevice(x)) if isinstance(x, Tensor) else x

    return tree_map(wrapped, func(*inner_args, **inner_kwargs))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mixed = any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs or {})))
        return _computed(func, args, kwargs or {}) if mixed else func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Copies between the two, and tensors that are made on the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("to", "cpu", "cuda"):
            return _moved(name, *args, **kwargs)
        if name == "pin_memory":
            return args[0]
        if name == "new_tensor" and isinstance(args[0], OnDevice):
            return OnDevice(func(args[0].inner, *args[1:], **kwargs))
        if name == "embedding_bag" and any(isinstance(x, OnDevice) for x in args):
            assert all(isinstance(x, OnDevice) for x in args)
            return OnDevice(func(*map(_inner, args), **tree_map(_inner, kwargs)))
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            generator = kwargs.get("generator")
            assert generator is None or generator.place.type == "cuda", "a generator of the CPU"
            return OnDevice(func(*args, **kwargs | {"device": CPU}))
        return func(*args, **kwargs)


def _moved(name: str, x: Tensor, *rest: Any, **options: Any) -> Tensor:
    device, dtype = {"cpu": CPU, "cuda": CUDA}.get(name, x.device), x.dtype
    for given in (*rest, options.get("device"), options.get("dtype")):
        if isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, str | torch.device):
            device = torch.device(given)
        elif isinstance(given, Tensor):
            device, dtype = given.device, given.dtype
    converted = _inner(x).to(dtype, copy=bool(options.get("copy")))
    if isinstance(x, OnDevice) and device.type == "cuda" and converted is x.inner:
        return x
    return OnDevice(converted) if device.type == "cuda" else converted


class _Generator(torch.Generator):
    """On the CPU; `place` is where it was asked for."""

    place: torch.device

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    def __init__(self, *_: Any) -> None:
        pass


@contextmanager
def pretended(capability: tuple[int, int]) -> Generator[None]:
    """Within it there is a CUDA device of this compute capability."""
    from triton.runtime import interpreter

    executor = interpreter.GridExecutor
    to_host, from_host = executor._init_args_hst, executor._restore_args_dev

    def given(self: Any, args: Any, kwargs: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        assert len({isinstance(x, OnDevice) for x in tensors}) == 1, "a kernel cannot access a tensor of the CPU"
        return to_host(self, tuple(map(_inner, args)), kwargs)

    def returned(self: Any, args: Any, *others: Any) -> Any:
        return from_host(self, tuple(map(_inner, args)), *others)

    with pytest.MonkeyPatch.context() as patch, _Operations(), _Functions():
        patch.setattr(executor, "_init_args_hst", given)
        patch.setattr(executor, "_restore_args_dev", returned)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        yield
