"""Coordinated attention and the blockwise refit: against the model itself, on every family, in every kind of run."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM

import admm_prune
from admm_prune.data.sequences import Row, Sequences
from admm_prune.errors import UserError
from admm_prune.methods import refit
from admm_prune.methods.allocation.measurements import gradients
from admm_prune.methods.base import IN_PROCESS, Task
from admm_prune.methods.coordination import DenseAttention
from admm_prune.methods.joint import Joint
from admm_prune.methods.layerwise import Layerwise
from admm_prune.methods.local import LOCAL_METHODS
from admm_prune.methods.refit import BlockOutput, BlockTokens
from admm_prune.methods.registry import composed
from admm_prune.methods.target import Target
from admm_prune.models.attention import ModelMixing, attention_of, attention_views
from admm_prune.models.capture import BlockStream
from admm_prune.models.loading import load
from admm_prune.models.structure import decoder_blocks
from admm_prune.models.sublayers import heads_stay
from admm_prune.plan.anatomy import Anatomy
from admm_prune.plan.blockwise import pruning_stages
from admm_prune.plan.counting import Work, counted
from admm_prune.point import Point
from admm_prune.problems.attention import AttentionOutput
from admm_prune.problems.constraints import Product, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.runs.compare import ComparisonSettings, compare
from admm_prune.runs.recipe_file import read_recipe
from admm_prune.runs.results import Report
from admm_prune.settings import Settings
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.support_descent import SupportDescent
from admm_prune.verify.run import verify_folder
from tests.models.tiny_models import FAMILIES, VARIANTS, VOCABULARY, build, shared_keys

BOTH = Joint(coordinate=("attention",), refit="block")
ONE_MATRIX = r"(qkv_proj|c_attn|query_key_value)\.weight holds queries, keys and values in one matrix"
REFUSED = {
    "phi3": ONE_MATRIX,
    "gpt2": ONE_MATRIX,
    "neox": ONE_MATRIX,
    "bloom": ONE_MATRIX,
    "falcon": ONE_MATRIX,
    "codegen parallel": ONE_MATRIX,
    "bitnet": "head outputs are not linear in the values",
    "diffllama": "head outputs are not linear in the values",
}
READ = (
    "llama", "llama-untied", "llama-eager", "llama one key head", "llama a key for every head, biases",
    "llama heads wider than the model", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "stablelm-parallel", "olmo2",
    "opt", "gptj parallel", "cohere parallel", "granite", "starcoder2 biases", "mixtral",
)  # fmt: skip


def text(lengths: tuple[int, ...] = (11, 16, 7, 16, 13, 9), batch_size: int = 2) -> Sequences:
    g = torch.Generator().manual_seed(0)
    rows = tuple(Row(torch.randint(1, VOCABULARY, (length,), generator=g), length) for length in lengths)
    return Sequences(rows, "documents", 16, None, batch_size)


def stream_of(model: nn.Module) -> BlockStream:
    return BlockStream(model, decoder_blocks(model), text(), "cpu")


@pytest.mark.parametrize("family", READ)
def test_head_outputs_are_those_of_the_model_and_the_adjoint_is_theirs(family: str) -> None:
    model = build(family, layers=1)
    block, stream = decoder_blocks(model)[0], stream_of(model)
    states = stream.states(0)["calibration"]
    views = attention_of(block, states, 0)
    mixing = ModelMixing(block, views, states, 0)
    seen: dict[str, list[Tensor]] = {"value": [], "output": []}
    with ExitStack() as stack:
        hook = lambda _, __, output: seen["value"].append(output)  # noqa: E731
        stack.enter_context(views.value.module.register_forward_hook(hook))
        pre = lambda _, args: seen["output"].append(args[0])  # noqa: E731
        stack.enter_context(views.output.module.register_forward_pre_hook(pre))
        stack.enter_context(torch.no_grad())
        for state in states:
            state.replay(block, 0)
    g = torch.Generator().manual_seed(1)
    for number, state in enumerate(states):
        values, heads = (seen[name][number].flatten(0, -2)[state.mask.flatten()] for name in ("value", "output"))
        assert torch.allclose(mixing.mix(number, values), heads, rtol=1e-4, atol=1e-5)
        one, two = torch.randn(values.shape, generator=g), torch.randn(heads.shape, generator=g)
        several = (values, one, values)
        for given, together in zip(several, mixing.mix_several(number, several), strict=True):
            assert torch.equal(together, mixing.mix(number, given))
        left, right = (mixing.mix(number, one) * two).sum(), (one * mixing.unmix(number, two)).sum()
        assert float(left) == pytest.approx(float(right), rel=1e-3, abs=1e-3)
    assert not any("forward" in vars(module) for module in block.module.modules()), "as it was"


def test_queries_and_keys_are_projected_once_for_several_values() -> None:
    model = build("llama", layers=1)
    block = decoder_blocks(model)[0]
    states = stream_of(model).states(0)["calibration"]
    views = attention_of(block, states, 0)
    calls: list[nn.Module] = []
    for view in views.weights:
        own = view.module.forward

        def forward(x: Tensor, module: nn.Module = view.module, own: Any = own) -> Tensor:
            calls.append(module)
            return own(x)

        view.module.forward = forward  # as libraries do that wrap modules
    mixing = ModelMixing(block, views, states, 0)
    shape = (mixing.spans[0].stop, views.value.shape[0])
    expected = [mixing.mix(0, torch.full(shape, float(k))) for k in range(3)]
    calls.clear()
    for one, two in zip(mixing.mix_several(0, (torch.full(shape, float(k)) for k in range(3))), expected, strict=True):
        assert torch.equal(one, two)
    queries_and_keys = [view.module for view in views.weights if view not in (views.value, views.output)]
    assert sorted(map(id, calls)) == sorted(map(id, queries_and_keys)), "and no values"
    calls.clear()
    states[0].replay(block, 0)
    assert {id(view.module) for view in views.weights} <= set(map(id, calls)), "the functions are as they were"


def test_attentions_without_keys_of_their_own_and_state_spaces_are_named_as_what_they_are() -> None:
    """Two matrices in a module with heads are not always queries, keys and values in one, and the output."""
    reading = decoder_blocks(shared_keys())[-1]
    with pytest.raises(UserError, match=r"model\.layers\.3\.self_attn has no keys and values of its own") as refusal:
        attention_views(reading)
    assert "in one matrix" not in str(refusal.value)
    assert "has no keys and values of its own" in str(heads_stay(reading))
    sizes = {"num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 4}
    (mamba,) = decoder_blocks(
        Mamba2ForCausalLM(Mamba2Config(hidden_size=16, num_hidden_layers=1, vocab_size=VOCABULARY, **sizes))
    )
    with pytest.raises(UserError, match="0 of its modules have queries, keys, values and an output"):
        attention_views(mamba)
    assert str(heads_stay(mamba)).endswith("is a state space model")


@pytest.mark.parametrize("family", REFUSED)
def test_other_attentions_are_refused_in_one_line(family: str) -> None:
    model = build(family, layers=1)
    recipe = composed("wanda", joint=Joint(coordinate=("attention",)))
    with pytest.raises(UserError, match=REFUSED[family]) as refusal:
        recipe.prune(model, Task(target=Target(sparsity=0.5), calibration=text()))
    assert "\n" not in str(refusal.value)
    assert decoder_blocks(model)[0].name in str(refusal.value)


def test_every_family_is_tried() -> None:
    known = {*FAMILIES, *VARIANTS}
    assert {*READ, *REFUSED} <= known


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_gradient_of_a_block_is_that_of_differences(family: str) -> None:
    model = build(family, layers=1).double()
    block, stream = decoder_blocks(model)[0], stream_of(model)
    outputs: dict[str, Tensor] = {}
    stream.collect(0, {block.weights[0].name}, outputs)
    tokens = BlockTokens(stream.states(0)["calibration"], outputs["calibration"])
    problem = BlockOutput(
        block, block.weights, Product({v.name: Unstructured(0.5) for v in block.weights}), 0, tokens, tokens
    )
    g = torch.Generator().manual_seed(0)
    before = {name: x.clone() for name, x in block.module.state_dict().items()}
    x = problem.initial().map(lambda w: w + 0.05 * torch.randn(w.shape, generator=g, dtype=w.dtype))
    step = x.map(lambda w: torch.randn(w.shape, generator=g, dtype=w.dtype))
    loss = lambda t: float(problem.differentiated(x + step * t, 1)[0])  # noqa: E731
    _, gradient = problem.differentiated(x, 1)
    # Norms and rotations of some families compute in float32 whatever the dtype.
    precise = family != "llama"
    t, tolerance = (1e-5, 1e-6) if precise else (1e-3, 1e-3)
    assert (loss(t) - loss(-t)) / (2 * t) == pytest.approx(gradient.dot(step), rel=tolerance)
    assert problem.value(problem.initial()) == pytest.approx(0, abs=1e-20)
    assert all(torch.equal(before[name], value) for name, value in block.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in block.module.parameters())


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "DESCENT", replace(refit.DESCENT, over=20, max_iterations=20))


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sparsegpt", pytest.param("sparsellm", marks=pytest.mark.slow)])
def test_supports_stay_and_no_step_is_kept_that_raises_its_validation_error(name: str, dtype: torch.dtype) -> None:
    model = build("llama", layers=2).to(dtype)
    recipe = composed(name, joint=BOTH)
    outcome = recipe.prune(model, Task(target=Target(sparsity=0.5), calibration=text((16,) * 64)))
    for block in decoder_blocks(model):
        for view in block.weights:
            size = view.read().numel()
            assert int((view.read() == 0).sum()) == size - round(0.5 * size), view.name
    figures = outcome.details["joint" if name == "sparsegpt" else "feed_forward"]
    assert len(figures) == 2
    for figure in figures:
        attention, descent = figure["attention"], figure["refit"]
        assert attention["accepted"] == (attention["together"] < attention["alone"])
        assert descent["accepted"] == (descent["after"] < descent["before"])
        assert descent["accepted"] or name == "sparsellm", "on a text of this length"


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    ("family", "joint"),
    [("llama", BOTH), ("llama", Joint(coordinate=("attention",))), ("opt", Joint(coordinate=("attention",)))],
)
def test_reported_errors_are_those_of_the_matrices_as_they_were_fitted_in_the_end(family: str, joint: Joint) -> None:
    """Relative to the dense matrix, on the inputs that it has in the finished block, with the bias fitted with it."""
    model, dense = build(family, layers=1), build(family, layers=1)
    task = Task(target=Target(sparsity=0.5), calibration=text((16,) * 32))
    outcome = composed("wanda", joint=joint).prune(model, task)
    fitted = [report for report in outcome.layers if any("fitted again" in note for note in report.notes)]
    assert len(fitted) == (7 if joint.refit else 2)
    block, before = (decoder_blocks(one)[0] for one in (model, dense))
    stream = BlockStream(model, decoder_blocks(model), task.calibration, "cpu")
    inputs: dict[str, Tensor] = {}
    for view in block.weights:
        keep = lambda _, args, name=view.name: inputs.update({name: args[0].flatten(0, -2)})  # noqa: E731
        view.module.register_forward_pre_hook(keep)
    measured: dict[str, dict[str, Tensor]] = {}
    for part, states in stream.states(0).items():
        sums = measured.setdefault(part, {})
        for state in states:
            state.replay(block, 0)
            for view, old in zip(block.weights, before.weights, strict=True):
                x = inputs[view.name].double()
                moved = 0 if view.bias is None or old.bias is None else (view.bias - old.bias).double()
                error = x @ (view.read() - old.read()).double().T + moved
                energies = torch.stack([error.square().sum(), (x @ old.read().double().T).square().sum()])
                sums[view.name] = sums.get(view.name, torch.zeros(2, dtype=torch.float64)) + energies
    for report in fitted:
        error, energy = sum(sums[report.name] for sums in measured.values())
        assert report.relative_error == pytest.approx(float(error / energy), rel=1e-3), report.name
    # Value and output projections alone are solved without the validation tokens.
    apart = {report.name for report in outcome.layers if report.relative_error_validation is not None}
    assert apart == {
        view.name for view in block.weights if view.name.endswith(("v_proj.weight", "o_proj.weight", "out_proj.weight"))
    }
    for report in fitted:
        if report.name in apart:
            error, energy = measured["validation"][report.name].tolist()
            assert report.relative_error_validation == pytest.approx(error / energy, rel=1e-3), report.name
    moves = [
        float((a.bias - b.bias).abs().max())
        for a, b in zip(block.weights, before.weights, strict=True)
        if a.bias is not None and b.bias is not None
    ]
    assert (max(moves, default=0.0) > 1e-3) == (family == "opt")


def test_a_descent_that_does_not_help_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, joint = build("llama", layers=1), build("llama", layers=1)
    task = Task(target=Target(sparsity=0.5), calibration=text())
    recipe = Layerwise(LOCAL_METHODS["wanda"])
    small = replace(task, calibration=Joint(refit="block").task(task, IN_PROCESS).calibration)
    recipe.prune(alone, small)
    monkeypatch.setattr(refit, "DESCENT", replace(refit.DESCENT, rate=100.0))
    outcome = replace(recipe, joint=Joint(refit="block")).prune(joint, task)
    assert not outcome.details["joint"][0]["refit"]["accepted"]
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), joint.parameters(), strict=True))
    assert all(report.relative_error is not None for report in outcome.layers)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    ("joint", "solver", "step"),
    [
        (Joint(refit="block"), SupportDescent, "refit"),
        (Joint(coordinate=("attention",)), Alternating, "attention"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_joint_solution_that_overflows_in_the_dtype_of_the_model_changes_nothing(
    joint: Joint, solver: type[Any], step: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, together = build(family, layers=1).half(), build(family, layers=1).half()
    task = Task(target=Target(sparsity=0.5), calibration=text())
    recipe = Layerwise(LOCAL_METHODS["wanda"])
    recipe.prune(alone, replace(task, calibration=joint.task(task, IN_PROCESS).calibration))
    solve = solver.solve

    def overflowing(*arguments: Any, **options: Any) -> Any:
        result = solve(*arguments, **options)
        name = list(result.solution)[-1]  # of OPT's attention, the bias
        return replace(result, solution=Point({**result.solution, name: 1e6 * torch.ones_like(result.solution[name])}))

    monkeypatch.setattr(solver, "solve", overflowing)
    monkeypatch.setattr(AttentionOutput, "validation_loss", lambda _, x: 1.0 / float(x["output"].norm()))
    outcome = replace(recipe, joint=joint).prune(together, task)
    figures = outcome.details["joint"][0][step]
    assert (figures["accepted"], figures["status"]) == (False, "NONFINITE")
    assert any("was not finite in 1 of 1 blocks, which are left as they were" in note for note in outcome.notes)
    for name, parameter in alone.named_parameters():
        if step == "refit" or "attn" in name:  # the others read the outputs of the pruned attention
            assert torch.equal(parameter, together.get_parameter(name)), name


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("name", ["wanda", "sparsellm"])
def test_one_sequence_is_fitted_and_judged_on_itself_and_it_is_said(name: str) -> None:
    model = build("llama", layers=1)
    outcome = composed(name, joint=BOTH).prune(model, Task(target=Target(sparsity=0.5), calibration=text((16,))))
    assert any("one calibration sequence" in note for note in outcome.notes)
    figures = outcome.details["joint"][0]
    assert 0 < figures["attention"]["alone"] < 1
    assert figures["refit"]["before"] > 0
    if name == "sparsellm":
        (network,) = outcome.details["feed_forward"]
        assert network["relative_error_validation"] is None
        assert all(error > 0 for error in network["rounds"])


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("held_out", [False, True])
def test_a_token_without_an_output_does_not_stop_the_refit(held_out: bool) -> None:
    """Its embedding is zero, as rows of padding tokens are, and no block has biases."""
    model = build("llama", layers=2)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = 0
    sequences = text((16,) * 64)
    fit, validation = sequences.split(0.15)
    row = (validation if held_out else fit).rows[0]
    row.ids[0] = 5
    outcome = composed("wanda", joint=Joint(refit="block")).prune(
        model, Task(target=Target(sparsity=0.5), calibration=sequences)
    )
    for figures in outcome.details["joint"]:
        assert figures["refit"]["accepted"]
        assert figures["refit"]["after"] < figures["refit"]["before"] < 10


def test_attention_alone_is_what_layers_give_where_the_output_has_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bias stays dense there: means are not taken out of the head outputs."""
    model, layerwise = build("opt", layers=1), build("opt", layers=1)
    with torch.no_grad():
        for one in (model, layerwise):
            views = attention_of(decoder_blocks(one)[0], stream_of(one).states(0)["calibration"], 0)
            bias = views.value.bias
            assert bias is not None
            bias += 1.0  # head outputs whose mean is far from zero
    block = decoder_blocks(layerwise)[0]
    attention = attention_of(block, stream_of(layerwise).states(0)["calibration"], 0)
    both = {"value": attention.value, "output": attention.output}
    names = {view.name for view in both.values()}
    others = tuple((view.name, "dense") for view in block.weights if view.name not in names)
    task = Task(target=Target(sparsity=0.5, layers=others), calibration=text((32,)))  # of which nothing is held out
    found: dict[str, Tensor] = {}
    alone = DenseAttention._alone

    def kept(*arguments: Any) -> Any:
        start = alone(*arguments)
        found.update(start)
        return start

    monkeypatch.setattr(DenseAttention, "_alone", kept)
    composed("sparsegpt", joint=Joint(coordinate=("attention",))).prune(model, task)
    composed("sparsegpt").prune(layerwise, task)
    for name, view in both.items():
        torch.testing.assert_close(found[name], view.read(), rtol=1e-3, atol=1e-4)


