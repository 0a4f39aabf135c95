"""Patterns for modules: by the end of a name, as in PEFT, by whole name, class or regular expression."""

from __future__ import annotations

from functools import cache

import pytest

from admm_prune.errors import UserError, did_you_mean
from admm_prune.methods.selection import Modules, Selection
from admm_prune.methods.target import Target
from admm_prune.models.structure import decoder_blocks
from tests.models.tiny_models import build

KNOWN = ["magnitude", "wanda", "sparsegpt", "admm", "admm-best"]


@cache
def modules(family: str) -> Modules:
    model = build(family, layers=2)
    return Modules.of(decoder_blocks(model), model)


@pytest.mark.parametrize(
    ("family", "pattern", "expected"),
    [
        ("llama", "q_proj", lambda name: name.endswith(".q_proj.weight")),
        ("llama", "mlp.up_proj", lambda name: name.endswith(".mlp.up_proj.weight")),
        ("llama", "up_proj.weight", lambda name: name.endswith(".mlp.up_proj.weight")),
        ("llama", "mlp", lambda name: ".mlp." in name),
        ("llama", "layers.1", lambda name: ".layers.1." in name),
        ("llama", "1", lambda name: ".layers.1." in name),
        ("llama", "model.layers.1.mlp", lambda name: name.startswith("model.layers.1.mlp.")),
        ("llama", "LlamaMLP", lambda name: ".mlp." in name),
        ("llama", "Linear", lambda name: True),
        ("llama", "re:.*[qk]_proj", lambda name: name.endswith(("q_proj.weight", "k_proj.weight"))),
        ("gpt2", "c_proj", lambda name: name.endswith(".c_proj.weight")),
        ("gpt2", "attn.c_proj", lambda name: name.endswith(".attn.c_proj.weight")),
        ("gpt2", "Conv1D", lambda name: True),
        ("mixtral", "experts", lambda name: ".experts." in name),
        ("mixtral", "experts.down_proj", lambda name: ".experts.down_proj." in name),
        ("mixtral", "down_proj.1", lambda name: name.endswith(".experts.down_proj.1")),
    ],
)
def test_a_pattern_stands_for_the_weights_in_its_modules(family: str, pattern: str, expected: object) -> None:
    assert callable(expected)
    names = modules(family).classes
    matched = modules(family).matching(pattern)
    assert matched == {name for name in names if expected(name)} != set()


def test_a_whole_name_counts_before_the_ends_of_others() -> None:
    inner = {
        "h.0.a.weight": {"h.0.a": "Linear", "h.0": "Block"},
        "h.0.h.0.weight": {"h.0.h.0": "Linear", "h.0": "Block"},
    }
    assert Modules("Model", inner).matching("h.0") == set(inner)
    assert Modules("Model", inner).matching("h.0.a") == {"h.0.a.weight"}


@pytest.mark.parametrize(
    ("family", "pattern", "reason"),
    [
        ("llama", "q_prj", "matches 'q_prj' (did you mean 'q_proj'?): 'admm-prune list modules --model MODEL' lists"),
        ("llama", "llamamlp", "matches 'llamamlp' (did you mean 'LlamaMLP'?)"),
        ("llama", "proj", "matches 'proj' (did you mean 'v_proj' or 'q_proj' or 'o_proj'?)"),
        ("llama", "nonesuch", "no module in LlamaForCausalLM's blocks matches 'nonesuch': 'admm-prune list modules"),
        ("llama", "lm_head", "no module in LlamaForCausalLM's blocks matches 'lm_head'"),
        ("llama", "q_proj*", "matches 'q_proj*' (did you mean 'q_proj'?)"),
        ("mixtral", "0", "'0' is ambiguous: model.layers.0 and, in it, model.layers.0.mlp.experts."),
    ],
)
def test_a_pattern_that_is_misspelt_or_ambiguous(family: str, pattern: str, reason: str) -> None:
    with pytest.raises(UserError) as refusal:
        modules(family).matching(pattern)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_name_that_is_a_class_too_is_ambiguous() -> None:
    classes = {"h.0.Linear.weight": {"h.0.Linear": "Linear", "h.0": "Block"}}
    with pytest.raises(UserError, match=r"'Linear' is ambiguous: the name of h\.0\.Linear, and a class"):
        Modules("Model", classes).matching("Linear")


def test_targets_ignore_and_overrides_take_ends_of_names() -> None:
    model = build("llama", layers=2)
    selection = Selection.of(["mlp", "q_proj"], "layers.0", {"down_proj": "2:4", "q_proj": 0.25})
    layers = dict(selection.applied(model, Target(0.5)).layers)
    assert layers["model.layers.0.mlp.up_proj.weight"] == layers["model.layers.0.self_attn.q_proj.weight"] == "dense"
    assert layers["model.layers.1.self_attn.v_proj.weight"] == "dense"
    assert layers["model.layers.1.self_attn.q_proj.weight"] == "0.25"
    assert layers["model.layers.1.mlp.down_proj.weight"] == "2:4"
    assert "model.layers.1.mlp.up_proj.weight" not in layers, "it has the target of the run"


@pytest.mark.parametrize("how", [{"targets": "q_proj"}, {"ignore": "v_proj"}])
def test_an_override_of_what_is_not_pruned_is_refused(how: dict[str, str]) -> None:
    selection = Selection.of(**how, overrides={"v_proj": 0.3})
    with pytest.raises(UserError, match="the override 'v_proj' has no effect: targets and ignore leave out all"):
        selection.applied(build("llama", layers=2), Target(0.5))


def test_a_wrong_target_of_an_override_names_it() -> None:
    with pytest.raises(
        UserError, match=r"the override of 'q_proj': sparsity must lie between 0 and 1, not 12 \(did you"
    ):
        Selection.of(overrides={"q_proj": 12})


@pytest.mark.parametrize(
    ("name", "near"),
    [("sparsgpt", "'sparsegpt'"), ("ADMM", "'admm'"), ("wan", "'wanda'"), ("zzz", ""), ("", "")],
)
def test_a_near_name_is_suggested(name: str, near: str) -> None:
    expected = f" (did you mean {near}?)" if near else ""
    assert did_you_mean(name, KNOWN) == expected
    assert did_you_mean(name, iter(KNOWN)) == expected
