"""Groups found, sliced off, padded back; and models of unlike blocks that load again to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from admm_prune.errors import UserError
from admm_prune.models.export import Form, check_exportable, export, groups_by_block
from admm_prune.models.loading import LoadedModel, load, save
from admm_prune.models.structure import decoder_blocks
from admm_prune.models.sublayers import Sublayer, heads_stay, keep_groups, pad_groups, sublayers
from tests.models.tiny_models import build

IDS = torch.tensor([[0, 5, 17, 42, 99, 7, 3, 250, 11, 12], [0, 8, 7, 6, 5, 4, 3, 2, 1, 100]])
# Every way to be stored, and every class; families alike are left to the table of families and methods. Eager attention
# reloads as sdpa.
PRUNABLE = ["llama", "llama-untied", "qwen3", "mistral", "opt", "opt-post-norm-untied"]
STUBBORN = ["phi3", "olmo2", "gpt2", "bloom", "stablelm-parallel", "falcon-alibi"]  # their heads stay
MORE = ["gemma2", "stablelm", "neox", "falcon-grouped", *STUBBORN]
each_family = pytest.mark.parametrize("family", PRUNABLE)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def branches_of(model: PreTrainedModel) -> list[tuple[Sublayer, ...]]:
    return [sublayers(block) for block in decoder_blocks(model)]


def survivors(sublayer: Sublayer, block: int, *, uniform: bool = False) -> list[int]:
    """Some units, others in every block unless asked for uniform widths."""
    order = torch.randperm(sublayer.count, generator=torch.Generator().manual_seed(block)).tolist()
    count = max(1, sublayer.count // 2 - (0 if uniform or sublayer.kind == "heads" else block))
    return sorted(order[: sublayer.count if not uniform and sublayer.kind == "heads" and block == 1 else count])


def sliced(family: str, *, uniform: bool = False) -> tuple[PreTrainedModel, list[tuple[Sublayer, ...]]]:
    model = build(family)
    parts = branches_of(model)
    for i, block in enumerate(parts):
        for sublayer in block:
            keep_groups(sublayer, torch.tensor(survivors(sublayer, i, uniform=uniform)))
    return model, parts


def zero_units(sublayer: Sublayer, gone: set[int]) -> None:
    weight = sublayer.output.read().clone()
    for group in gone:
        weight[:, group * sublayer.width : (group + 1) * sublayer.width] = 0
    sublayer.output.write(weight)


def masked(family: str, *, uniform: bool = False) -> PreTrainedModel:
    model = build(family)
    for i, block in enumerate(branches_of(model)):
        for sublayer in block:
            zero_units(sublayer, set(range(sublayer.count)) - set(survivors(sublayer, i, uniform=uniform)))
    return model


@each_family
def test_units_are_neurons_and_heads_with_their_queries(family: str) -> None:
    heads, neurons = branches_of(build(family))[0]
    grouped = not family.startswith("opt")
    assert (heads.kind, heads.count, heads.queries) == ("heads", 2 if grouped else 4, 2 if grouped else 1)
    assert heads.width == heads.queries * heads.size
    assert (neurons.kind, neurons.count, neurons.width, neurons.queries) == ("neurons", 24, 1, 1)
    assert neurons.group_weights == (3 if grouped else 2) * 16
    assert heads.group_weights == (2 * heads.queries + 2) * 16 * heads.size
    everything = sum(view.parameter.numel() for view in decoder_blocks(build(family))[0].weights)
    assert heads.group_weights * heads.count + neurons.group_weights * neurons.count == everything


@pytest.mark.parametrize("family", [*PRUNABLE, *MORE])
def test_a_sliced_model_is_the_masked_model(family: str) -> None:
    model, parts = sliced(family)
    assert float((logits(model) - logits(masked(family))).abs().max()) <= 1e-5
    assert parts[0][-1].count == (32 if family == "bloom" else 12)
    assert len({frozenset(groups.items()) for groups in groups_by_block(parts)}) == 3, "no two blocks are alike"
    fewer = sum(p.numel() for p in model.parameters())
    assert fewer < sum(p.numel() for p in build(family).parameters())


@pytest.mark.bitwise
@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("family", "form"),
    [*((family, form) for family in PRUNABLE for form in ("per-layer", "padded")), *((f, "per-layer") for f in MORE)],
)
def test_a_model_of_unlike_blocks_loads_again_to_the_bit(
    family: str, form: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, parts = sliced(family)
    before = logits(model)
    assert export(model, parts, form) == form
    expected = logits(model)
    assert float((expected - before).abs().max()) <= 1e-5
    save(LoadedModel(model, tokenizer, "test"), tmp_path, {"method": "test"})
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=form == "per-layer")
    ours = load(str(tmp_path)).model
    for again in (stock, ours):
        assert torch.equal(logits(again), expected)
        assert {name: p.shape for name, p in again.named_parameters()} == {
            name: p.shape for name, p in model.named_parameters()
        }
    assert (tmp_path / "modeling_per_layer.py").is_file() == (form == "per-layer")
    for again in (model, stock, ours):
        with_cache = again.generate(IDS, max_new_tokens=12, do_sample=False, use_cache=True)
        assert torch.equal(with_cache, again.generate(IDS, max_new_tokens=12, do_sample=False, use_cache=False))


def test_unlike_blocks_do_not_load_as_the_stock_class(tmp_path: Path) -> None:
    model, parts = sliced("llama")
    export(model, parts)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


@each_family
def test_uniform_widths_are_a_stock_model_where_its_config_can_say_so(family: str, tmp_path: Path) -> None:
    model, parts = sliced(family, uniform=True)
    can = not family.startswith("opt")  # the size of an OPT head follows from their number
    assert export(model, parts) == ("stock" if can else "per-layer")
    expected = logits(model)
    assert float((expected - logits(masked(family, uniform=True))).abs().max()) <= 1e-5
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=not can)
    assert torch.equal(logits(again), expected)
    assert (again.config.model_type, type(again).__name__.startswith("PerLayer")) == (model.config.model_type, not can)


def six_heads() -> PreTrainedModel:
    """A Llama whose stock class admits only numbers of heads that divide its width of 48."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=24, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=6, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("heads", "form", "found", "left"),
    [
        ((5, 5), "per-layer", "per-layer", 5),
        ((4, 4), "per-layer", "stock", 4),
        ((5, 3), "per-layer", "per-layer", 5),
        ((5, 3), "padded", "padded", 6),
        ((4, 3), "padded", "padded", 4),
    ],
)
def test_a_number_of_heads_that_the_stock_class_refuses(
    heads: tuple[int, int], form: Form, found: str, left: int, tmp_path: Path
) -> None:
    model = six_heads()
    parts = branches_of(model)
    for (attention, _), count in zip(parts, heads, strict=True):
        keep_groups(attention, torch.arange(count))
    before = logits(model)
    assert export(model, parts, form) == found
    assert parts[0][0].count == left
    assert float((logits(model) - before).abs().max()) <= 1e-5
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=found == "per-layer")
    assert torch.equal(logits(again), logits(model))


