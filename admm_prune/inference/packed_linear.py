"""Linear layers with packed weights, and models made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.models.structure import assign
from admm_prune.ops import packed
from admm_prune.ops.packed import Packed
from admm_prune.prunable import LinearWeight, matrices, parameters_elsewhere

Values = Literal["int8"]
_PARTS = ("bits", "values", "offsets", "scales")
_LAYERS = ("Linear", "Conv1D", "FalconLinear")  # whose forward is x W^T + b; other subclasses may do more
_NOT_PACKED = "weights of {} cannot be packed, only float32, bfloat16 and float16"
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class PackedWeight(nn.Module):
    """A matrix W (out, in) as `ops.packed.Packed`, its parts in buffers.

    `to(device)` moves it; `to(dtype)` converts its values, but neither int8 values nor their scales. A `state_dict` of
    another mask can be loaded. In `torch.nn.functional.linear(x, weight)`, and in `x @ weight` where it is transposed,
    it takes the place of a tensor: so transformers' experts use it.

    Args:
        matrix: its tensors are not copied.
        transposed: it takes the place of W^T (in, out).
    """

    bits: Tensor
    values: Tensor
    offsets: Tensor | None
    scales: Tensor | None

    def __init__(self, matrix: Packed, *, transposed: bool = False) -> None:
        super().__init__()
        for name in _PARTS:
            self.register_buffer(name, getattr(matrix, name))
        self.out_features, self.in_features = matrix.rows, matrix.width
        self.group, self.transposed = matrix.group, transposed
        self._matrix = matrix

    @property
    def matrix(self) -> Packed:
        """The matrix of the current buffers."""
        matrix = self._matrix
        if any(getattr(matrix, name) is not self._buffers[name] for name in _PARTS):
            matrix = self._matrix = Packed(
                self.bits, self.values, self.offsets, self.scales, self.in_features, self.group
            )
        return matrix

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b for x (..., in), in the dtype of x."""
        if not torch.compiler.is_compiling():
            return packed.linear(x, self.matrix, bias)
        parts = (self.bits, self.values, self.offsets, self.scales)
        result: Tensor = torch.ops.admm_prune.packed_linear(x, *parts, bias, self.in_features, self.group)
        return result

    def dense(self) -> Tensor:
        """W (out, in), or W^T where it is transposed; unpacked by every call."""
        weight = packed.unpack(self.matrix)
        return weight.T if self.transposed else weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """A product with packed weights; any other function gets them unpacked."""
        kwargs = kwargs or {}
        if len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], PackedWeight):
            weight = args[1]
            if func is nn.functional.linear and not weight.transposed:
                return weight.product(args[0], *args[2:], **kwargs)
            if func in _PRODUCTS and weight.transposed:
                return weight.product(args[0])
        dense = [x.dense() if isinstance(x, PackedWeight) else x for x in args]
        return func(*dense, **{name: x.dense() if isinstance(x, PackedWeight) else x for name, x in kwargs.items()})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None and self.scales is not None and self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **options: Any) -> None:
        """Makes room for the number of values of the state.

        Raises:
            ValueError: its bits are those of another shape, or do not belong to its values.
        """
        offsets = self.offsets
        stored_bits, stored_values = (state_dict.get(f"{prefix}{name}") for name in ("bits", "values"))
        if isinstance(stored_bits, Tensor) and isinstance(stored_values, Tensor):
            if stored_bits.shape != self.bits.shape:
                raise ValueError(f"{prefix}bits: {tuple(stored_bits.shape)}, not {tuple(self.bits.shape)}")
            matrix = packed.from_parts(stored_bits, stored_values, self.in_features)
            self.values = torch.empty_like(stored_values, dtype=self.values.dtype, device=self.values.device)
            offsets = None if matrix.offsets is None else matrix.offsets.to(self.bits.device, copy=True)
            self.offsets = None if offsets is None else torch.empty_like(offsets)
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)
        self.offsets = offsets  # those of the bits, whatever the state has: the kernels rely on them

    def extra_repr(self) -> str:
        stored = self.values.numel() / max(1, self.out_features * self.in_features)
        return f"{self.in_features}, {self.out_features}, {stored:.1%} stored in {self.values.dtype}"


class PackedLinear(PackedWeight):
    """y = x W^T + b with W packed, in place of `nn.Linear`, or of transformers' `Conv1D`.

    Few tokens are multiplied without unpacking, those of a long prompt by blocks of unpacked rows: see
    `ops.packed.PREFILL_TOKENS`. Gradients reach the inputs and the bias, not the weight.

    Args:
        matrix: its tensors are not copied.
        bias: b (out,).

    Raises:
        ValueError: the bias has another shape.
    """

    bias: nn.Parameter | None

    def __init__(self, matrix: Packed, bias: Tensor | None = None) -> None:
        super().__init__(matrix)
        if bias is not None and tuple(bias.shape) != (matrix.rows,):
            raise ValueError(f"a bias {tuple(bias.shape)} for a matrix of {matrix.rows} rows")
        parameter = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, bias.requires_grad)
        self.register_parameter("bias", parameter)

    @property
    def weight(self) -> Tensor:
        """W (out, in), unpacked by every access, for code that reads it."""
        return self.dense()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)