class Weighted(LayerReconstruction):
    @staticmethod
    def token_weights(inputs: Tensor) -> Tensor:
        return inputs.square().sum(1)


def test_a_weighted_objective_is_refused() -> None:
    recipe = replace(Layerwise(LOCAL_METHODS["wanda"]), joint=BOTH)
    weighted = recipe.with_parts(None, Weighted, None)
    with pytest.raises(UserError, match="weights all tokens alike"):
        weighted.check(build("llama", layers=1), Target(sparsity=0.5))


def test_what_the_steps_did_not_do_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (("model.layers.0.self_attn.v_proj.weight", "dense"),)
    task = Task(target=Target(sparsity=0.5, layers=layers), calibration=text())
    monkeypatch.setattr(refit, "DESCENT", SupportDescent(rate=100.0, over=1, max_iterations=1))
    outcome = composed("wanda", joint=BOTH).prune(build("llama", layers=1), task)
    assert any("not coordinated in 1 of 1 blocks" in note for note in outcome.notes)
    assert any("the refit was rejected in 1 of 1 blocks" in note for note in outcome.notes)


def test_parameters_are_left_as_they_were_given() -> None:
    """requires_grad of a model from Python, and no gradients that nothing clears."""
    model = build("llama", layers=1).requires_grad_(True)
    task = Task(target=Target(sparsity=0.5), calibration=text())
    composed("wanda", joint=Joint(refit="block")).prune(model, task)
    assert all(parameter.requires_grad for parameter in model.parameters())
    names = frozenset(view.name for view in decoder_blocks(model)[0].weights)
    gradients(model, task.calibration, names)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_matrices_that_stay_dense_are_not_touched() -> None:
    model = build("llama", layers=1)
    dense = {view.name: view.read().clone() for view in decoder_blocks(model)[0].weights}
    names = ("self_attn.v_proj.weight", "mlp.up_proj.weight")
    layers = tuple((f"model.layers.0.{name}", "dense") for name in names)
    composed("wanda", joint=BOTH).prune(model, Task(target=Target(sparsity=0.5, layers=layers), calibration=text()))
    for view in decoder_blocks(model)[0].weights:
        assert torch.equal(view.read(), dense[view.name]) == view.name.endswith(names), view.name