def test_an_opt_model_that_lost_neurons_alone_is_stock(tmp_path: Path) -> None:
    model = build("opt")
    parts = branches_of(model)
    for _, neurons in parts:
        keep_groups(neurons, torch.arange(0, 24, 3))
    assert export(model, parts) == "stock"
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_model_can_be_pruned_again_after_it_was_loaded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, parts = sliced("llama")
    export(model, parts)
    save(LoadedModel(model, tokenizer, "test"), tmp_path / "first", {})
    again = load(str(tmp_path / "first")).model
    parts = branches_of(again)
    for heads, neurons in parts:
        keep_groups(heads, torch.tensor([0]))
        keep_groups(neurons, torch.arange(8))
    assert export(again, parts) == "stock"
    again.save_pretrained(tmp_path / "second")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert type(stock).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(stock), logits(again))


@pytest.mark.parametrize("family", ["llama-untied", "opt"])
def test_padding_puts_back_what_slicing_took(family: str) -> None:
    model = build(family)
    for heads, neurons in branches_of(model):
        shapes = [view.shape for view in (*heads.inner, heads.output, *neurons.inner, neurons.output)]
        full = heads.count
        keep_groups(heads, torch.tensor([1]))
        keep_groups(neurons, torch.arange(5))
        pad_groups(heads, full)
        pad_groups(neurons, 24)
        assert [view.shape for view in (*heads.inner, heads.output, *neurons.inner, neurons.output)] == shapes
        assert torch.count_nonzero(neurons.output.read()[:, 5:]) == 0
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("phi3", "layers.0.self_attn keeps queries, keys and values in one matrix"),
        ("gpt2", "h.0.attn keeps queries, keys and values in one matrix"),
        ("bloom", "h.0.self_attention keeps queries, keys and values in one matrix"),
        ("olmo2", "layers.0.self_attn has norms for single heads, or over all of them"),
        ("stablelm-parallel", "layers.0.self_attn has norms for single heads, or over all of them"),
        ("falcon-alibi", "h.0.self_attention gives every head its own slope (ALiBi)"),
    ],
)
def test_heads_that_cannot_go_stay_and_say_why(family: str, why: str) -> None:
    block = decoder_blocks(build(family))[0]
    assert [sublayer.kind for sublayer in sublayers(block)] == ["neurons"]
    assert (heads_stay(block) or "").endswith(why)


def test_blocks_of_another_form_are_named() -> None:
    with pytest.raises(
        UserError, match=r"^model.layers.0.mlp.experts is a mixture of experts, which has no structured groups"
    ):
        branches_of(build("mixtral"))
    model = build("llama")
    model.model.layers[0].mlp.gate_proj = torch.nn.Linear(16, 20)
    with pytest.raises(
        UserError, match=r"cannot read the structured groups of model.layers.0.mlp: gate_proj \(20, 16\), up_proj"
    ):
        branches_of(model)


def test_blooms_neurons_are_four_times_its_width_where_a_stock_class_is_to_load_it(tmp_path: Path) -> None:
    model, parts = sliced("bloom", uniform=True)
    before = logits(model)
    assert export(model, parts, "padded") == "padded"
    assert parts[0][0].count == 64
    assert float((logits(model) - before).abs().max()) <= 1e-5
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_family_without_a_class_for_unlike_blocks_is_refused_before_anything_is_cut() -> None:
    model = build("mixtral")
    with pytest.raises(UserError, match="MixtralForCausalLM: its blocks must have equal widths"):
        check_exportable(model, "per-layer")
    check_exportable(model, "padded")
