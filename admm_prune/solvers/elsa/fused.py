"""SparseAdam's step as one kernel, where Triton serves: what gradients would be put through is told to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from admm_prune.kernels import backend
from admm_prune.kernels.quantization import Stored
from admm_prune.solvers.elsa.anchors import Anchors, State, Weight
from admm_prune.solvers.elsa.randomness import seed
from admm_prune.solvers.elsa.settings import Score
from admm_prune.solvers.elsa.sharding import local
from admm_prune.solvers.elsa.supports import LEAST_FISHER

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Later:
    """What is left for the kernel to do: g <- factor g + rho (x - c). Gradients stay as they came."""

    factor: float = 1.0
    pulls: dict[int, tuple[float, Stored]] = field(default_factory=dict)  # rho and c, by id of the parameter

    @classmethod
    def of(cls, active: Sequence[Tensor], score: Score, *, clip_penalty: bool) -> Later | None:
        """None where the gradients have to be changed themselves: someone else reads them, or Triton does not serve."""
        if clip_penalty or score.fisher == "clean" or not all(map(_serves, active)):
            return None
        return cls()


def _serves(parameter: Tensor) -> bool:
    x = local(parameter.detach())
    if not backend.uses_triton(x, *_DTYPES):
        return False
    gradient = None if parameter.grad is None else local(parameter.grad)
    return gradient is not None and x.is_contiguous() and gradient.is_contiguous() and x.numel() > 0


def stored_anchor(weight: Weight, anchors: Anchors) -> Stored:
    """c as it is kept."""
    state = weight.state
    return Stored(local(state["anchor"]), local(state["anchor_scale"]) if anchors.format == "int8" else None)


def step(
    parameter: Tensor,
    state: State,
    first: Stored,
    second: Stored,
    group: dict[str, Any],
    draws: tuple[int, ...],
    later: Later,
) -> None:
    """Adam's step of one parameter, with what is left to do."""
    from admm_prune.kernels.triton import adam

    if state["step"].is_cuda:  # where torch's fused kernel wants it; here the host counts
        state["step"] = state["step"].cpu()
    state["step"] += 1
    adam.step_(
        local(parameter.detach()),
        local(parameter.grad),  # type: ignore[arg-type]  # `Later.of` saw it
        first,
        second,
        steps=int(state["step"]),
        factor=later.factor,
        pull=later.pulls.get(id(parameter)),
        seed=seed(parameter, *draws),
        settings=group,
    )


def scores(weight: Weight, anchor: Stored | None, score: Score, second: Stored | None) -> Tensor | None:
    """Scores of x + u in one pass; None where Triton does not serve.

    Args:
        anchor: None for u = 0.
        second: F, or in 8 bits its root; None for F = 1.
    """
    x = weight.here
    if not backend.uses_triton(x, *_DTYPES) or not x.is_contiguous() or x.numel() == 0:
        return None
    if second is not None and score.power != 0.5:
        return None
    from admm_prune.kernels.triton import adam

    lag, bonus = float(weight.state["lag"]), 1.0 + score.hysteresis
    return adam.scores(x, anchor, local(weight.state["mask"]), second, lag=lag, bonus=bonus, least=LEAST_FISHER**0.5)