SPARSITY = 0.57  # of no matrix of the tiny model a whole number of weights
PATTERN = {"pattern": "2:4", "sparsity": None}


@pytest.fixture
def prune(model_folder: Path, text_file: Path) -> Callable[..., Report]:
    how = {"data": str(text_file), "samples": 12, "eval_samples": 3, "device": "cpu", "sparsity": SPARSITY}
    return partial(admm_prune.prune, model_folder, **how, coordinate="attention", refit="block")  # type: ignore[arg-type]


@pytest.mark.bitwise
@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    ("how", "stream"),
    [
        ({"method": "sparsegpt", "allocation": "owl"}, True),
        pytest.param({"method": "sparsegpt"}, True, marks=pytest.mark.slow),
        pytest.param({"method": "sparsegpt", "allocation": "fisher", **PATTERN}, False, marks=pytest.mark.slow),
        pytest.param({"method": "sparsellm"}, True, marks=pytest.mark.slow),
        pytest.param({"method": "sparsellm", "allocation": "equal-slope"}, True, marks=pytest.mark.slow),
        pytest.param({"method": "sparsellm", "allocation": "fisher"}, False, marks=pytest.mark.slow),
        pytest.param({"method": "admm", "allocation": "search", "allocation_passes": 5}, False, marks=pytest.mark.slow),
    ],
)
def test_interrupted_streamed_and_repeated_runs_are_the_same_to_the_bit(
    how: dict[str, Any], stream: bool, prune: Callable[..., Report], tmp_path: Path
) -> None:
    """With every joint step; a rule that takes gradients or losses of the whole model does not stream."""
    whole = prune(**how, out=tmp_path / "whole")
    if "allocation" in how:
        removed = whole.block_weights - sum(layer.nonzeros for layer in whole.layers)
        assert removed == whole.details["allocation"]["removed"]
        if "pattern" not in how:
            assert removed == whole.block_weights - round((1 - SPARSITY) * whole.block_weights)
    assert len(whole.details["feed_forward" if how["method"] == "sparsellm" else "joint"]) == 2
    assert list(whole.manifest["settings"]["coordinate"]) == ["attention"]
    assert whole.manifest["settings"]["refit"] == "block"
    assert verify_folder(tmp_path / "whole", device="cpu").failures == []

    def stop(done: int, _: int, at_work: str) -> None:
        if done == 1 and at_work == "model.layers.1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(**how, out=tmp_path / "again", stream=stream, progress=stop)
    again = prune(**how, out=tmp_path / "again", stream=stream, resume=True)
    repeated = admm_prune.prune(**read_recipe(tmp_path / "whole").arguments(), out=tmp_path / "repeated")
    first = load_weights(tmp_path / "whole")
    for name, report in (("again", again), ("repeated", repeated)):
        assert report.details == whole.details
        weights = load_weights(tmp_path / name)
        assert weights.keys() == first.keys()
        assert all(torch.equal(first[key], weights[key]) for key in first)


