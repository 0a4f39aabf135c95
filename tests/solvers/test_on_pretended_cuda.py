"""Every tensor that a solve makes is on the device of its problem: on a CUDA device that is only pretended."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from admm_prune import ADMM, LayerReconstruction, NofM, RowWise, SparseAdam, Unstructured
from admm_prune.ops import backend, integer_energy, packed, quadratic
from admm_prune.problems.constraints import SparseSet, StackedRows
from admm_prune.solvers.base import Solver
from admm_prune.solvers.exchange_search import ExchangeSearch
from admm_prune.solvers.local_search import LocalSearch
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.one_shot import Wanda
from admm_prune.solvers.refit import Refit
from admm_prune.statistics import GramAccumulator, LayerStatistics, TargetAccumulator
from admm_prune.testing.instances import correlated_inputs, random_weight
from tests.pretended_cuda import OnDevice, pretended

SETS: dict[str, SparseSet] = {
    "70%": Unstructured(0.7),
    "rows": RowWise(0.45),
    "2:4": NofM(2, 4),
    "stacked": StackedRows(((2, NofM(2, 4)), (4, RowWise(0.5)))),
}
SOLVERS: dict[str, Solver] = {
    "admm": ADMM(max_iterations=6),
    "sparsegpt": SparseGPT(block=8),
    "exact refit": Refit(SparseGPT(block=8, mask_scope="layer"), exact=True),
    "local search": LocalSearch(ADMM(max_iterations=2)),
    "exchange search": ExchangeSearch(ADMM(max_iterations=2)),
}


CASES = [(name, target) for name in SOLVERS for target in SETS if (name, target) != ("local search", "stacked")]


@pytest.fixture(params=["triton", "torch"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those of a card that is slow in float64."""
    if request.param == "triton" and not backend.interpreted():
        pytest.skip("Triton's interpreter is off")
    with backend.forced(request.param if request.param == "torch" else "auto"), pretended((8, 9)):
        yield request.param


def problem(constraint: SparseSet, seed: int = 0) -> LayerReconstruction:
    x = correlated_inputs(100, 16, seed).float()
    return LayerReconstruction(random_weight(6, 16, seed).float().to("cuda"), (x.T @ x).to("cuda"), constraint)


def test_what_is_mixed_is_refused(kernels) -> None:
    x = torch.ones(3).to("cuda")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    assert isinstance(x[1:] * 2.0, OnDevice)
    assert not isinstance(x.cpu(), OnDevice)


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("name", "target"), CASES)
def test_a_solve(kernels, name, target) -> None:
    task = problem(SETS[target])
    result = SOLVERS[name].solve(task)
    assert isinstance(result.solution["weight"], OnDevice)
    assert 0 < task.relative_error(result.solution) < 1


def test_a_batch(kernels) -> None:
    results = ADMM(max_iterations=3).solve_all([problem(SETS["70%"], seed) for seed in range(2)])
    assert all(isinstance(result.solution["weight"], OnDevice) for result in results)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(kernels, dtype, centre) -> None:
    x = correlated_inputs(700, 40, 0).to(dtype).to("cuda")
    first, second = (GramAccumulator(40, "cuda", centre=centre) for _ in range(2))
    first.add(x, lengths=[512, 20, 3, 165])
    first.add(x, torch.ones(700).to("cuda"))
    second.add(x[:100])
    target = TargetAccumulator(8, 40, "cuda", centre=centre)
    target.add(x, x[:, :8])
    statistics = LayerStatistics.collected(first, second, centre=centre)
    assert isinstance(statistics.gram, OnDevice)
    assert statistics.dead_channels.numel() == 0


def test_an_energy_by_integers(kernels, monkeypatch) -> None:
    monkeypatch.setattr(integer_energy, "_NARROWEST", 64)
    x = correlated_inputs(200, 97, 0).float()
    a, v = x.T @ x, random_weight(70, 97, 0).float()
    assert integer_energy.preferred(v.to("cuda"), a.to("cuda"))
    assert quadratic.energy(v.to("cuda"), a.to("cuda")) == pytest.approx(quadratic.energy(v, a), rel=1e-9)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("how", [{}, {"penalty": math.inf, "ramp": 1.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training(kernels, how, dtype) -> None:
    weights = [torch.nn.Parameter(torch.randn(shape).to(dtype).to("cuda")) for shape in ((32, 160), (7,))]
    optimizer = SparseAdam(weights[:1], sparsity=0.5, lr=1e-2, interval=2, first_update=1, total_steps=4, **how)
    optimizer.add_param_group({"params": weights[1:]})
    for _ in range(4):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, device="cuda").to(dtype)
        optimizer.step()
    (mask,) = optimizer.finalize().values()
    assert isinstance(mask, OnDevice)
    assert int(mask.sum()) == weights[0].numel() // 2


def test_a_packed_product(kernels) -> None:
    w, x = random_weight(19, 64, 0).float(), torch.ones(3, 64)
    w[:, ::3] = 0
    y = packed.linear(x.to("cuda"), packed.pack(w.to("cuda")))
    torch.testing.assert_close(y.cpu(), x @ w.T)


def test_wanda_in_float64(kernels) -> None:
    task = problem(SETS["70%"])
    wide = LayerReconstruction(task.weight.double(), task.gram.double(), task.constraint)
    weight = Wanda().solve(wide).solution["weight"]
    assert isinstance(weight, OnDevice)
    on_host = LayerReconstruction(task.weight.double().cpu(), task.gram.double().cpu(), task.constraint)
    assert torch.equal(weight.cpu(), Wanda().solve(on_host).solution["weight"])
