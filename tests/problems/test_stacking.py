"""Weights that share their inputs, solved as one, against the same weights solved one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from admm_prune.data.sequences import Sequences
from admm_prune.methods.base import LayerReport, Task
from admm_prune.methods.layerwise import prune_shared
from admm_prune.methods.local import LOCAL_METHODS, Method
from admm_prune.methods.target import Target
from admm_prune.models.inputs import SharedInput
from admm_prune.models.structure import WeightView
from admm_prune.statistics import LayerStatistics
from tests.catalogue import correlated_inputs, random_weight

WIDTH = 48
SIZES = {"q": (48, 1.0), "k": (16, 0.3), "v": (16, 3.0)}  # rows, scale: no weight may pay for another
TEXT = Sequences((), "windows", 8, None, 1)
TARGETS = [Target(0.5), Target(0.7), Target(0.9), Target(None, (2, 4))]


def pruned(method: Method, target: Target) -> tuple[dict[str, Tensor], dict[str, LayerReport]]:
    tokens = correlated_inputs(400, WIDTH, 3, torch.float32)
    linears = {name: nn.Linear(WIDTH, rows, bias=False) for name, (rows, _) in SIZES.items()}
    for seed, (name, (rows, scale)) in enumerate(SIZES.items()):
        linears[name].weight.data = scale * random_weight(rows, WIDTH, seed, torch.float32)
    views = tuple(WeightView(name, linear) for name, linear in linears.items())
    statistics = LayerStatistics(tokens.T @ tokens, len(tokens), tokens[:60].T @ tokens[:60], 60)
    reports = prune_shared(SharedInput(views, statistics), method, Task(target=target, calibration=TEXT))
    return {view.name: view.read() for view in views}, {report.name: report for report in reports}


@pytest.mark.bitwise
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", LOCAL_METHODS)
def test_a_stacked_solve_is_that_of_each_weight_within_its_own_budget(name: str, target: Target) -> None:
    together, stacked = pruned(replace(LOCAL_METHODS[name], stacks=True), target)
    alone, separate = pruned(replace(LOCAL_METHODS[name], stacks=False), target)
    assert list(stacked) == list(separate) == list(SIZES)
    for weight in SIZES:
        assert stacked[weight].sparsity == separate[weight].sparsity
        assert stacked[weight].shape == tuple(together[weight].shape)
        assert stacked[weight].relative_error == pytest.approx(separate[weight].relative_error, rel=0.01)
        if name in ("magnitude", "wanda", "sparsegpt"):
            assert torch.equal(together[weight] != 0, alone[weight] != 0)
            assert torch.allclose(together[weight], alone[weight], rtol=1e-4, atol=1e-6)


def test_seconds_are_shared_out_and_errors_are_each_weights_own() -> None:
    weights, reports = pruned(LOCAL_METHODS["admm"], Target(0.7))
    assert LOCAL_METHODS["admm"].stacks
    assert reports["q"].seconds == pytest.approx(3 * reports["k"].seconds)
    assert reports["k"].seconds == pytest.approx(reports["v"].seconds)
    assert len({report.iterations for report in reports.values()}) == 1
    tokens = correlated_inputs(400, WIDTH, 3, torch.float32).double()
    for seed, (name, (rows, scale)) in enumerate(SIZES.items()):
        dense = scale * random_weight(rows, WIDTH, seed, torch.float32).double()
        lost = (tokens @ (weights[name].double() - dense).T).square().sum() / (tokens @ dense.T).square().sum()
        assert reports[name].relative_error == pytest.approx(lost.item(), rel=1e-5)


def test_every_local_method_that_factors_a_gram_stacks() -> None:
    assert [name for name, method in LOCAL_METHODS.items() if not method.stacks] == ["magnitude", "wanda"]
