"""What a process is set to for its own products has no part in a solve, and is as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from admm_prune import ADMM, LayerReconstruction, Unstructured
from admm_prune.ops import precision
from admm_prune.problems.constraints import Groups
from admm_prune.problems.structured_groups import GroupReconstruction
from admm_prune.solvers import reference
from tests.catalogue import SOLVERS, correlated_inputs, random_weight

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def settings() -> list[str]:
    """All that there is to read; an error of torch's, where old and new names contradict each other."""
    try:
        old_name = torch.get_float32_matmul_precision()
    except RuntimeError:
        old_name = "contradicted"
    autocast = [f"autocast {torch.is_autocast_enabled(device)}" for device in ("cpu", "cuda")]
    return [old_name, CUDA.fp32_precision, CPU.fp32_precision, torch.backends.fp32_precision, *autocast]


def by_old_name() -> None:
    torch.set_float32_matmul_precision("medium")


def allow_tf32() -> None:
    CUDA.allow_tf32 = True


def by_new_names() -> None:
    CUDA.fp32_precision, CPU.fp32_precision = "tf32", "bf16"


def for_everything() -> None:
    torch.backends.fp32_precision = "tf32"


WAYS = [by_old_name, allow_tf32, by_new_names, for_everything]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def set_low(request: pytest.FixtureRequest) -> Generator[Callable[[], None]]:
    yield request.param
    torch.set_float32_matmul_precision("highest")
    for place in (torch.backends, CUDA, CPU):
        place.fp32_precision = "none"


class Observed(LayerReconstruction):
    """A layer problem that writes down what the process was set to whenever its Hessian was asked for."""

    def __init__(self, *arguments, **named) -> None:
        self.seen: list[tuple[str, str, bool]] = []
        super().__init__(*arguments, **named)
        self.seen = []

    @property
    def hessian(self) -> Tensor:
        self.seen.append((CUDA.fp32_precision, CPU.fp32_precision, torch.is_autocast_enabled("cpu")))
        return super().hessian


def observed(constraint=None) -> Observed:
    x = correlated_inputs(96, 12, 0).float()
    return Observed(random_weight(5, 12, 0).float(), x.T @ x, constraint or Unstructured(0.5))


NAMES = [name for name in SOLVERS if name not in ("magnitude", "group mask", "group obs, one-shot")]


@pytest.mark.parametrize("name", NAMES)
def test_every_solver_multiplies_in_full(name) -> None:
    problem = observed(Groups(0.5, 2) if name.startswith("group") else None)
    by_old_name()
    try:
        before = settings()
        with torch.autocast("cpu"):
            SOLVERS[name]().solve(problem)
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    inside = problem.seen
    assert inside
    assert all(cuda in precision._FULL and cpu in precision._FULL and not autocast for cuda, cpu, autocast in inside)


@pytest.mark.parametrize("make", [reference.GroupExact, reference.BruteForce], ids=lambda make: make.__name__)
def test_so_do_references(make, set_low) -> None:
    from admm_prune import NofM, RowWise

    problem = observed(NofM(2, 4) if make is reference.GroupExact else RowWise(0.5))
    set_low()
    make().solve(problem)
    assert problem.seen
    assert all(cuda in precision._FULL and cpu in precision._FULL for cuda, cpu, _ in problem.seen)


@pytest.mark.bitwise
def test_a_result_has_the_bits_that_it_has_without(set_low) -> None:
    """oneDNN may take bfloat16 for products of this size where the machine has them; a solve does not."""
    x = correlated_inputs(300, 128, 0).float()
    gram, weight = x.T @ x, random_weight(64, 128, 0).float()

    def solved() -> Tensor:
        problem = LayerReconstruction(weight, gram, Unstructured(0.6), cross_gram=gram * 1.01, target_energy=1.0)
        return ADMM(max_iterations=8).solve(problem).solution["weight"]

    expected = solved()
    set_low()
    before = settings()
    assert torch.equal(solved(), expected)
    assert settings() == before


def test_settings_come_back_after_an_error_and_from_within(set_low) -> None:
    set_low()
    before = settings()

    @contextmanager
    def failing() -> Generator[None]:
        with precision.full(), precision.full():
            assert CUDA.fp32_precision in precision._FULL
            assert CPU.fp32_precision in precision._FULL
            yield
        raise AssertionError("not reached")

    with pytest.raises(ZeroDivisionError), failing():
        raise ZeroDivisionError
    assert settings() == before
    torch.backends.fp32_precision = "ieee"  # what is inherited still is
    if before[3] == "tf32":
        assert CUDA.fp32_precision == CPU.fp32_precision == "ieee"


def test_what_is_in_full_already_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: pytest.fail("it was set"))
    with precision.full():
        pass


@pytest.mark.gpu
def test_a_gpu_does_not_take_tf32(set_low) -> None:
    """A solve and its float32 products, bit for bit; a plain product shows that the setting has force."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2048, 512, generator=g).cuda(), torch.randn(512, 512, generator=g).cuda()
    gram = x.T @ x
    problem = LayerReconstruction(weight, (gram + gram.T) / 2, Unstructured(0.7))
    expected, plain = ADMM().solve(problem).solution["weight"], weight @ gram
    set_low()
    assert torch.equal(ADMM().solve(problem).solution["weight"], expected)
    assert not torch.equal(weight @ gram, plain)


def test_group_problems(set_low) -> None:
    """What structured pruning reads of a group problem outside of a solver."""
    from admm_prune.methods.struprune import selectors

    x = correlated_inputs(96, 12, 0).float()
    problem = GroupReconstruction(random_weight(5, 12, 0).float(), x.T @ x, Groups(0.5, 2))
    expected = selectors.losses(problem, 2, "obs", compensate=True)
    set_low()
    before = settings()
    assert torch.equal(selectors.losses(problem, 2, "obs", compensate=True), expected)
    assert settings() == before
