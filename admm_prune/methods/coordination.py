"""Value and output projections of a block as a single problem, which improves on both pruned alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.errors import UserError
from admm_prune.methods.base import LayerReport, Task
from admm_prune.methods.local import Method
from admm_prune.methods.part_checks import Checked
from admm_prune.models.attention import AttentionViews, ModelMixing, attention_of
from admm_prune.models.capture import BlockStream
from admm_prune.models.structure import Block, WeightView
from admm_prune.point import Point
from admm_prune.problems.attention import AttentionOutput, AttentionTokens
from admm_prune.problems.constraints import SparseSet
from admm_prune.problems.layer import DEFAULT_DAMPING, DEFAULT_RIDGE, LayerReconstruction
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.base import Solver
from admm_prune.statistics import GramAccumulator

ROUNDS, ITERATIONS = 2, 15  # of the alternation, and of conjugate gradients in each of its fits


@dataclass(frozen=True)
class DenseAttention:
    """The value and output projections of a block before they are pruned, with what enters and leaves them.

    Attributes:
        pairs: inputs (n, d) of the value projection and outputs (n, m) of the output projection, by the part of the
            text.
    """

    views: AttentionViews
    weights: Point
    biases: Mapping[str, Tensor]
    pairs: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, stream: BlockStream, index: int, block: Block) -> DenseAttention:
        """Reads a block that is not pruned yet.

        Raises:
            UserError: it has no attention whose value and output projections can be found.
        """
        views = attention_of(block, stream.states(index)["calibration"], index)
        both = {"value": views.value, "output": views.output}
        weights = Point({name: _wide(view.read()) for name, view in both.items()})
        biases = {name: _wide(view.bias.detach()) for name, view in both.items() if view.bias is not None}
        return cls(views, weights, biases, stream.pairs(index, (views.value, views.output)))

    @property
    def names(self) -> set[str]:
        """Of both projections."""
        return {self.views.value.name, self.views.output.name}

    def prunes(self, names: Collection[str]) -> bool:
        """Whether both projections are among the matrices of these names."""
        return self.names <= set(names)

    def coordinated(
        self,
        stream: BlockStream,
        index: int,
        block: Block,
        reports: Sequence[LayerReport],
        method: Method,
        task: Task,
    ) -> tuple[list[LayerReport], dict[str, Any]]:
        """Replaces the pruned value and output projections of a block by the solution of `AttentionOutput`, in place.

        The target is the dense output of the attention; the probabilities are those of the pruned queries and keys.
        The alternation starts at both matrices pruned alone, on the same tokens. Its
        solution is rejected unless it lowers the error on validation tokens.

        Args:
            reports: of the matrices pruned alone.

        Returns:
            The reports, and the figures, JSON values.
        """
        views = {"value": self.views.value, "output": self.views.output}
        by_name = {report.name: report for report in reports}
        constraints = {name: _set(view, method, task) for name, view in views.items()}
        problem = AttentionOutput(
            self.weights,
            self._tokens(stream, index, block, "calibration"),
            constraints,
            biases=self.biases,
            validation=self._tokens(
                stream, index, block, "validation" if "validation" in self.pairs else "calibration"
            ),
            damped={name: damping_of(by_name[view.name]) for name, view in views.items()},
            max_iterations=ITERATIONS,
        )
        solver = Checked.of(method.make())
        try:
            start = self._alone(problem, solver)
            result = Alternating(inner=solver, max_iterations=ROUNDS).solve(problem, start=start)
        except (ValueError, LinAlgError) as error:
            raise UserError(f"{views['value'].name}, {views['output'].name}: {error}") from error
        alone, together = problem.validation_loss(start), problem.validation_loss(result.solution)
        figures = {"alone": alone, "together": together, "accepted": together < alone}
        if not together < alone:
            return list(reports), figures
        for name, view in views.items():
            view.write(result.solution[name])
        if "bias" in result.solution and self.views.output.bias is not None:
            self.views.output.bias.data.copy_(result.solution["bias"])
        names = {view.name: view for view in views.values()}
        return [
            renewed(report, names.get(report.name), "value and output projections together") for report in reports
        ], figures

    def _tokens(self, stream: BlockStream, index: int, block: Block, part: str) -> AttentionTokens:
        return AttentionTokens(*self.pairs[part], ModelMixing(block, self.views, stream.states(index)[part], index))

    def _alone(self, problem: AttentionOutput, solver: Solver) -> Point:
        """Both pruned as layers on the calibration tokens, the output on dense values and with its dense bias."""
        dense = problem.initial()
        gram = GramAccumulator(dense["value"].shape[1], dense["value"].device)
        gram.add(self.pairs["calibration"][0])
        grams = {"value": gram.gram.to(dense["value"]), "output": problem.head_moments(dense)}
        pruned = {}
        for name, one in grams.items():
            ridge, damping = problem.damped[name]
            layer = LayerReconstruction(dense[name], one, problem.constraints[name], ridge=ridge, damping=damping)
            pruned[name] = solver.solve(layer).solution["weight"]
        return Point({**dense, **pruned})


def renewed(report: LayerReport, view: WeightView | None, note: str) -> LayerReport:
    """The report of a matrix whose weights were fitted again: its errors and its bound as a layer no longer apply."""
    if view is None:
        return report
    return replace(
        report,
        sparsity=Point(weight=view.read()).sparsity(),
        relative_error=None,
        relative_error_validation=None,
        objective=None,
        bound=None,
        notes=(*report.notes, f"fitted again: {note}"),
    )


def _set(view: WeightView, method: Method, task: Task) -> SparseSet:
    target = task.target.at(view.name)
    assert target is not None, f"{view.name} is not among the weights to prune"
    return method.constraint(target)


def damping_of(report: LayerReport) -> tuple[float, float]:
    """Those of the matrix alone; the defaults where its solver only scores weights."""
    if report.ridge or report.damping:
        return report.ridge or 0.0, report.damping or 0.0
    return DEFAULT_RIDGE, DEFAULT_DAMPING


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
