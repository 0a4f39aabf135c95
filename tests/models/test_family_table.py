"""Every family by every method: prune, save, load by stock classes, the same logits; or the promised refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.methods.base import OnProgress, Outcome, Runtime, Task
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.registry import RECIPES, recipe_named
from admm_prune.methods.target import Target
from admm_prune.models.loading import LoadedModel, save
from admm_prune.models.structure import decoder_blocks
from tests.models import family_table
from tests.models.family_table import COLUMNS, LIMITS
from tests.models.tiny_models import build

IDS = torch.tensor([[0, 5, 17, 42, 99, 7, 3, 250, 11, 12]])
NEURONS = {"mlp", "0", "1"}  # modules that hold them; in OPT the blocks
FAST = {"admm", "sparsellm", "struprune"}
FAST_CELLS = {("mixtral", "elsa"), ("mixtral", "gradual"), ("llama", "elsa"), ("bloom", "struprune-uniform")}


def cells() -> list[Any]:
    every = [
        (family, c, method) for family in family_table.FAMILIES for c, names in COLUMNS.items() for method in names
    ]
    return [
        pytest.param(
            family, column, method,
            marks=() if method in FAST or (family, method) in FAST_CELLS else pytest.mark.slow,
            id=f"{family}-{method}",
        )
        for family, column, method in every
    ]  # fmt: skip


@pytest.mark.bitwise
@pytest.mark.sampled(25)
@pytest.mark.parametrize(("family", "column", "method"), cells())
def test_cell(
    family: str,
    column: str,
    method: str,
    stories: Sequences,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    limit = LIMITS.get((family, column))
    model = build(family, layers=2)
    if limit is not None and limit.refused:
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(UserError) as caught:
            prune(model, method, stories)
        assert limit.says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        return
    dense = sum(view.read().numel() for block in decoder_blocks(model) for view in block.weights)
    outcome = prune(model, method, stories)
    assert outcome.model is None
    assert sum(report.shape[0] * report.shape[1] for report in outcome.layers) == dense
    assert_pruned(model, method, dense)
    told = [note for note in outcome.notes if note.startswith("heads stay: ")]
    assert len(told) == (limit is not None and limit.says != "")
    if limit is not None:
        assert all(limit.says in note for note in told)
        assert {name.rpartition(".")[2] for name, count in outcome.details["removed"].items() if count} <= NEURONS
    expected = logits(model)
    save(LoadedModel(model, tokenizer, family), tmp_path, {})
    own_class = outcome.details.get("form") == "per-layer"
    assert not (own_class and column != "structured, per block" and not family.startswith("opt"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=own_class)
    assert torch.equal(logits(again), expected)


def target_of(method: str) -> Target:
    return Target(0.0 if method == "tuned-dense" else 0.3 if method.startswith("stru") else 0.5)


def prune(model: nn.Module, method: str, stories: Sequences, on_progress: OnProgress | None = None) -> Outcome:
    recipe = recipe_named(method)
    if isinstance(recipe, Trained):
        recipe = replace(recipe, steps=2, batch_size=2, lr=1e-3)
    recipe.check(model, target_of(method))
    return recipe.prune(model, Task(target=target_of(method), calibration=stories), Runtime(on_progress=on_progress))


def assert_pruned(model: nn.Module, method: str, dense: int) -> None:
    target, recipe = target_of(method).fraction, recipe_named(method)
    views = [view for block in decoder_blocks(model) for view in block.weights]
    if recipe.budget == "matrix":
        for view in views:
            weight = view.read()
            assert int((weight == 0).sum()) >= target * weight.numel() - 1, view.name
    left = sum(int(view.read().count_nonzero()) for view in views)
    assert dense - left >= 0.98 * target * dense - 1


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=IDS).logits
    return result


def test_every_method_has_its_column() -> None:
    assert sorted(name for names in COLUMNS.values() for name in names) == sorted(RECIPES)


def test_the_page_is_up_to_date() -> None:
    assert family_table.PAGE.read_text(encoding="utf-8") == family_table.render(), (
        "run python tests/models/family_table.py"
    )
