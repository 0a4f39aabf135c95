"""ELSA, surrogate-free pruning of a whole model by ADMM, and the list of all methods that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from admm_prune.errors import check_at_least, check_fractions
from admm_prune.methods.elsa.baselines import Gradual, Staged, TunedDense
from admm_prune.methods.elsa.session import Session
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.elsa.trainer import Trainer
from admm_prune.methods.target import Target
from admm_prune.solvers.elsa.anchors import AnchorFormat
from admm_prune.solvers.elsa.settings import Penalty, Score
from admm_prune.solvers.sparse_adam import SparseAdam


@dataclass(frozen=True, kw_only=True)
class Elsa(Staged):
    """min f(x) + I_C(z) over x = z, f the model's own loss, by ADMM with a dual variable u:

        at the stages            z <- argmin_{z in C_t} |z - x|_H^2, H the layers' Gram,   x <- z,   u <- 0;
        every step               x <- Adam's step with the gradient of f at x, then x <- x - lr rho (x - z + u);
        every `interval` steps   z <- P_{C_t}(x + u) in the metric F^(2 power),   u <- u + x - z,   F Adam's 2nd moment.

    C_t approaches C through a few larger sets, as in `Staged`, but x is dense between the stages: removed weights are
    trained too, and return to the support of z if their removal raises the loss more than that of others. In the last
    part of the run x is restricted to the support of one more update of z, and trained on it.

    Attributes:
        rho: the strength of the penalty. A weight whose distance from z - u equals the root mean square of the weights
            is pulled towards it by rho d^(3/2) steps of Adam, where d is the density of the target. With a strength
            that does not depend on d, few weights would return at low densities, or much of the support would change at
            every update at high ones.
        interval: the number of steps between two updates of z and u.
        power: weights of x + u are selected by |x + u| F^power.
        frozen: the fraction of the run, at its end, with x = z on a fixed support; 0 leaves x dense to the end.
        anchor: the format in which z and u are stored, see `SparseAdam`.

    Sources: ELSA, arXiv 2510.01650, 2026. The stages, the metric of the layers' Gram with its compensation, the
    penalty outside of Adam's moments and its unit, and the end on a fixed support are ours.
    """

    name: str = "elsa"
    summary: str = "surrogate-free: ADMM on the model's own loss, down to the target in stages"
    rho: float = 10.0
    interval: int = 1
    power: float = 0.5
    frozen: float = 0.5
    anchor: AnchorFormat = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, rho=0, interval=1, power=0)
        check_fractions(self, "frozen")

    def optimizer(self, how: dict[str, Any]) -> SparseAdam:
        penalty = Penalty(value=self.rho * self._density(how) ** 1.5, decoupled=True)
        score = Score(fisher="adam", power=self.power)
        return SparseAdam(**how, penalty=penalty, score=score, interval=self.interval, freeze=0.0, anchor=self.anchor)

    @staticmethod
    def _density(how: dict[str, Any]) -> float:
        n, m = how["pattern"] if "pattern" in how else (1.0 - how["sparsity"], 1)
        return float(n / m)

    def projections(self, target: Target) -> list[tuple[float, Target]]:
        """The stages before the last part of the run, and the projection at its beginning."""
        last = 1.0 - self.frozen
        stages = [stage for stage in super().projections(target) if stage[0] < last]
        return [*stages, (last, target)] if self.frozen else stages

    def remarks(self, trainer: Trainer) -> list[str]:
        notes = super().remarks(trainer)
        if self.frozen < 1 and len(trainer.optimizer.history) < 2:  # the last one is at the end
            notes.append(f"no update of z and u fits into {trainer.steps} steps of training: give more steps")
        return notes

    def project(self, session: Session, target: Target) -> None:
        """At a stage, sets x and z to the solution of the layer problems; at the last one, fixes the support of x."""
        trainer, final = session.trainer, session.task.target
        if self.frozen and trainer.done >= min(round((1.0 - self.frozen) * trainer.steps), trainer.steps - 1):
            self._fix_support(session, target)
            return
        stage = self.solve_layers(session, target)
        if str(target) == str(final):
            stage["held_out_loss"] = session.offer()
        names = dict.fromkeys(view.parameter_name for view in session.views)
        z = {name: session.trained.get_parameter(name).detach() for name in names}
        trainer.optimizer.restart(z, target.fraction / final.fraction if final.fraction else 1.0)

    def _fix_support(self, session: Session, target: Target) -> None:
        """Fixes the support of one more update of z, or of the solution of the layer problems if no stage has reached
        the target yet."""
        if all(stage["target"] != str(target) for stage in session.stages):
            super().project(session, target)
            return
        session.trainer.optimizer.freeze()
        stage = {"step": session.trainer.done, "target": str(target), "held_out_loss": session.offer()}
        session.stages.append(stage)


@dataclass(frozen=True, kw_only=True)
class Published(Trained):
    """ELSA as published, see `SparseAdam.faithful`: with an absolute learning rate without warm-up, and an absolute
    penalty."""

    name: str = "elsa-published"
    summary: str = "ELSA as published: penalty from 0 by a cosine, Fisher-weighted projections, no frozen end"
    warm_up: float = 0.0
    lr: float | None = 2e-4
    penalty: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, penalty=0)

    def optimizer(self, how: dict[str, Any]) -> SparseAdam:
        return SparseAdam.faithful(**how, total_steps=self.training_steps, penalty=self.penalty)


TRAINED: tuple[Trained, ...] = (
    Elsa(),
    Elsa(
        name="elsa-l",
        summary="elsa with Adam's moments, z and u in 8 bits: 3.2 bytes per weight for 12",
        moments="int8",
        anchor="int8",
    ),
    Published(),
    Staged(),
    Staged(
        name="admm-finetuned",
        summary="one-shot admm, then training on its support: the strongest baseline",
        distillation=0.0,
        schedule=None,
    ),
    Gradual(),
    TunedDense(),
)
