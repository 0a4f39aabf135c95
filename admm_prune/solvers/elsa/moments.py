"""Adam's moments and step: in floats, in 8 bits (ours or bitsandbytes'), or as one Triton kernel.

Random numbers are drawn from a seed and the step, so that a resumed run draws the same.

Gradients before Adam sees them: their norms over all processes, and clipping.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from admm_prune.errors import UserError
from admm_prune.ops import backend, bits, library_adam, quantization
from admm_prune.ops.quantization import Stored, generator_on
from admm_prune.ops.sharding import local
from admm_prune.solvers.elsa.anchors import (
    Anchors,
    State,
    Weight,
    chunks,
    processes_of,
    sharded_like,
    totals,
    working_dtype,
)
from admm_prune.solvers.elsa.settings import Score, check_choice
from admm_prune.solvers.elsa.supports import LEAST_FISHER

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MomentFormat = Literal["full", "int8", "bitsandbytes"]
_SMALLEST = 4096  # least number of entries for moments in 8 bits
_DRAW = 0  # distinguishes these random numbers from those of the anchors


def generator(parameter: Tensor, *numbers: int) -> torch.Generator:
    """A generator on the parameter's device, with `seed` of the same."""
    return generator_on(parameter.device).manual_seed(seed(parameter, *numbers))


def seed(parameter: Tensor, *numbers: int) -> int:
    """56 bits, by `numbers` and by the parameter's rows in the local shard."""
    processes = processes_of(parameter)
    text = repr((*numbers, 0 if processes is None else processes.rank))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


@dataclass
class DeferredGradient:
    """Changes of the gradients deferred to the kernels: g <- factor M g + rho (x - c). The gradients are not changed.

    Attributes:
        pulls: rho and c, by the id of the parameter.
        supports: M packed, likewise; everything where there is none.
    """

    factor: float = 1.0
    pulls: dict[int, tuple[float, Stored]] = field(default_factory=dict)
    supports: dict[int, Tensor] = field(default_factory=dict)


def _fits_kernel(parameter: Tensor) -> bool:
    x = local(parameter.detach())
    if x.dtype == torch.float16 or not backend.uses_triton(x, *_DTYPES):  # the kernels round float16 to the nearest
        return False
    gradient = None if parameter.grad is None else local(parameter.grad)
    return gradient is not None and x.is_contiguous() and gradient.is_contiguous() and x.numel() > 0


def stored_anchor(weight: Weight, anchors: Anchors) -> Stored:
    """c as stored."""
    state = weight.state
    return Stored(local(state["anchor"]), local(state["anchor_scale"]) if anchors.format == "int8" else None)


def fused_scores(weight: Weight, anchor: Stored | None, score: Score, second: Stored | None) -> Tensor | None:
    """Scores of x + u in one pass; None if Triton is not used.

    Args:
        anchor: None for u = 0.
        second: F, or in 8 bits its root; None for F = 1.
    """
    x = weight.shard
    if not backend.uses_triton(x, *_DTYPES) or not x.is_contiguous() or x.numel() == 0:
        return None
    if second is not None and score.power != 0.5:
        return None
    from admm_prune.ops.triton import supports

    lag, bonus = float(weight.state["lag"]), 1.0 + score.hysteresis
    return supports.scores(
        x, anchor, local(weight.state["mask"]), second, lag=lag, bonus=bonus, least=LEAST_FISHER**0.5
    )


