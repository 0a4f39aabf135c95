"""Steps that are replayed, with a recorder that does on the CPU what CUDA graphs do.

It records operations with the tensors that they read and wrote, refuses what a device would have to be asked for, and
plays them back on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from admm_prune import ADMM, LayerReconstruction, NofM, RowWise, Unstructured
from admm_prune.ops import backend
from admm_prune.ops.backend import Replayed
from admm_prune.problems.constraints import SparseSet, StackedRows
from admm_prune.result import Result
from admm_prune.solvers.schedules import Constant
from admm_prune.testing.instances import correlated_inputs, random_weight
from admm_prune.testing.supports import OnlyProximable

_ASKING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}


class Recording(TorchDispatchMode):
    """Operations, with the very tensors that they were given and gave; memory from before is put back at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in _ASKING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.made and storage.data_ptr() not in self.before:
                    whole = torch.empty(0, dtype=x.dtype).set_(storage)
                    self.before[storage.data_ptr()] = (whole, whole.clone())
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.before:
                self.made[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held: an address is used once
        self.calls.append((func, args, kwargs, out))
        return out

    def play(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Emulated:
    """A recorder of the CPU."""

    def __init__(self) -> None:
        self.recorded, self.played = 0, 0

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        recording = Recording()
        try:
            with recording:
                returned = function()
        finally:
            for whole, kept in recording.before.values():
                whole.copy_(kept)
        tree_map(lambda x: x.fill_(-1) if isinstance(x, Tensor) else x, returned)  # not done yet: nothing is known
        self.recorded += 1

        def play() -> None:
            self.played += 1
            recording.play()

        return play, returned


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """On the CPU, treated as a device that the host does not wait for."""
    emulated = Emulated()
    monkeypatch.setitem(backend.RECORDERS, "cpu", emulated)
    monkeypatch.setattr(backend, "on_device", lambda x: True)
    return emulated


def problem(constraint: SparseSet, seed: int = 0, dtype: torch.dtype = torch.float32) -> LayerReconstruction:
    x = correlated_inputs(80, 16, seed, torch.float64)
    return LayerReconstruction(random_weight(6, 16, seed, torch.float64).to(dtype), (x.T @ x).to(dtype), constraint)


def same(ours: Result, theirs: Result) -> None:
    assert torch.equal(ours.solution["weight"], theirs.solution["weight"])
    assert [(p.iteration, p.primal_residual, p.support_changes, p.rho) for p in ours.history] == [
        (p.iteration, p.primal_residual, p.support_changes, p.rho) for p in theirs.history
    ]
    assert (ours.status, ours.iterations, ours.objective) == (theirs.status, theirs.iterations, theirs.objective)


SETS: dict[str, SparseSet] = {
    "2:4": NofM(2, 4),
    "rows": RowWise(0.5),
    "one budget": Unstructured(0.7),
    "stacked": StackedRows(((3, NofM(2, 4)), (3, RowWise(0.5)))),
}


@pytest.fixture
def no_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """One budget over a matrix that fits in a row, chosen as a device does: the plain search asks for counts."""
    from admm_prune.ops import selection

    monkeypatch.setattr(selection, "largest", lambda s, k: selection.largest_per_row(s.reshape(1, -1), k).view(s.shape))


@pytest.mark.usefixtures("no_asking")
@pytest.mark.parametrize("target", SETS)
@pytest.mark.parametrize(
    ("solver", "recorded", "played"),
    [
        (ADMM(), 1, 7),  # 8 penalties, the first of which loads all
        (ADMM(max_iterations=22), 2, 5),  # the last two steps are less than a penalty
        (ADMM(penalty=Constant(1.0), max_iterations=12), 1, 11),  # one penalty for all: step by step
        (ADMM(freeze_after=10, max_iterations=20), 2, 2),  # with a choice of the support, and without
        (ADMM(objective_every=2, max_iterations=12), 1, 11),  # likewise
        (ADMM.gradual(), 0, 0),
    ],
    ids=["default", "a part", "constant", "frozen", "looked at", "ramp"],
)
def test_what_is_played_back_has_the_same_bits(recorder, target, solver, recorded, played) -> None:
    expected = solver.solve(problem(SETS[target]))
    assert recorder.recorded == 0
    found = replace(solver, graphs=True).solve(problem(SETS[target]))
    same(found, expected)
    assert found.notes == expected.notes
    if solver.ramp is None:
        assert recorder.recorded == recorded
        assert recorder.played == played
    else:  # until the ramp is done every step has a sparsity of its own; the support rests from there
        assert 0 < recorder.played < solver.max_iterations - solver.ramp.over


@pytest.mark.usefixtures("no_asking")
def test_what_is_played_back_in_float64_has_the_same_bits(recorder) -> None:
    """The factor of u at a new penalty is stored in float64 too."""
    task = problem(SETS["rows"], dtype=torch.float64)
    same(ADMM(graphs=True).solve(task), ADMM().solve(task))
    assert recorder.played > 0


@pytest.mark.usefixtures("no_asking")
def test_a_batch_is_played_back_too(recorder) -> None:
    problems = [problem(Unstructured(0.7), seed) for seed in range(3)]
    expected = [ADMM().solve(one) for one in problems]
    for ours, theirs in zip(ADMM(graphs=True).solve_all(problems), expected, strict=True):
        same(ours, theirs)
    assert recorder.played == 7


@pytest.mark.usefixtures("no_asking")
def test_a_run_goes_on_exactly(recorder) -> None:
    task = problem(NofM(2, 4))
    part = ADMM(graphs=True, max_iterations=10).solve(task)
    assert part.state is not None
    assert part.state.inner.replayed is None  # its memory is let go
    assert not part.state.inner.ahead
    same(ADMM(graphs=True).solve(task, state=part.state), ADMM().solve(task))


def test_what_asks_the_device_cannot_be_recorded_and_says_so(recorder) -> None:
    """The plain search for one threshold reads counts: every step is done as it is, with the same numbers."""
    task = problem(Unstructured(0.7))
    found = ADMM(graphs=True).solve(task)
    same(found, ADMM().solve(task))
    assert recorder.recorded == recorder.played == 0
    (note,) = found.notes
    assert note.startswith("steps were not replayed: operation not permitted")


def test_where_there_are_no_graphs_it_says_so() -> None:
    task = problem(NofM(2, 4))
    found = ADMM(graphs=True).solve(task)
    same(found, ADMM().solve(task))
    assert found.notes == ("steps were not replayed: there are no graphs on the cpu",)


def test_a_proximal_operator_is_not_recorded_and_says_so(recorder) -> None:
    """It puts its answer where it likes."""
    task = OnlyProximable(problem(NofM(2, 4)))
    found = ADMM(graphs=True, max_iterations=8).solve(task)
    same(found, ADMM(max_iterations=8).solve(task))
    assert recorder.recorded == 0
    assert found.notes == ("steps were not replayed: a proximal operator is not recorded",)


def test_a_function_is_called_then_recorded_then_played(recorder) -> None:
    x, calls = torch.zeros(3), []

    def count() -> list[Tensor]:
        calls.append(len(calls))
        x.add_(1.0)
        return [x * 2]

    replayed = Replayed(count, torch.device("cpu"))
    seen = [replayed()[0].clone() for _ in range(4)]
    assert [y.tolist() for y in seen] == [[2.0 * n] * 3 for n in (1, 2, 3, 4)]
    assert calls == [0, 1]  # the second time it was recorded, which does nothing by itself
    assert (recorder.recorded, recorder.played, replayed.note) == (1, 3, "")


def test_a_recorder_that_breaks_off_leaves_nothing_done(recorder, monkeypatch) -> None:
    x = torch.zeros(3)

    def ask() -> list[Tensor]:
        x.add_(1.0)
        return [torch.full((1,), float(x.sum()))]

    replayed = Replayed(ask, torch.device("cpu"))
    assert [float(replayed()[0]) for _ in range(3)] == [3.0, 6.0, 9.0]
    assert "not permitted" in replayed.note


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["2:4", "rows", "one budget", "stacked"])
@pytest.mark.parametrize("shape", [(96, 128), (1000, 333)])
def test_on_a_gpu(target, shape) -> None:
    """The same bits with graphs as without, for a problem and for a batch; and no note: all was recorded."""
    rows, width = shape
    constraint = SETS[target]
    if target == "stacked":
        half = rows // 2
        constraint = StackedRows(((half, Unstructured(0.7)), (rows - half, RowWise(0.5))))
    elif target == "2:4" and width % 4:
        constraint = NofM(1, 3)
    tasks = []
    for seed in range(3):
        x = correlated_inputs(4 * width, width, seed).float()
        gram = (x.T @ x).cuda()
        tasks.append(LayerReconstruction(random_weight(rows, width, seed).float().cuda(), gram, constraint))
    for solver in (ADMM(), ADMM.fast(), ADMM(freeze_after=10), ADMM.gradual()):
        found, expected = replace(solver, graphs=True).solve(tasks[0]), solver.solve(tasks[0])
        same(found, expected)
        assert found.notes == expected.notes
    for ours, theirs in zip(ADMM(graphs=True).solve_all(tasks), ADMM().solve_all(tasks), strict=True):
        same(ours, theirs)


@pytest.mark.gpu
def test_on_a_gpu_a_recording_that_asks_is_given_up() -> None:
    x = torch.zeros(3, device="cuda")

    def ask() -> list[Tensor]:
        x.add_(1.0)
        return [torch.full((1,), float(x.sum()))]

    replayed = Replayed(ask, x.device)
    assert [float(replayed()[0]) for _ in range(4)] == [3.0, 6.0, 9.0, 12.0]
    assert replayed.note
    torch.cuda.synchronize()
