"""Units cut from every variant of attention and feed-forward part, saved, loaded again, compared; or refused first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.methods.base import Task
from admm_prune.methods.registry import recipe_named
from admm_prune.methods.struprune.struprune import STRUCTURED, configured
from admm_prune.methods.target import Target
from admm_prune.models.loading import LoadedModel, save
from admm_prune.models.reloading import check_reloaded
from tests.models.test_family_table import logits
from tests.models.tiny_models import VARIANTS, build

NO_CLASS = "its blocks must have equal widths: use struprune-uniform or struprune-padded"
REFUSED = {  # by the part of a variant's name, and of a method's: what is said
    ("cohere", "unlike"): NO_CLASS,
    ("phi parallel", "unlike"): NO_CLASS,
    ("gptj", "unlike"): NO_CLASS,
    ("codegen", "unlike"): NO_CLASS,
    ("starcoder2", "unlike"): NO_CLASS,
    ("granite", "unlike"): NO_CLASS,
    ("glm", "unlike"): NO_CLASS,
    ("bigcode", "unlike"): NO_CLASS,
    ("diffllama", "unlike"): NO_CLASS,
    ("xglm", "unlike"): NO_CLASS,
    ("xglm", "padded"): "layers.0.self_attn: the block cannot be called without some of its structured groups",
    ("bitnet", ""): "model.layers.0.mlp: ffn_sub_norm.weight has an entry for every neuron",
}
UNLIKE = ("struprune", "structured-global", "structured-wanda")
FAST = ("struprune", "struprune-uniform")


def refusal(variant: str, method: str) -> str | None:
    kind = "unlike" if method in UNLIKE else method
    return next((said for (name, how), said in REFUSED.items() if variant.startswith(name) and how in kind), None)


@pytest.mark.sampled(24)
@pytest.mark.bitwise
@pytest.mark.parametrize(
    ("variant", "method"),
    [
        pytest.param(variant, recipe.name, marks=() if recipe.name in FAST else pytest.mark.slow)
        for variant in VARIANTS
        for recipe in STRUCTURED
    ],
)
def test_it_loads_again_or_is_refused_before_anything_is_cut(
    variant: str, method: str, stories: Sequences, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build(variant, layers=2)
    recipe, task = recipe_named(method), Task(target=Target(0.25), calibration=stories)
    said = refusal(variant, method)
    if said is not None:
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(UserError) as caught:
            recipe.prune(model, task)
        assert said in str(caught.value)
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        return
    dense = sum(parameter.numel() for parameter in model.parameters())
    outcome = recipe.prune(model, task)
    if outcome.details["form"] != "padded":
        assert sum(parameter.numel() for parameter in model.parameters()) < dense
    saved = LoadedModel(model, tokenizer, variant)
    save(saved, tmp_path, {})
    check_reloaded(saved, tmp_path, stories.rows[-1].ids)
    check_reloaded(saved, tmp_path, stories.rows[-1].ids, whole=False)
    own_class = outcome.details["form"] == "per-layer"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=own_class)
    assert torch.equal(logits(again), logits(model))


def test_the_heads_of_a_classic_falcon_go(stories: Sequences) -> None:
    """And are not merely left alone: the budget is larger than all neurons together allow."""
    model = build("falcon-classic", layers=2)
    recipe = configured(recipe_named("struprune"), "kv-cache")
    outcome = recipe.prune(model, Task(target=Target(0.5), calibration=stories))
    removed = {name: count for name, count in outcome.details["removed"].items() if count}
    assert sum(removed.values()) == 4
    assert all(name.endswith("self_attention") for name in removed)


@pytest.mark.parametrize("family", ["bloom", "gpt2", "phi3"])
def test_a_cache_that_no_unit_makes_smaller_is_refused(family: str, stories: Sequences) -> None:
    recipe = configured(recipe_named("struprune"), "kv-cache")
    with pytest.raises(UserError, match=r"nothing can be saved in the unit kv-cache: heads stay, as .* in one matrix"):
        recipe.check(build(family, layers=2), Target(0.2))


def test_a_block_that_needs_all_of_its_units_is_found_on_a_copy(stories: Sequences) -> None:
    """One whose feed-forward part adds its neurons up, or asks for their number: no matrix shows it."""
    for forward, said in (
        (lambda mlp, x: mlp.down_proj(torch.roll(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), 1, -1)), "consist of"),
        (lambda mlp, x: mlp.down_proj((mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).view(*x.shape[:-1], 24)), "call"),
    ):
        model = build("llama", layers=2)
        kind = type(model.model.layers[0].mlp)
        other = type("Other", (kind,), {"forward": forward})
        for layer in model.model.layers:
            layer.mlp.__class__ = other
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(UserError, match=said):
            recipe_named("struprune").prune(model, Task(target=Target(0.25), calibration=stories))
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
