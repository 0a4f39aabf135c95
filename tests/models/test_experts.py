"""Mixtures of experts: tokens counted as the router sends them, the minimum-token rule, budgets of every expert."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_prune import ADMM, SparseAdam
from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.methods.base import Task
from admm_prune.methods.registry import recipe_named
from admm_prune.methods.ridge import GRID
from admm_prune.methods.target import Target
from admm_prune.models.capture import BlockStream
from admm_prune.models.experts import routed
from admm_prune.models.inputs import SharedInput
from admm_prune.models.structure import WeightView, decoder_blocks
from admm_prune.solvers import together
from tests.models.test_capture import near
from tests.models.tiny_models import build, expert_inputs, one_by_one


def mixture(family: str = "mixtral", *, starved: int | None = None) -> nn.Module:
    """Its routers never choose the starved expert."""
    model = build(family, layers=2)
    if starved is not None:
        for block in decoder_blocks(model):
            block.module.mlp.gate.register_forward_hook(avoiding(starved))
    return model


def avoiding(expert: int) -> Any:
    """Whatever the router of Mixtral says, the first two of the other experts are chosen."""
    others = torch.tensor([e for e in range(4) if e != expert][:2])

    def hook(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, choice = output
        return logits, weights, others.expand_as(choice)

    return hook


def collected(model: nn.Module, stories: Sequences, only: set[str] | None = None) -> dict[str, SharedInput]:
    stream = BlockStream(model, decoder_blocks(model), stories, "cpu", validation_fraction=0.3)
    return {shared.weights[0].name: shared for shared in stream.collect(0, only)}


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_tokens_are_those_that_the_router_sends(family: str, stories: Sequences) -> None:
    model = mixture(family)
    views = [view for view in decoder_blocks(model)[0].weights if view.expert is not None]
    sent = {view.name: len(expert_inputs(model, view, one_by_one(stories), everything=False)) for view in views}
    assert sum(sent.values()) == 2 * 2 * stories.tokens, "two matrices, two experts a token"
    found = collected(model, stories)
    for view in views:
        statistics = found[view.name].statistics
        enough = sent[view.name] >= view.shape[1]
        assert statistics.tokens == (sent[view.name] if enough else stories.tokens)
        assert (statistics.notes == ()) == enough


def test_an_expert_without_tokens_is_pruned_on_all_of_its_block_and_says_so(stories: Sequences) -> None:
    model = mixture(starved=3)
    name = "model.layers.0.mlp.experts.down_proj.3"
    view = next(view for view in decoder_blocks(model)[0].weights if view.name == name)
    x = expert_inputs(model, view, one_by_one(stories), everything=True).double()
    near(collected(model, stories)[name].statistics.gram, x.T @ x)
    near(collected(model, stories, {name})[name].statistics.gram, x.T @ x)
    outcome = recipe_named("wanda").prune(model, Task(target=Target(0.5), calibration=stories))
    reports = {report.name: report for report in outcome.layers}
    assert reports[name].tokens == stories.tokens
    assert any(
        note == f"the router sent this expert 0 tokens, fewer than its 24 inputs: "
        f"it was pruned on all {stories.tokens} tokens of the block"
        for note in reports[name].notes
    )
    fed = reports["model.layers.0.mlp.experts.down_proj.0"]
    assert fed.tokens == stories.tokens, "the router sends it everything"
    assert not any("router" in note for note in fed.notes)


def test_collecting_leaves_the_kernel_and_no_hook(stories: Sequences) -> None:
    model: Any = mixture()
    first, second = collected(model, stories), collected(model, stories)
    assert all(torch.equal(a.statistics.gram, second[name].statistics.gram) for name, a in first.items())
    assert model.config._experts_implementation == "grouped_mm"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_forward_of_the_module_itself_is_restored() -> None:
    """On the meta device the forward of experts is replaced while their inputs are observed."""
    model = build("mixtral").to("meta")
    views = {i: view for i, view in enumerate(decoder_blocks(model)[0].weights) if view.expert is not None}
    module: Any = next(iter(views.values())).module
    given = module.forward = partial(type(module).forward, module)
    with routed(views, lambda *_: None, lambda: torch.ones(1, dtype=torch.bool), everything=False):
        assert module.forward is not given
    assert module.forward is given


def test_experts_that_are_not_told_their_tokens_are_refused(stories: Sequences) -> None:
    model = mixture()
    for block in decoder_blocks(model):
        experts: Any = block.module.mlp.experts
        route = experts.forward
        experts.forward = lambda hidden, choice, weights, route=route: route(hidden, choice[0], weights)
        block.module.mlp.gate.register_forward_hook(lambda _, __, output: (*output[:2], output[2][None]))
    with pytest.raises(UserError, match=r"^model.layers.0.mlp.experts: it does not receive the tokens of each expert"):
        collected(model, stories)


@pytest.mark.parametrize("target", [{"sparsity": 0.75}, {"pattern": (1, 4)}], ids=str)
def test_every_expert_has_a_budget_of_its_own_in_training(target: dict[str, Any]) -> None:
    """Also where the weights of one expert are all larger than those of another."""
    model = mixture().requires_grad_(True)
    stacks = [p for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
    with torch.no_grad():
        for stack in stacks:
            stack[0] *= 100
    optimizer = SparseAdam(model, **target, lr=1e-4, total_steps=4, interval=1)
    for _ in range(4):
        logits = model(input_ids=torch.arange(12)[None]).logits
        logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finalize()
    for view in (view for block in decoder_blocks(model) for view in block.weights):
        assert int((view.read() == 0).sum()) >= 0.75 * view.read().numel(), view.name
    assert [int(stack[0].count_nonzero()) for stack in stacks] == [16 * 24 // 4] * 2
    routers = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    assert all(bool((p != 0).all()) for p in routers)


def test_a_view_of_an_expert_is_what_its_forward_multiplies_by() -> None:
    model: Any = mixture()
    experts = model.model.layers[0].mlp.experts
    x, choice, weight = torch.randn(3, 16), torch.full((3, 1), 2), torch.ones(3, 1)
    up, down = (WeightView("w", experts, attribute=name, expert=2).read() for name in ("gate_up_proj", "down_proj"))
    gate, value = (x @ up.T).chunk(2, dim=-1)
    torch.testing.assert_close(experts(x, choice, weight), (nn.functional.silu(gate) * value) @ down.T)


@pytest.mark.bitwise
@pytest.mark.parametrize(("ridge", "pattern"), [(None, None), ("auto", (2, 4))], ids=["70%", "2:4, ridge chosen"])
def test_experts_are_solved_in_batches_and_end_as_alone(
    stories: Sequences, monkeypatch: pytest.MonkeyPatch, ridge: Any, pattern: tuple[int, int] | None
) -> None:
    """The experts' matrices of a shape in one batch; to the bit what comes of one solve after the other."""
    target = Target(None, pattern) if pattern else Target(0.7)
    sizes: list[int] = []
    real = ADMM.solve_all
    monkeypatch.setattr(ADMM, "solve_all", lambda self, problems: sizes.append(len(problems)) or real(self, problems))
    models, reports = [], []
    for largest in (together._LARGEST_ON_CPU, 0):
        monkeypatch.setattr(together, "_LARGEST_ON_CPU", largest)
        model = mixture()
        outcome = recipe_named("admm").prune(model, Task(target=target, calibration=stories, ridge=ridge))
        models.append(model.state_dict())
        reports.append([replace(layer, seconds=0.0) for layer in outcome.layers])
        assert (4 in sizes) is bool(largest)
        assert (len(GRID) in sizes) is (bool(largest) and ridge == "auto")
        sizes.clear()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert reports[0] == reports[1]
