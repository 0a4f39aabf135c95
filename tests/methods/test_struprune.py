"""Structured pruning of whole models: smaller, saved, loaded, verified; budgets in every unit; what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import admm_prune
from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.methods.base import Outcome, Task
from admm_prune.methods.struprune.struprune import STRUCTURED, StruPrune
from admm_prune.methods.struprune.sublayer import Pruner
from admm_prune.methods.target import Target
from admm_prune.models import sublayers as sublayers_module
from admm_prune.models.capture import BlockStream
from admm_prune.models.loading import load, open_on_disk
from admm_prune.models.structure import decoder_blocks
from admm_prune.models.sublayers import UNITS, savings, sublayers
from admm_prune.problems.allocation import Binomial, Uniform
from admm_prune.problems.allocation_knapsack import Knapsack
from admm_prune.runs.compare import ComparisonSettings, compare
from admm_prune.runs.texts import Texts
from admm_prune.settings import Settings, TextSettings
from admm_prune.verify.run import verify_folder

IDS = torch.tensor([[0, 5, 17, 42, 99, 3, 260]])


@pytest.fixture(scope="module")
def calibration(model_folder: Path, text_file: Path) -> Sequences:
    return Texts(TextSettings(data=str(text_file), samples=12), load(str(model_folder))).calibration()


def pruned(folder: Path, recipe: StruPrune, calibration: Sequences, sparsity: float = 0.4) -> tuple[Outcome, Tensor]:
    model = load(str(folder)).model
    outcome = recipe.prune(model, Task(target=Target(sparsity), calibration=calibration))
    with torch.no_grad():
        return outcome, model(input_ids=IDS).logits


@pytest.mark.bitwise
@pytest.mark.sampled(1)
@pytest.mark.parametrize("recipe", STRUCTURED, ids=lambda recipe: recipe.name)
def test_what_is_saved_is_smaller_loads_again_and_is_verified(
    recipe: StruPrune, tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    report = admm_prune.prune(
        model_folder, method=recipe.name, sparsity=0.3, data=str(text_file), samples=20, out=tmp_path / "out"
    )
    block = decoder_blocks(load(str(model_folder)).model)[0]
    group = max(sublayer.group_weights for sublayer in sublayers(block)) * (2 if recipe.uniform else 1)
    assert 0.3 <= report.sparsity < 0.3 + group / report.block_weights
    stock = report.details["form"] != "per-layer"
    assert stock or recipe.form == "per-layer"
    assert stock == (not (tmp_path / "out/modeling_per_layer.py").exists())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=not stock)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, report.model(input_ids=IDS).logits)
    cached, plain = (again.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    dense = (model_folder / "model.safetensors").stat().st_size
    assert (tmp_path / "out/model.safetensors").stat().st_size < dense * (1.0 if recipe.form == "padded" else 0.85)
    assert report.pruned.perplexity != report.dense.perplexity
    assert "reconstruction" in report.details["method"]
    assert verify_folder(tmp_path / "out", device="cpu").failures == []


def test_padded_or_per_layer_it_is_the_same_model(model_folder: Path, calibration: Sequences) -> None:
    first, logits = pruned(model_folder, StruPrune(), calibration)
    second, padded = pruned(model_folder, StruPrune(form="padded"), calibration)
    assert first.details["units"] == second.details["units"]
    assert float((logits - padded).abs().max()) <= 1e-5


@pytest.mark.bitwise
def test_two_runs_are_alike_to_the_bit(model_folder: Path, calibration: Sequences) -> None:
    (_, first), (_, second) = (pruned(model_folder, StruPrune(selector="admm"), calibration) for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_to_prune_leaves_the_model_alone(model_folder: Path, calibration: Sequences) -> None:
    outcome, logits = pruned(model_folder, StruPrune(), calibration, 0.0)
    with torch.no_grad():
        assert torch.equal(logits, load(str(model_folder)).model(input_ids=IDS).logits)
    assert {layer.sparsity for layer in outcome.layers} == {0.0}


@pytest.mark.parametrize("unit", UNITS)
def test_a_budget_in_every_unit(unit: str, model_folder: Path, calibration: Sequences) -> None:
    recipe = StruPrune(unit=unit, allocator=Knapsack())  # type: ignore[arg-type]
    outcome, _ = pruned(model_folder, recipe, calibration, 0.25)
    assert outcome.details["saved"] >= 0.25 - 1e-9
    if unit == "kv-cache":
        assert all(outcome.details["removed"][name] == 0 for name in outcome.details["removed"] if "mlp" in name)
    assert outcome.details["bound"] <= outcome.details["loss"] * (1 + 1e-6)


def test_without_compensation_the_reported_loss_includes_interactions(
    model_folder: Path, calibration: Sequences
) -> None:
    recipe = next(recipe for recipe in STRUCTURED if recipe.name == "structured-wanda")
    model = load(str(model_folder)).model
    curves = recipe.measure(model, Task(target=Target(0.4), calibration=calibration))
    details = pruned(model_folder, recipe, calibration)[0].details
    allocated = sum(float(curves[name].losses[k]) for name, k in details["removed"].items())
    losses = [float(curves[name].reported[k]) for name, k in details["removed"].items()]
    assert details["loss"] == pytest.approx(sum(losses)) != pytest.approx(allocated)
    assert details["bound"] is None


def test_savings_are_those_of_the_matrices(model_folder: Path) -> None:
    heads, neurons = sublayers(decoder_blocks(load(str(model_folder)).model)[0])  # d = 32, 4 heads of 8, 2 of them keys
    assert savings(heads, "parameters").tolist() == [0, 1536, 3072]
    assert savings(neurons, "bytes")[1] == 3 * 32 * 4
    assert savings(heads, "kv-cache")[1] == 2 * 8 * 4
    assert savings(neurons, "kv-cache")[-1] == 0
    assert savings(neurons, "flops")[1] == 2 * 3 * 32
    assert savings(heads, "flops", tokens=100)[1] == 2 * 1536 + 4 * 16 * 50
    seconds = savings(neurons, "latency", tokens=64)
    assert bool((seconds.diff() >= 0).all())
    assert float(seconds[-1]) > float(seconds[0]) == 0
    with pytest.raises(UserError, match=r"a budget is in parameters, bytes, .* or latency, not in 'joules'"):
        savings(heads, "joules")  # type: ignore[arg-type]


def test_weights_on_disk_are_timed_where_they_will_compute(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device, where they have no bytes, multiplies in no time whatever their shape."""
    seconds, places = sublayers_module._seconds, []

    def watched(*arguments: Any) -> float:
        places.append(arguments[-1])
        return seconds(*arguments)

    monkeypatch.setattr(sublayers_module, "_seconds", watched)
    sublayers_module._seconds_saved.cache_clear()
    for sublayer in sublayers(decoder_blocks(open_on_disk(str(model_folder)).model)[0]):
        saved = savings(sublayer, "latency", tokens=64)
        assert float(saved[-1]) > 0
    assert set(places) == {"cuda" if torch.cuda.is_available() else "cpu"}