def load_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.mark.usefixtures("few_steps")
def test_a_comparison_takes_every_step(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    steps = {"allocation": "owl", "coordinate": "attention", "refit": "block"}
    run = Settings(str(model_folder), data=str(text_file), samples=12, device="cpu", **steps)  # type: ignore[arg-type]
    settings = ComparisonSettings(run=run, methods=("wanda",), targets=(Target(0.5),))
    comparison = compare(settings, tmp_path / "out")
    recorded = comparison.manifest["settings"]
    assert (list(recorded["coordinate"]), recorded["refit"], recorded["allocation"]) == (["attention"], "block", "owl")
    for row in comparison.rows:
        details = json.loads((tmp_path / "out" / row.folder / "admm_prune.json").read_text())["details"]
        assert {"allocation", "joint"} <= details.keys()
        assert all({"attention", "refit"} <= figures.keys() for figures in details["joint"])
    assert verify_folder(tmp_path / "out", device="cpu", quick=True).failures == []
    with pytest.raises(UserError, match="struprune takes no --coordinate attention and --refit block"):
        compare(replace(settings, methods=("wanda", "struprune")), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"coordinate": "atention"}, "coordinate must be attention, not 'atention'"),
        ({"refit": "model"}, "refit must be block, not 'model'"),
        (
            {"method": "elsa"},
            "elsa takes no --coordinate attention and --refit block: it is for methods that prune block",
        ),
        ({"method": "struprune"}, "struprune takes no --coordinate attention"),
    ],
)
def test_what_cannot_be_done_is_refused(prune: Callable[..., Report], how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune(**how)


@pytest.mark.slow
@pytest.mark.parametrize("joint", [Joint(coordinate=("attention",)), Joint(refit="block")])
def test_the_plan_counts_what_a_run_does(joint: Joint) -> None:
    g = torch.Generator().manual_seed(0)
    rows = tuple(Row(torch.randint(4096, (128,), generator=g), 128) for _ in range(12))
    task = Task(target=Target(sparsity=0.5), calibration=Sequences(rows, "windows", 128, None, 8))
    recipe, model = composed("wanda", joint=joint), load("embedded", dtype="float32").model
    stages = pruning_stages(Anatomy.of("embedded", "float32"), recipe, task, stream=False)
    assert {"coordinated attention", "refit"} & {stage.name for stage in stages}
    with counted() as counting:
        counting.know(*model.parameters(), *model.buffers())
        recipe.prune(model, task)
    planned = sum((stage.work for stage in stages), Work()).operations
    assert planned == pytest.approx(counting.work.operations, rel=0.2)