def pack_model(model: Any, *, values: Values | None = None, group: int | None = None) -> Any:
    """Replaces the linear layers and experts of a model that have enough zeros by packed ones, in place.

    A weight becomes its mask, one bit per entry, and its non-zero values. One that would not become smaller stays
    dense, and so does one that an embedding shares. Weights shared by several layers are packed once.

    Args:
        model: any module, such as a model of transformers, in memory.
        values: None keeps the values exactly; "int8" rounds them to 8 bits with a scale for every row or group.
        group: columns that share a scale, a multiple of 32; None gives every row one scale.

    Returns:
        The model.

    Raises:
        UserError: no weight would become smaller; NaN or Inf entries, for which int8 has no code; a `group` without
            "int8", or that is no multiple of 32.
    """
    check_values(values, group)
    weights = list(packable(model))
    if values is not None:  # before a layer is replaced
        for weight in weights:
            if not bool(weight.parameter.isfinite().all()):
                raise UserError(f"{type(model).__name__}: {weight.name} has NaN or Inf entries, which int8 cannot hold")
    taken: dict[int, Packed | None] = {}
    replaced = False
    for weight in weights:
        parameter = weight.parameter
        if weight.stacked:
            experts = [compressed(oriented(matrix, weight.transposed), values, group) for matrix in parameter]
            if pays(parameter, experts):
                place_experts(weight, experts)
                replaced = True
            continue
        if id(parameter) not in taken:
            matrix = compressed(oriented(parameter, weight.transposed), values, group)
            taken[id(parameter)] = matrix if pays(parameter, [matrix]) else None
        shared = taken[id(parameter)]
        if shared is not None:
            place_linear(model, weight, shared)
            replaced = True
    if not replaced:
        kinds = {weight.parameter.dtype for weight in matrices(model)}
        if not weights and kinds and not kinds & {*packed.FLOATS}:
            raise UserError(f"{type(model).__name__}: {_NOT_PACKED.format(min(map(str, kinds)))}")
        raise UserError(f"{type(model).__name__}: no linear layer has enough zeros to become smaller: prune it first")
    return model


def check_packable(dtype: object) -> None:
    """Raises UserError where no weight of a dtype can be packed."""
    if dtype not in packed.FLOATS:
        raise UserError(_NOT_PACKED.format(dtype))


def packable(model: nn.Module) -> Iterator[LinearWeight]:
    """The weights of plain linear layers and experts in a dtype that can be packed, which no other module shares."""
    listed = [w for w in matrices(model) if w.stacked or type(w.module).__name__ in _LAYERS]
    others = parameters_elsewhere(model, listed)
    for weight in listed:
        if id(weight.parameter) not in others and weight.parameter.dtype in packed.FLOATS:
            yield weight


def place_linear(model: nn.Module, weight: LinearWeight, matrix: Packed) -> None:
    """Puts a packed layer in the place of a linear one, wherever the model has it."""
    layer = PackedLinear(matrix, weight.module.bias).train(weight.module.training)  # type: ignore[arg-type]
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is weight.module]
    for name in names:
        assign(model, name, layer)


def place_experts(weight: LinearWeight, experts: Sequence[Packed]) -> None:
    """Puts packed matrices, one for each expert, in the place of a parameter of three dimensions."""
    module: Any = weight.module
    delattr(module, weight.attribute)
    stack = nn.ModuleList(PackedWeight(matrix, transposed=weight.transposed) for matrix in experts)
    setattr(module, weight.attribute, stack)
    config: Any = getattr(module, "config", None)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # the others multiply the experts' tensors in one kernel


def compressed(matrix: Tensor, values: Values | None, group: int | None) -> Packed:
    """W (out, in), packed."""
    exact = packed.pack(matrix)
    return packed.quantize(exact, group) if values == "int8" else exact


def oriented(matrix: Tensor, transposed: bool) -> Tensor:
    """W (out, in) of a stored matrix."""
    return matrix.detach().T.contiguous() if transposed else matrix.detach()


def pays(parameter: Tensor, parts: Sequence[Packed]) -> bool:
    """Whether packed matrices take fewer bytes than their parameter."""
    return sum(part.nbytes for part in parts) < parameter.nbytes


def check_values(values: Values | None, group: int | None) -> None:
    """Raises UserError where the two settings do not fit."""
    if values not in (None, "int8"):
        raise UserError(f"values={values!r}: give None or 'int8'")
    if group is not None and (values is None or group <= 0 or group % packed.LANES):
        raise UserError(f"group={group}: a multiple of {packed.LANES}, with values='int8'")