def test_widths_are_rounded_to_a_multiple(model_folder: Path, calibration: Sequences) -> None:
    outcome, _ = pruned(model_folder, StruPrune(multiple=16), calibration)
    assert all(n % 16 == 0 for name, n in outcome.details["units"].items() if "mlp" in name)


def test_compensation_lowers_the_error_and_choosing_by_it_more(model_folder: Path, calibration: Sequences) -> None:
    even = StruPrune(allocator=Uniform(), inputs="dense")

    def error(recipe: StruPrune) -> float:
        layers = pruned(model_folder, recipe, calibration)[0].layers
        return sum(layer.relative_error for layer in layers if layer.relative_error is not None)

    plain = error(replace(even, selector="mask", compensate=False))
    masked, once, greedy = (error(replace(even, selector=name)) for name in ("mask", "obs-one-shot", "obs"))
    assert greedy <= once * 1.02
    assert max(masked, once) < plain


def test_the_mean_of_the_error_goes_into_the_bias() -> None:
    """On the inputs it was solved for, a pruned output layer keeps its mean output exactly."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=16, init_std=0.3,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval().requires_grad_(False)
    (block,) = decoder_blocks(model)
    neurons = sublayers(block)[1]
    x = torch.randn(200, 16)
    hidden = block.module.fc1(x).relu()
    before = block.module.fc2(hidden).mean(0)
    from admm_prune.statistics import GramAccumulator, LayerStatistics

    gram = GramAccumulator(24)
    gram.add(hidden)
    pruner = Pruner(selector="obs", compensate=True, fold_bias=True, ridge=0.01)
    (report,) = pruner.prune([neurons], {neurons.name: LayerStatistics.collected(gram)}, {neurons.name: 12})
    after = block.module.fc2(block.module.fc1(x).relu()).mean(0)
    assert torch.allclose(before, after, atol=1e-5)
    assert report.shape == (16, 24)
    assert neurons.count == 12
    block.module.fc2.half()
    gram = GramAccumulator(12)
    gram.add(1e6 * hidden[:, :12])
    with pytest.raises(UserError, match=r"fc2\.weight: the new bias has entries that are not finite"):
        pruner.prune([neurons], {neurons.name: LayerStatistics.collected(gram)}, {neurons.name: 6})


def test_one_block_is_looked_at_with_one_gram_for_each_branch(model_folder: Path, calibration: Sequences) -> None:
    model = load(str(model_folder)).model
    blocks = decoder_blocks(model)
    stream = BlockStream(model, blocks, calibration, "cpu")
    names = [view.name for view in blocks[0].weights if view.name.endswith(("o_proj.weight", "down_proj.weight"))]
    shared = stream.collect(0, only=names)
    assert [[view.name for view in inputs.weights] for inputs in shared] == [[name] for name in names]
    everything = {view.name: inputs for inputs in stream.collect(0) for view in inputs.weights}
    for inputs in shared:
        other = everything[inputs.weights[0].name].statistics
        assert torch.equal(inputs.statistics.gram, other.gram)
        assert inputs.statistics.mean is not None
        assert other.mean is not None
        assert torch.equal(inputs.statistics.mean, other.mean)
    preview = stream.preview(0)
    stream.advance(0)
    assert torch.equal(preview, stream._states["calibration"][0].hidden)
    hidden = [flow.hidden[flow.mask] for flows in stream._states.values() for flow in flows]
    assert stream.energy() == pytest.approx(float(torch.cat(hidden).double().square().sum()), rel=1e-12)


def test_the_methods_stand_beside_each_other(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    settings = ComparisonSettings(
        run=Settings(str(model_folder), data=str(text_file), samples=8, device="cpu"),
        methods=("struprune", "wanda"),
        targets=(Target(0.3),),
    )
    comparison = compare(settings, tmp_path / "out")
    assert [row.relative_error is None for row in comparison.rows] == [True, False]
    assert verify_folder(tmp_path / "out", device="cpu").failures == []


def test_a_budget_that_is_not_of_weights_is_recorded_and_left_unchecked(
    tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    report = admm_prune.prune(
        model_folder, method="struprune-uniform", sparsity=0.3, unit="flops", multiple=8, samples=8,
        data=str(text_file), out=tmp_path / "out",
    )  # fmt: skip
    assert report.budget == "flops"
    assert report.details["saved"] >= 0.3
    assert {n % 8 for name, n in report.details["units"].items() if "mlp" in name} == {0}
    assert report.manifest["settings"]["unit"] == "flops"
    verified = verify_folder(tmp_path / "out", quick=True, device="cpu")
    assert verified.failures == []
    assert any("a fraction of the flops" in what for what in verified.unchecked)


@pytest.mark.parametrize("recipe", [StruPrune(uniform=True), StruPrune()], ids=["uniform", "free"])
@pytest.mark.parametrize("sparsity", [0.15, 0.35, 0.45])
def test_a_group_of_every_block_does_not_miss_the_budget(
    recipe: StruPrune, sparsity: float, model_folder: Path, calibration: Sequences
) -> None:
    """Of the embedded model 40 % was to go, and 49.89 % went."""
    outcome, _ = pruned(model_folder, recipe, calibration, sparsity)
    assert sparsity - 1e-9 <= outcome.details["saved"] <= sparsity + 0.01
    assert outcome.notes == ()


def test_a_budget_that_large_groups_miss_is_a_note(model_folder: Path, calibration: Sequences) -> None:
    outcome, _ = pruned(model_folder, StruPrune(uniform=True, unit="kv-cache"), calibration, 0.3)
    assert outcome.notes == ("50.00% is saved, where 30% was to go: every step takes a group of each block",)
    outcome, _ = pruned(model_folder, StruPrune(unit="kv-cache"), calibration, 0.3)
    assert outcome.notes == ("50.00% is saved, where 30% was to go: the groups are large",)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "wanda", "multiple": 8},
            "wanda removes no structured groups: --unit and --multiple are for struprune, ",
        ),
        ({"method": "struprune", "unit": "joules"}, "unit must be parameters, bytes, .* or latency, not 'joules'"),
        ({"method": "struprune", "multiple": 0}, "multiple must be at least 1, not 0"),
    ],
)
def test_options_of_other_methods_are_refused(options: dict[str, Any], message: str, model_folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        admm_prune.prune(model_folder, sparsity=0.3, **options)


def test_what_cannot_be_done_is_refused_before_anything_is_cut(model_folder: Path, calibration: Sequences) -> None:
    model = load(str(model_folder)).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refuses(recipe: StruPrune, message: str, target: Target, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            recipe.prune(model, Task(target=target, calibration=calibration, **options))

    refuses(StruPrune(), "struprune removes structured groups: give a sparsity such as 0.3", Target(pattern=(2, 4)))
    refuses(StruPrune(), r"99% of the blocks is to go, and \d+.\d+% can go at most", Target(0.99))
    refuses(StruPrune(allocator=Binomial(most=0.5)), r"70.00% is to go, and 50.00% can go at most", Target(0.7))
    refuses(StruPrune(), "struprune does not choose a ridge: give a number", Target(0.3), ridge="auto")
    refuses(StruPrune(), "has no layer problems to bound: leave --bounds out", Target(0.3), bounds=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_block_that_only_looks_made_of_units_is_refused(model_folder: Path, calibration: Sequences) -> None:
    model = load(str(model_folder)).model
    model.model.layers[1].mlp.act_fn = torch.nn.Softmax(-1)  # every neuron sees all others
    with pytest.raises(UserError, match=r"model.layers.1.mlp: without its zero groups the block gives other outputs"):
        StruPrune().prune(model, Task(target=Target(0.4), calibration=calibration))


def test_blocks_that_differ_already_cannot_be_uniform(model_folder: Path, calibration: Sequences) -> None:
    model = load(str(model_folder)).model
    StruPrune(form="per-layer").prune(model, Task(target=Target(0.3), calibration=calibration))
    with pytest.raises(UserError, match="the blocks differ already"):
        StruPrune(uniform=True).prune(model, Task(target=Target(0.3), calibration=calibration))