@dataclass(frozen=True)
class Moments:
    """The storage of Adam's moments: "full" in the precision of the computation, or in 8 bits, a scale per 256 entries.

    In "int8", which needs no library, the first moment has logarithmic levels of both signs, and the root of the
    second, which is divided by, logarithmic levels rounded at random: with changes of 0.1 % per step it would otherwise
    not move between levels 5 % apart. In "bitsandbytes" levels, rounding and the step itself are that library's, fused
    on a GPU. Vectors, complex tensors and tensors below 4096 entries keep full moments.
    """

    format: MomentFormat
    notes: tuple[str, ...] = ()

    @classmethod
    def resolve(cls, requested: MomentFormat) -> Moments:
        """The moments of a format; "int8" instead of bitsandbytes' where that is not installed.

        Raises:
            UserError: there is no such format.
        """
        check_choice("format of moments", requested, MomentFormat)
        if requested == "bitsandbytes" and library_adam.installed() is None:
            return cls(
                "int8", ("bitsandbytes is not installed: Adam's moments are kept in this package's 8-bit format",)
            )
        return cls(requested)

    def __str__(self) -> str:
        return f"bitsandbytes {library_adam.installed()}" if self.format == "bitsandbytes" else self.format

    def create(self, parameter: Tensor, state: State, *, fused: bool) -> None:
        """Zero moments. torch's fused kernel wants the count of steps beside the parameter, the others on the CPU."""
        x = local(parameter.detach())
        state["step"] = torch.zeros((), dtype=torch.float32, device=x.device if fused else None)
        zero = torch.zeros_like(x, dtype=working_dtype(x.dtype))
        if not self.quantizes(parameter):
            state["exp_avg"] = sharded_like(parameter, zero)
            state["exp_avg_sq"] = sharded_like(parameter, zero.clone())
            return
        scales = torch.zeros(self._scales_shape(parameter, x), device=x.device)
        for name, dtype in (("exp_avg", self._first_dtype), ("exp_avg_sq", torch.uint8)):
            state[name] = sharded_like(parameter, torch.zeros(x.shape, dtype=dtype, device=x.device))
            state[f"{name}_scale"] = sharded_like(parameter, scales.clone())

    @property
    def _first_dtype(self) -> torch.dtype:
        return torch.uint8 if self.format == "bitsandbytes" else torch.int8

    def _scales_shape(self, parameter: Tensor, shard: Tensor) -> torch.Size:
        rows = quantization.scales_shape(shard.shape)
        if self.format != "bitsandbytes" or shard.shape[-1] % library_adam.BLOCK == 0:
            return rows
        if processes_of(parameter) is not None:
            raise UserError(
                f"bitsandbytes shares a scale across the rows of a weight {tuple(parameter.shape)}, which are sharded: "
                'use moments="int8"'
            )
        return torch.Size((library_adam.blocks(shard.numel()),))

    def quantizes(self, parameter: Tensor) -> bool:
        large = parameter.ndim > 1 and parameter.numel() >= _SMALLEST
        return self.format != "full" and large and not parameter.is_complex()

    def stored(self, parameter: Tensor, state: State) -> bool:
        """Whether the state has this format."""
        if not self.quantizes(parameter):
            return "exp_avg_scale" not in state
        return "exp_avg_scale" in state and local(state["exp_avg"]).dtype == self._first_dtype

    def second(self, parameter: Tensor, state: State) -> Tensor:
        """v of the local shard."""
        stored = local(state["exp_avg_sq"])
        if not self.quantizes(parameter):
            return stored
        scales = local(state["exp_avg_sq_scale"])
        if self.format == "bitsandbytes":
            return library_adam.second_moment(stored, scales)
        return quantization.from_unsigned_log(stored, scales).square_()

    def deferred(self, active: Sequence[Tensor], score: Score, *, clip_penalty: bool) -> DeferredGradient | None:
        """None if the gradients themselves have to be changed: they are read elsewhere, or our kernels are not used."""
        changed = clip_penalty or score.fisher == "clean" or self.format == "bitsandbytes"
        return None if changed or not all(map(_fits_kernel, active)) else DeferredGradient()

    def stored_second(self, parameter: Tensor, state: State) -> Stored:
        """v of the local shard as stored: in 8 bits, its root."""
        return self._stored(parameter, state, "exp_avg_sq")

    def _stored(self, parameter: Tensor, state: State, name: str) -> Stored:
        return Stored(local(state[name]), local(state[f"{name}_scale"]) if self.quantizes(parameter) else None)

    def restrict(self, state: State, mask: Tensor) -> None:
        """m <- M m, so that Adam does not move the other entries."""
        first = local(state["exp_avg"])
        first.masked_fill_(~mask, library_adam.ZERO_FIRST if first.dtype == torch.uint8 else 0)

    def step(
        self,
        parameters: Sequence[Tensor],
        states: Sequence[State],
        group: dict[str, Any],
        draws: Sequence[tuple[int, ...]],
        deferred: DeferredGradient | None = None,
    ) -> None:
        """x <- x - lr (m / c1) / (sqrt(v / c2) + eps), with torch's decoupled weight decay.

        Args:
            parameters: each with a gradient.
            group: the settings lr, betas, eps, weight_decay, foreach and fused.
            draws: for each parameter, numbers that seed the rounding of narrow states.
            deferred: if kernels take all parameters at once, the deferred changes of the gradients.
        """
        if deferred is not None:
            if parameters:
                self._fused_step(parameters, states, group, draws, deferred)
            return
        narrow = [self.quantizes(x) or working_dtype(x.dtype) != x.dtype for x in parameters]
        wide = [(x, state) for x, state, is_narrow in zip(parameters, states, narrow, strict=True) if not is_narrow]
        if wide:
            _adam(
                [local(x.detach()) for x, _ in wide],
                [_gradient(x) for x, _ in wide],
                [local(state["exp_avg"]) for _, state in wide],
                [local(state["exp_avg_sq"]) for _, state in wide],
                [state["step"] for _, state in wide],
                group,
            )
        for i, (x, state) in enumerate(zip(parameters, states, strict=True)):
            if self.format == "bitsandbytes" and self.quantizes(x):
                _library_step(x, state, group, generator(x, *draws[i], _DRAW))
            elif narrow[i]:
                self._narrow_step(x, state, group, generator(x, *draws[i], _DRAW))

    def _fused_step(
        self,
        parameters: Sequence[Tensor],
        states: Sequence[State],
        group: dict[str, Any],
        draws: Sequence[tuple[int, ...]],
        deferred: DeferredGradient,
    ) -> None:
        from admm_prune.ops.triton import adam as fused

        for state in states:
            if state["step"].is_cuda:  # torch's fused kernel needs it there; these kernels count on the host
                state["step"] = state["step"].cpu()
            state["step"].add_(1.0)
        updates = []
        for x, state, draw in zip(parameters, states, draws, strict=True):
            rho, anchor = deferred.pulls.get(id(x), (0.0, None))
            updates.append(
                fused.Update(
                    local(x.detach()),
                    _gradient(x),
                    self._stored(x, state, "exp_avg"),
                    self.stored_second(x, state),
                    steps=int(state["step"]),
                    rho=rho,
                    anchor=anchor,
                    support=deferred.supports.get(id(x)),
                    seed=seed(x, *draw, _DRAW),
                )
            )
        fused.step_(updates, factor=deferred.factor, settings=group)

    def _narrow_step(self, parameter: Tensor, state: State, group: dict[str, Any], chance: torch.Generator) -> None:
        """Steps some rows at a time: converted to the precision of the computation and written back."""
        x, gradient = local(parameter.detach()), _gradient(parameter)
        dtype = working_dtype(x.dtype)
        everything: tuple[Any, ...] = (...,)  # a scalar has no rows
        for rows in chunks(x) if x.ndim else everything:
            x_rows = x[rows].to(dtype)
            first, second = (moment.to(dtype) for moment in self._read(parameter, state, rows))
            one_by_one = {**group, "foreach": False, "fused": False}
            _adam([x_rows], [gradient[rows].to(dtype)], [first], [second], [state["step"].clone()], one_by_one)
            if self.quantizes(parameter):
                self._write(state, rows, first.float(), second.float(), chance)
            _write_weights(x, rows, x_rows, chance)
        state["step"] += 1

    def _read(self, parameter: Tensor, state: State, rows: slice) -> tuple[Tensor, Tensor]:
        first, second = local(state["exp_avg"])[rows], local(state["exp_avg_sq"])[rows]
        if not self.quantizes(parameter):
            return first, second
        root = quantization.from_unsigned_log(second, local(state["exp_avg_sq_scale"])[rows])
        return quantization.from_signed_log(first, local(state["exp_avg_scale"])[rows]), root.square_()

    def _write(self, state: State, rows: slice, first: Tensor, second: Tensor, chance: torch.Generator) -> None:
        codes = {
            "exp_avg": quantization.to_signed_log(first),
            "exp_avg_sq": quantization.to_unsigned_log(second.sqrt_(), chance),
        }
        for name, (levels, scales) in codes.items():
            local(state[name])[rows] = levels
            local(state[f"{name}_scale"])[rows] = scales


