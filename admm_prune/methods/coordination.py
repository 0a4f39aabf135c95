"""Joint pruning of the value and output projections of an attention module, starting from both pruned alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.errors import UserError
from admm_prune.methods.base import LayerReport, Task
from admm_prune.methods.local import Method
from admm_prune.methods.part_checks import Checked
from admm_prune.models.attention import AttentionViews, ModelMixing, attention_of
from admm_prune.models.capture import BlockStream
from admm_prune.models.structure import Block, WeightView
from admm_prune.ops.precision import at_least_float32
from admm_prune.point import Point
from admm_prune.problems.attention import AttentionOutput, AttentionTokens
from admm_prune.problems.layer import DEFAULT_DAMPING, DEFAULT_RIDGE, LayerReconstruction
from admm_prune.result import Status
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.base import Solver
from admm_prune.statistics import GramAccumulator

ROUNDS = 1  # of the alternation between the two projections: a second one did not lower the error on validation tokens
ITERATIONS = 10  # of conjugate gradients in each of its least-squares fits


@dataclass(frozen=True)
class DenseAttention:
    """The value and output projections of a block before they are pruned, with their inputs and outputs.

    Attributes:
        views: the projections in the model.
        weights: copies of their dense matrices, "value" and "output", in at least float32.
        biases: copies of their biases, if they have one.
        pairs: for each part of the text, the inputs (n, d) of the value projection and the outputs (n, m) of the output
            projection.
    """

    views: AttentionViews
    weights: Point
    biases: Mapping[str, Tensor]
    pairs: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, stream: BlockStream, index: int, block: Block) -> DenseAttention:
        """Reads the projections of a block that is still dense.

        Raises:
            UserError: the block has no attention module whose value and output projections can be identified.
        """
        views = attention_of(block, stream.states(index)["calibration"], index)
        both = {"value": views.value, "output": views.output}
        weights = Point({name: at_least_float32(view.read()) for name, view in both.items()})
        biases = {name: at_least_float32(view.bias.detach()) for name, view in both.items() if view.bias is not None}
        return cls(views, weights, biases, stream.pairs(index, (views.value, views.output)))

    @property
    def names(self) -> set[str]:
        """The names of both projections."""
        return {self.views.value.name, self.views.output.name}

    def prunes(self, names: Collection[str]) -> bool:
        """Whether both projections are among these names of matrices."""
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

        The target is the output of the dense attention module; the attention probabilities are those of the pruned
        queries and keys. The alternation starts from both matrices pruned separately on the same tokens, and its
        solution is rejected unless it lowers the error on validation tokens, and is finite in the dtype of the model.

        Args:
            reports: of the matrices, pruned separately.

        Returns:
            The updated reports, and the errors before and after as JSON values.
        """
        views = {"value": self.views.value, "output": self.views.output}
        by_name = {report.name: report for report in reports}
        constraints = {name: method.constraint(task.target.of_pruned(view.name)) for name, view in views.items()}
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
        bias = None if self.views.output.bias is None else result.solution.get("bias")
        fits = views["value"].fits(result.solution["value"]) and views["output"].fits(result.solution["output"], bias)
        figures: dict[str, Any] = {"alone": alone, "together": together, "accepted": fits and together < alone}
        if not fits:
            figures["status"] = Status.NONFINITE.name
        if not figures["accepted"]:
            return list(reports), figures
        for name, view in views.items():
            view.write(result.solution[name])
        if bias is not None:
            self.views.output.write_bias(bias)
        names = {view.name: view for view in views.values()}
        return [
            renewed(report, names.get(report.name), "value and output projections together") for report in reports
        ], figures

    def _tokens(self, stream: BlockStream, index: int, block: Block, part: str) -> AttentionTokens:
        return AttentionTokens(*self.pairs[part], ModelMixing(block, self.views, stream.states(index)[part], index))

    def _alone(self, problem: AttentionOutput, solver: Solver) -> Point:
        """Both matrices pruned separately, as layers on the calibration tokens: the output projection on the dense
        values, and with its dense bias."""
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
    """The report of a matrix that was changed again: its errors and its bound as a layer no longer apply.

    Args:
        view: the matrix; None if it was not changed.
        note: what changed it.
    """
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


def damping_of(report: LayerReport) -> tuple[float, float]:
    """The ridge and damping with which the matrix was pruned, or the defaults if its solver only scores weights."""
    if report.ridge or report.damping:
        return report.ridge or 0.0, report.damping or 0.0
    return DEFAULT_RIDGE, DEFAULT_DAMPING
