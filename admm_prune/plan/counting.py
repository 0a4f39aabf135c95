"""Counting the operations and bytes of code while it runs, on real tensors or on the meta device; the stages of a run.

Tensors on the meta device have no values. If code reads one, it gets the value of well-formed input: a check of all
entries succeeds, a search for invalid entries finds none, a mask selects everything.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = (
    "products_float64",
    "products_float32",
    "products_half",
    "factor_float64",
    "factor_float32",
    "select",
    "traffic",
    "disk_read",
    "disk_write",
    "hash",
    "tokenize",
    "calls",
)
_FACTORS: dict[str, Callable[..., float]] = {
    "linalg_cholesky_ex": lambda a, *_: a.shape[-1] ** 2 * a.numel() / a.shape[-1] / 3,
    "cholesky_inverse": lambda a, *_: 2 * a.shape[-1] * a.numel() / 3,
    "cholesky_solve": lambda b, a, *_: 2 * b.numel() * a.shape[-1],
    "linalg_solve_triangular": lambda a, b, *_: b.numel() * a.shape[-1],
}
_SELECTIONS = {"kthvalue", "sort", "topk", "argsort"}
_GROUPED = {"grouped_mm", "_grouped_mm"}  # torch.nn.functional's hands its arguments on to one without a public name
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
LIBRARIES = "interpreter and libraries"  # always on the host


@dataclass(frozen=True)
class Work:
    """Amounts of work by kind:

    products_*: operations of matrix products and attention, two per multiply-add, by the dtype of the factors;
    factor_*: operations of Cholesky factorizations, their inverses and triangular solves;
    select: entries that are sorted or selected from;
    traffic: bytes read and written by all other operators;
    disk_read, disk_write, hash: bytes;
    tokenize: characters;
    calls: operator calls, each of which has an overhead.
    """

    counts: Counter[str] = field(default_factory=Counter[str])

    @classmethod
    def of(cls, **counts: float) -> Work:
        return cls(Counter(counts))

    def __add__(self, other: Work) -> Work:
        total = Counter(self.counts)
        total.update(other.counts)
        return Work(total)

    def __mul__(self, factor: float) -> Work:
        return Work(Counter({kind: factor * count for kind, count in self.counts.items()}))

    def scaled(self, scale: float) -> Work:
        """The work of a problem whose dimensions are all `scale` times as large: products and factorizations scale with
        the cube, operations on every entry with the square, and the number of calls is the same.
        """
        cubic = ("products", "factor")
        power = {kind: 3 if kind.startswith(cubic) else 0 if kind == "calls" else 2 for kind in self.counts}
        return Work(Counter({kind: count * scale ** power[kind] for kind, count in self.counts.items()}))

    @property
    def operations(self) -> float:
        """The operations of all products and factorizations."""
        return sum(count for kind, count in self.counts.items() if kind.startswith(("products", "factor")))


class Counting(TorchDispatchMode):
    """Counts operations, and the bytes of tensors that were created in this mode and still exist.

    Workspace inside kernels is not counted.

    Attributes:
        live, peak: the bytes now, and their maximum so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.live, self.peak = 0, 0
        self._counts: Counter[str] = Counter()
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._answers: dict[int, bool] = {}  # values of storages on the meta device

    @property
    def work(self) -> Work:
        return Work(Counter(self._counts))

    def rest(self) -> None:
        """Starts a new measurement: resets the peak to the current memory, and the counts to zero."""
        self.peak = self.live
        self._counts.clear()

    def know(self, *tensors: Tensor) -> None:
        """Excludes existing tensors from the count of bytes."""
        for tensor in tensors:
            self._remember(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if name == "_local_scalar_dense":
                return self._answers.get(args[0].untyped_storage()._cdata, args[0].dtype is torch.bool or 1)
            if name == "_to_copy" and str(kwargs.get("device", "meta")) != "meta":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if name == "index":
                args = (args[0], _everywhere(args[1]))
        out = func(*args, **kwargs)
        self._count(func, name, args, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._remember(tensor, tensor.untyped_storage().nbytes())
                if tensor.is_meta:
                    self._answer(name, args, tensor)
        return out

    def _remember(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = _key(tensor)
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self._storages.pop(key, None)
        self._answers.pop(key, None)
        self.live -= size

    def _answer(self, name: str, args: Any, tensor: Tensor) -> None:
        """`any` of bad entries is False, and so are values derived from it; every other check is True.

        Only booleans matter: values computed with a comparison, such as max(x, 0) as x * (x > 0), are arbitrary.
        """
        if tensor.is_floating_point():
            return
        inherited = [self._answers.get(_key(x), True) for x in args if isinstance(x, Tensor)]
        says = name not in ("any", "isnan", "gt", "lt") and all(inherited)
        if not says:
            self._answers[_key(tensor)] = False

    def _count(self, func: Any, name: str, args: Any, out: Any) -> None:
        if func.is_view:
            return
        self._counts["calls"] += 1
        base = name.removesuffix("_")
        tensors = [x for x in tree_leaves((args, out)) if isinstance(x, Tensor)]
        if not tensors:
            return
        products = _products(base, args)
        if products:
            self._counts[f"products_{_kind(out if isinstance(out, Tensor) else tensors[0])}"] += int(products)
        elif base in _FACTORS:
            precision = "float64" if args[0].dtype is torch.float64 else "float32"
            self._counts[f"factor_{precision}"] += int(_FACTORS[base](*args))
        elif base in _SELECTIONS:
            self._counts["select"] += args[0].numel()
        elif not base.startswith(("empty", "detach", "zeros")):
            self._counts["traffic"] += sum(x.numel() * x.element_size() for x in tensors)


class _CpuKernels(TorchFunctionMode):
    """The CPU's operators on the meta device: attention without a matrix of scores, and for the grouped
    products of experts, whose sizes only a router knows, one product of as many rows with one expert.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], Tensor) or not args[0].is_meta:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in _GROUPED:
            return torch.mm(args[0], args[1][0])
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v = args[:3]
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, kwargs.get("is_causal", False), attn_mask=mask, scale=kwargs.get("scale")
            )
            return out
        return func(*args, **kwargs)


@contextmanager
def counted() -> Generator[Counting]:
    """Counts operations within the context."""
    with ExitStack() as stack:
        stack.enter_context(_CpuKernels())
        yield stack.enter_context(Counting())


def _everywhere(indices: Any) -> list[Any]:
    """Indices with every mask replaced by the places of all of its entries."""
    expanded: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype is torch.bool:
            expanded += [torch.empty(index.numel(), dtype=torch.long, device="meta")] * index.ndim
        else:
            expanded.append(index)
    return expanded


def _kind(tensor: Tensor) -> str:
    return {torch.float64: "float64", torch.float32: "float32"}.get(tensor.dtype, "half")


def _products(base: str, args: Any) -> float:
    """Operations of a matrix product or of attention, 0 for anything else."""
    if base in ("mm", "bmm", "_grouped_mm"):
        return float(2 * args[0].numel() * args[1].shape[-1])
    if base in ("addmm", "baddbmm"):
        return float(2 * args[1].numel() * args[2].shape[-1])
    if base == _ATTENTION:
        return float(4 * args[0].numel() * args[1].shape[-2])
    if base == f"{_ATTENTION}_backward":
        return float(10 * args[1].numel() * args[2].shape[-2])
    return 0.0


def _key(tensor: Tensor) -> int:
    """Identifies a storage: torch has no public name for it, and on the meta device no address."""
    key: int = tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
    return key


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of a run.

    Attributes:
        parts: bytes in memory at its peak, by purpose.
        work: of all the times that it happens.
    """

    name: str
    parts: Mapping[str, int]
    work: Work = field(default_factory=Work)

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    def beside(self, parts: Mapping[str, int]) -> Stage:
        """With more in memory at the same time."""
        return replace(self, parts={**parts, **self.parts})

    def times(self, count: float) -> Stage:
        """The stage repeated `count` times."""
        return replace(self, work=self.work * count)


@dataclass
class Cost:
    """The counted cost of a piece of code: peak bytes, remaining bytes, operations."""

    peak: int = 0
    left: int = 0
    work: Work = field(default_factory=Work)


@contextmanager
def measured_cost(counting: Counting) -> Generator[Cost]:
    """Counts operations within the context, and memory beyond that at its start."""
    before, cost = counting.live, Cost()
    counting.rest()
    yield cost
    cost.peak, cost.left, cost.work = counting.peak - before, counting.live - before, counting.work


def by_name(stages: list[Stage], merge: Callable[[str], str] = str) -> dict[str, Work]:
    """The work of all stages of one name together."""
    totals: dict[str, Work] = {}
    for stage in stages:
        name = merge(stage.name)
        totals[name] = totals.get(name, Work()) + stage.work
    return totals