def _library_step(parameter: Tensor, state: State, group: dict[str, Any], chance: torch.Generator) -> None:
    """As `Moments._narrow_step`, over runs of whole blocks."""
    x = local(parameter.detach())
    flat = x.reshape(-1)  # a copy where x is not contiguous
    gradient = _gradient(parameter).reshape(-1)
    moments = [
        [local(state[f"{name}{part}"]).view(-1) for part in ("", "_scale")] for name in ("exp_avg", "exp_avg_sq")
    ]
    state["step"] += 1
    settings: dict[str, Any] = {name: group[name] for name in ("betas", "eps", "weight_decay")}
    settings["lr"] = float(group["lr"])
    for part_slice in chunks(flat):
        scales = slice(part_slice.start // library_adam.BLOCK, library_adam.blocks(part_slice.stop))
        x_part, gradient_part = flat[part_slice].float(), gradient[part_slice].float()
        pruned = (x_part == 0) & (gradient_part == 0)  # the library's kernels do not preserve exact zeros
        first, second = ((codes[part_slice], scale[scales]) for codes, scale in moments)
        library_adam.step(x_part, gradient_part, first, second, int(state["step"]), **settings)
        x_part.masked_fill_(pruned, 0)
        _write_weights(flat, part_slice, x_part, chance)
    if not x.is_contiguous():
        x.copy_(flat.view(x.shape))


def _write_weights(x: Tensor, rows: slice, updated: Tensor, chance: torch.Generator) -> None:
    """Writes some rows of x from the precision of the computation; if that is x's dtype, `updated` is x itself."""
    if x.dtype in quantization.AT_RANDOM and x.dtype != updated.dtype:
        x[rows] = quantization.AT_RANDOM[x.dtype](updated, chance)
    elif x.dtype != updated.dtype:
        x[rows] = updated.to(x.dtype)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return local(parameter.grad)


def _adam(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    beta1, beta2 = group["betas"]
    adam(
        parameters,
        gradients,
        first,
        second,
        [],
        steps,
        foreach=group["foreach"],
        fused=group["fused"],
        decoupled_weight_decay=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The local shards."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def refuse_sparse(parameters: Sequence[Tensor]) -> None:
    """Raises UserError where a gradient is not a dense tensor, as that of `nn.Embedding(sparse=True)` is not."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise UserError(
                f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient, which SparseAdam does not "
                "support: construct the embedding with sparse=False"
            )


def total_norm(parameters: Sequence[Tensor], deferred: DeferredGradient | None = None) -> tuple[Tensor, float]:
    """`norms` on the host, and the norm of all gradients together: the only time that the host waits in a step.

    Where that overflows in the gradients' own dtype (65504 in float16), it is computed again in float64, so that it is
    finite whenever all gradients are.
    """
    each = norms(parameters, deferred).cpu()
    norm = float(torch.linalg.vector_norm(each))
    if math.isfinite(norm):
        return each, norm
    if deferred is not None:
        for parameter in parameters:
            if id(parameter) in deferred.supports:
                bits.restrict_(_gradient(parameter), deferred.supports[id(parameter)])
    each = norms(parameters, wide=True).cpu()
    return each, float(torch.linalg.vector_norm(each))


def norms(parameters: Sequence[Tensor], deferred: DeferredGradient | None = None, *, wide: bool = False) -> Tensor:
    """The Euclidean norm of each parameter's gradient (n,), over all processes, in float64.

    Args:
        deferred: the gradients count on its supports alone.
        wide: squares and sums in float64, in place of the dtype of the gradient.
    """
    if deferred is None or wide:
        local_norms = torch.stack([_norm(gradient, wide=wide) for gradient in gradients(parameters)])
    else:
        from admm_prune.ops.triton import adam as fused

        supports = deferred.supports
        local_norms = fused.norms(
            [fused.Update(local(x.detach()), _gradient(x), support=supports.get(id(x))) for x in parameters]
        )
    if all(processes_of(parameter) is None for parameter in parameters):
        return local_norms
    return totals(parameters, local_norms.square_()).sqrt_()


def _norm(x: Tensor, *, wide: bool) -> Tensor:
    least = torch.float64 if wide else torch.float32  # a norm in 16 bits has 3 digits, and overflows
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, least))
    return norm.double()


def clip(parameters: Sequence[Tensor], norm: float, limit: float, deferred: DeferredGradient | None = None) -> float:
    """Scales all gradients down to the norm `limit`, as `torch.nn.utils.clip_grad_norm_` does; returns the factor.

    Args:
        deferred: receives the factor, if a kernel scales them.
    """
    factor = min(1.0, limit / (norm + 1e-6))
    if deferred is not None:
        deferred.factor = factor
    elif factor < 1.0:
        for gradient in gradients(parameters):
            gradient.mul_(factor)
    return factor
