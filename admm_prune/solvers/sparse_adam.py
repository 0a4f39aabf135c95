"""SparseAdam: ELSA as a torch optimizer for any training loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from admm_prune.errors import UserError
from admm_prune.problem import SupportConstraint
from admm_prune.prunable import HEADS
from admm_prune.solvers.elsa.anchors import AnchorFormat, Anchors, Weight, check_masks, check_names, sharded_like
from admm_prune.solvers.elsa.duals import DualUpdate, Splitting, WeightUpdate
from admm_prune.solvers.elsa.moments import DeferredGradient, MomentFormat, Moments, clip, refuse_sparse, total_norm
from admm_prune.solvers.elsa.parameter_groups import GroupTarget, group_of, names_of, parameter_groups, unify_names
from admm_prune.solvers.elsa.settings import Penalty, Score, Timeline, check_adam, check_choice
from admm_prune.solvers.elsa.state import check_saved, copy_saved, load_atomically
from admm_prune.solvers.elsa.supports import Scope, Support

Final = Literal["anchors", "weights"]
_PENALTY, _SCORE = Penalty(), Score()  # frozen, so that they can be shared
_PROGRESS = ("steps_done", "skipped", "frozen", "fraction")  # in every group
_OWN = (
    "timeline", "penalty", "hard", "score", "clip", "clip_penalty", "final", "seed", "moments", "history", "_scope",
    "_anchors", "_moments", "_masks", "_splittings", "_transposed", "_stacked", "_norm",
)  # fmt: skip


class SparseAdam(Optimizer):
    """Adam that ends on a sparse point: min f(x) with the support of x in a family, by ADMM with x = z.

        g <- clip(gradient of f),   g <- g + rho (x - z + u),   x <- Adam's step with g,
        and every `interval` steps:   z <- P(x + u),   u <- u + x - z,   rho <- the schedule's.

    z and u are kept as one tensor and one bit per weight, exactly (`solvers.elsa.anchors`). In the last part of the run
    the support is frozen: pruned weights are zero, Adam trains the others, and only the bits are kept. Give
    `total_steps`, and call `finalize` at the end. A step with a non-finite gradient is skipped and counted.
    The u of a matrix that has had no gradient yet, such as that of an expert that received no token, stays zero.

    With penalty = inf, x = z throughout: an update permanently prunes the entries with the lowest scores, which with a
    `ramp` is gradual pruning. With freeze = 1 the support is fixed, or set by `change_support`: masked fine-tuning.

    Args:
        params: a model, whose linear weights are pruned (`admm_prune.prunable`) while all its parameters are trained;
            or parameters, or groups of them. A group may have its own `sparsity`, `pattern` or `constraint`, or
            `constraint=None` to stay dense; the others take the ones given here. Tensors without entries are not
            pruned. Complex parameters and sparse gradients are refused: the former among those to prune, the latter
            everywhere.
        sparsity: the fraction of every matrix to prune.
        pattern: (n, m), n kept of every m consecutive inputs.
        constraint: any family of supports over the point of all pruned weights, under their names.
        scope: "model" applies one `sparsity` to all matrices together, comparing scores divided by their mean.
        targets: shell patterns of the names of a model's weights to prune.
        ignore: shell patterns of the names of weights to leave dense; the output head by default.
        masks: initial supports by name, by magnitude where not given; of the target's size unless freeze = 1.
        lr: the learning rate.
        betas: decay rates of Adam's moments.
        eps: added to the denominator, as in `torch.optim.AdamW`; above 0.
        weight_decay: as in `torch.optim.AdamW`, but 0 by default.
        foreach: as in `torch.optim.AdamW`.
        fused: as in `torch.optim.AdamW`.
        clip: the norm that the loss's gradient, over all parameters, is clipped to before the penalty; None for none.
        clip_penalty: clip after the penalty instead.
        penalty: rho, or a `Penalty`.
        score: selects the support.
        interval: steps between dual updates.
        first_update: the step, counted from 0, after which the first dual update comes; `interval` by default.
        total_steps: the length of the run in calls of `step`, one for several batches whose gradients are accumulated;
            schedules need it. A shorter or longer run causes a warning.
        freeze: the fraction of the run, at its end, with a frozen support; 1/4 by default, 0 without `total_steps`.
        ramp: the fraction of the steps before the freeze in which the sparsity grows.
        final: the support at the end: that of the "anchors" after one more dual update, or that of the largest scores
            of the "weights" x themselves, as published.
        anchor: how z and u are stored: see `Anchors`. 4.125, 2.125 or 1.14 bytes per weight.
        rounding: how anchors of less than 32 bits are rounded: see `Anchors`.
        moments: how Adam's moments are stored: see `Moments`. 8 bytes per weight, or 2.03 in 8 bits.
        seed: of stochastic rounding.

    Raises:
        UserError: nothing to prune; no target, or two; a setting out of range.

    Source: ELSA, arXiv 2510.01650, 2026; the compact state, relative penalties and the frozen end are ours.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        sparsity: float | None = None,
        pattern: tuple[int, int] | None = None,
        constraint: SupportConstraint | None = None,
        scope: Scope = "matrix",
        targets: Sequence[str] = ("*",),
        ignore: Sequence[str] = HEADS,
        masks: Mapping[str, Tensor] | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        fused: bool | None = None,
        clip: float | None = 1.0,
        clip_penalty: bool = False,
        penalty: float | Penalty = _PENALTY,
        score: Score = _SCORE,
        interval: int = 32,
        first_update: int | None = None,
        total_steps: int | None = None,
        freeze: float | None = None,
        ramp: float = 0.0,
        final: Final = "anchors",
        anchor: AnchorFormat = "bfloat16",
        rounding: Literal["nearest", "stochastic"] = "nearest",
        moments: MomentFormat = "full",
        seed: int = 0,
    ) -> None:
        check_choice("final support", final, Final)
        target = GroupTarget(sparsity, pattern, constraint, scope)
        chosen = parameter_groups(params, target, targets=targets, ignore=ignore)
        self.timeline = Timeline(
            interval=interval,
            first_update=interval if first_update is None else first_update,
            total_steps=total_steps,
            freeze=(0.25 if total_steps else 0.0) if freeze is None else freeze,
            ramp=ramp,
        )
        self.penalty = penalty if isinstance(penalty, Penalty) else Penalty(value=penalty)
        self.hard = self.penalty.value == math.inf  # x = z at all times
        self.score, self.clip, self.clip_penalty, self.final, self.seed = score, clip, clip_penalty, final, seed
        self._scope: Scope = scope
        self._anchors, self._moments = Anchors(anchor, rounding), Moments.resolve(moments)
        self._masks, self.moments = dict(masks or {}), str(self._moments)  # the format actually used for the moments
        self.history: list[DualUpdate] = []
        adam: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        adam |= {"foreach": foreach, "fused": fused}
        # State beyond that of the parameters is stored in the groups, so that it is saved with any torch optimizer.
        for group in chosen.groups:
            check_adam({**adam, **group}, clip)
        adam["betas"] = tuple(map(float, betas))
        super().__init__(chosen.groups, {**adam, "steps_done": 0, "skipped": 0, "frozen": False, "fraction": None})
        self._transposed, self._stacked = chosen.transposed, chosen.stacked
        self._splittings = {number: self._splitting(support) for number, support in chosen.supports.items()}
        self._norm = math.nan  # of the last gradient
        check_names(self._weights())
        check_masks(self._masks, self._weights())

    @classmethod
    def faithful(
        cls, params: nn.Module | Iterable[Any], *, total_steps: int, lr: float = 2e-4, penalty: float = 1e-3, **how: Any
    ) -> Self:
        """ELSA as published: a coupled, absolute penalty, cosine from 0; the projection in the metric of Adam's second
        moment; u rescaled late; no frozen end; the final support from the weights. `how` overrides any setting."""
        published: dict[str, Any] = {
            "penalty": Penalty(value=penalty, shape="cosine", units="absolute", rescale="lagged"),
            "score": Score(fisher="adam", power=0.5),
            "interval": 32,
            "first_update": 0,
            "freeze": 0.0,
            "final": "weights",
            "anchor": "full",
        }
        return cls(params, total_steps=total_steps, lr=lr, **{**published, **how})

    @property
    def steps_done(self) -> int:
        return int(self.param_groups[0]["steps_done"])

    @property
    def skipped(self) -> int:
        """Steps skipped because of a non-finite gradient."""
        return int(self.param_groups[0]["skipped"])

    @property
    def _calls(self) -> int:
        return self.steps_done + self.skipped

    @property
    def frozen(self) -> bool:
        """Whether the support is fixed from now on, and pruned weights are zero."""
        return bool(self.param_groups[0]["frozen"])

    @property
    def notes(self) -> tuple[str, ...]:
        """Automatic corrections."""
        return (*self._moments.notes, *[f"{self.skipped} steps skipped: a gradient was not finite"][: self.skipped])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of Adam with the penalty, and the dual update where one is due."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = (p for group in self.param_groups for p in group["params"] if p.grad is not None)
        active = list(dict.fromkeys(given))  # each once
        if not active:
            return loss
        refuse_sparse(active)
        self._begin()
        deferred = self._moments.deferred(active, self.score, clip_penalty=self.clip_penalty)
        if self.frozen or self.hard:
            for weight in self._weights():
                if weight.parameter.grad is None:
                    continue
                if deferred is None:
                    weight.restrict(weight.gradient)
                else:
                    deferred.supports[id(weight.parameter)] = weight.packed_mask
        each, norm = total_norm(active, deferred)
        if not math.isfinite(norm):
            self._set("skipped", self.skipped + 1)
            return loss
        self._norm = norm
        self._prepare_gradients(active, each, norm, deferred)
        self._step_adam(deferred)
        self._advance()
        return loss

    @torch.no_grad()
    def freeze(self) -> None:
        """Fixes the support: pruned weights become and stay zero, the others are trained further.

        Called automatically at the start of the frozen part of the run.
        """
        self._begin()
        if self.frozen:
            return
        if self.final == "anchors" and not self.hard:
            self._update_duals(self.steps_done, 1.0)
        else:
            self._reselect(1.0)
        self._fix_support()

    @torch.no_grad()
    def change_support(self, masks: Mapping[str, Tensor]) -> None:
        """Fixes the support to given masks, such as those of a layer-wise solver.

        Args:
            masks: by the names of the pruned weights, all of them, boolean, of whole weights or sharded as they are.

        Raises:
            UserError: a mask is missing, too many, or of another shape.
        """
        check_masks(masks, self._weights(), complete=True)
        self._begin(restrict=False)
        for splitting, _, weights in self._pruned():
            splitting.set_masks(weights, masks)
        self._fix_support()

    @torch.no_grad()
    def restart(self, solution: Mapping[str, Tensor], fraction: float = 1.0) -> None:
        """z <- a sparse point, such as that of a layer-wise solver, and u <- 0. The weights x do not change.

        Args:
            solution: by the names of the pruned weights, all of them, whole or sharded as they are.
            fraction: of the final sparsity, for the supports of the dual updates from now on, in place of the ramp.

        Raises:
            UserError: a weight is missing, too many, or of another shape; the support is fixed, or x = z.
        """
        masks = {name: z != 0 for name, z in solution.items()}
        check_masks(masks, self._weights(), complete=True)
        self._begin()
        if self.frozen or self.hard:
            raise UserError("the support is fixed, or x = z: a splitting with another z needs x and z apart")
        for splitting, _, weights in self._pruned():
            splitting.set_masks(weights, masks)
            splitting.restart(weights, solution, self.steps_done)
        self._set("fraction", fraction)

    def _fix_support(self) -> None:
        for splitting, _, weights in self._pruned():
            splitting.drop_anchors(weights)
        self._restrict(self._weights())
        self._set("frozen", True)

    def _restrict(self, weights: Sequence[Weight]) -> None:
        """Zero weights and zero momentum off the support."""
        for weight in weights:
            weight.restrict(weight.shard)
            self._moments.restrict(weight.state, weight.mask())

    @torch.no_grad()
    def finalize(self) -> dict[str, Tensor]:
        """Makes the weights sparse, exactly, if they are not yet, and returns the masks by name.

        Warns if the run did not have `total_steps` steps, the length of its schedules.
        """
        wrong = self.timeline.wrong_length(self._calls)
        if wrong:
            _warn(f"finalize() {wrong}", 4)
        self.freeze()
        return self.masks()

    def masks(self) -> dict[str, Tensor]:
        """The current support of every pruned weight, by name: boolean, of its shape, sharded as it is."""
        self._begin()
        return {weight.name: sharded_like(weight.parameter, weight.mask()) for weight in self._weights()}

    @contextmanager
    def projected(self) -> Generator[None]:
        """Within it the pruned weights are zero off the current support, to evaluate them; restores them afterwards."""
        self._begin()
        before = [(weight, weight.shard.clone()) for weight in self._weights()]
        for weight, _ in before:
            weight.restrict(weight.shard)
        try:
            yield
        finally:
            for weight, x in before:
                weight.shard.copy_(x)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues exactly where the saved optimizer was; `history` starts anew. Tensors are copied.

        Raises:
            UserError: it was saved by another kind of optimizer, for parameters of other shapes, or with other weights
                to prune, other formats or another score than this one has.
            ValueError: it has other groups.

        This optimizer is then unchanged.
        """

        def check(saved: dict[str, Any]) -> None:
            check_saved(saved, self.param_groups, self._weights(), self._splittings.values())

        def finish(saved: dict[str, Any]) -> None:
            copy_saved(saved, self.param_groups, self.state, self._anchors, self._moments)
            self.history = []

        with load_atomically(self, check, finish):
            super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, at any time: pruned where the group has a `sparsity`, `pattern` or `constraint` of its own,
        from the current step of the schedules on, and dense otherwise.

        Raises:
            UserError: the parameters cannot be pruned so; a pruned weight has the name of another.
            ValueError: a parameter is in another group already.
        """
        if "_splittings" not in vars(self):  # torch's constructor adds the groups that were prepared for it
            super().add_param_group(param_group)
            return
        group, support = group_of(param_group, GroupTarget(scope=self._scope))
        number, others = len(self.param_groups), self.param_groups
        check_adam({**self.defaults, **group})
        unify_names(group, number, others)
        super().add_param_group(group | {name: others[0][name] for name in _PROGRESS})
        if support is None:
            return
        self._splittings[number] = self._splitting(support)
        try:
            check_names(self._weights())
        except UserError:
            del self._splittings[number], self.param_groups[number]
            raise

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles: as for torch's optimizers, everything except the hooks."""
        return {**super().__getstate__(), **{name: vars(self)[name] for name in _OWN}}

    def _splitting(self, support: Support) -> Splitting:
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return Splitting(support, self.penalty, self.score, self._anchors, self._moments, self.seed, processes)

    def _pruned(self) -> Iterator[tuple[Splitting, dict[str, Any], list[Weight]]]:
        """Every group that is pruned: its splitting, its settings, its weights. A tensor without entries has no
        support."""
        index = 0
        for number, group in enumerate(self.param_groups):
            splitting = self._splittings.get(number)
            if splitting is not None:
                weights: dict[Tensor, Weight] = {}
                for i, (name, p) in enumerate(zip(names_of(group, number), group["params"], strict=True)):
                    if p.numel() and p not in weights:
                        weights[p] = Weight(
                            name, index + i, p, self.state[p], name in self._transposed, name in self._stacked
                        )
                if weights:
                    yield splitting, group, list(weights.values())
            index += len(group["params"])

    def _weights(self) -> list[Weight]:
        return [weight for _, _, weights in self._pruned() for weight in weights]

    def _begin(self, *, restrict: bool = True) -> None:
        """Allocates the state of parameters that have none yet, from the weights as they are now.

        Args:
            restrict: makes these weights zero off their first support, where x = z from the start.
        """
        fresh = {p: group for group in self.param_groups for p in group["params"] if not self.state.get(p)}
        if not fresh:
            return
        for parameter, group in fresh.items():
            self._moments.create(parameter, self.state[parameter], fused=bool(group["fused"]))
        fixed = self.frozen or self.timeline.frozen_throughout
        fraction = 1.0 if self.frozen else self._fraction(self.timeline.updated(self._calls))
        for splitting, _, weights in self._pruned():
            new = [weight for weight in weights if weight.parameter in fresh]
            if new:
                splitting.begin(new, fraction, self._masks, fixed=fixed, anchored=not (fixed or self.hard))
            if restrict and (fixed or self.hard):
                self._restrict(new)
        self._masks = {}
        self._set("frozen", fixed)

    def _prepare_gradients(
        self, active: Sequence[Tensor], each: Tensor, norm: float, deferred: DeferredGradient | None
    ) -> None:
        """Clips, then adds the penalty; or the other way round."""
        factor = 1.0 if self.clip is None or self.clip_penalty else clip(active, norm, self.clip, deferred)
        squares = dict(zip(active, each.double().mul_(factor).square_().tolist(), strict=True))
        progress = self.timeline.progress(self.timeline.updated(self._calls))
        for splitting, _, weights in () if self.frozen else self._pruned():
            for weight in weights:
                if weight.parameter in squares:
                    splitting.observe(weight, squares[weight.parameter], progress)
                    if not (self.penalty.decoupled or self.hard):
                        splitting.add_penalty(weight, deferred)
        if self.clip is not None and self.clip_penalty:
            clip(active, total_norm(active)[1], self.clip)

    def _step_adam(self, deferred: DeferredGradient | None) -> None:
        index = 0
        for group in self.param_groups:
            active = [(index + i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
            self._moments.step(
                [parameter for _, parameter in active],
                [self.state[parameter] for _, parameter in active],
                group,
                [(self.seed, self.steps_done, number) for number, _ in active],
                deferred,
            )
            index += len(group["params"])
        if self.penalty.decoupled and not (self.frozen or self.hard):
            for splitting, group, weights in self._pruned():
                for weight in weights:
                    if weight.parameter.grad is not None:
                        splitting.pull(weight, float(group["lr"]), self.steps_done)

    def _advance(self) -> None:
        """Counts the step; updates the duals, or freezes, where that is due. The schedule counts skipped steps too."""
        step = self._calls
        self._set("steps_done", self.steps_done + 1)
        if step == self.timeline.total_steps:
            _warn(f"step() {self.timeline.wrong_length(step + 1)}", 6)
        if self.frozen:
            return
        if step + 1 >= (self.timeline.freeze_at or math.inf):
            self.freeze()
        elif self.timeline.due(step):
            fraction = self._fraction(step)
            if self.hard:
                self._reselect(fraction)
            else:
                self._update_duals(step, fraction)

    def _reselect(self, fraction: float) -> None:
        """Sets the supports to the largest scores of the weights themselves."""
        for splitting, _, weights in self._pruned():
            splitting.reselect(weights, fraction)
        self._restrict(self._weights())

    def _update_duals(self, step: int, fraction: float) -> None:
        updates: dict[str, WeightUpdate] = {}
        for splitting, _, weights in self._pruned():
            updates |= splitting.update(weights, step, self.timeline.progress(step), fraction)
        self.history.append(
            DualUpdate(step=self.steps_done, gradient_norm=self._norm, skipped=self.skipped, weights=updates)
        )

    def _fraction(self, step: int) -> float:
        """Of the final sparsity, for a support that is selected after Adam's step `step`."""
        fraction = self.param_groups[0]["fraction"]
        return self.timeline.fraction(step) if fraction is None else float(fraction)

    def _set(self, name: str, value: float | bool) -> None:
        for group in self.param_groups:
            group[name] = value


def _warn(message: str, level: int) -> None:
    """A warning to the caller of a method, which torch wraps: `level` frames up."""
    warnings.warn(message, UserWarning, stacklevel=level)
