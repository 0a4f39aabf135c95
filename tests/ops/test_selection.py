"""Threshold selection against a full sort: exact counts, exact sums, the stated rule for ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from admm_prune.ops import selection


def by_sorting(score: torch.Tensor, keep: int) -> torch.Tensor:
    order = score.reshape(-1).argsort(descending=True, stable=True)
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask.view_as(score)


@pytest.mark.parametrize("density", [0.0, 1e-4, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["normal", "heavy", "ties", "few", "equal", "sorted", "bfloat16", "periodic"])
def test_large_selection_equals_a_stable_sort(kind, density) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(700, 500, generator=g)
    score = {
        "normal": x.abs(),
        "heavy": (3 * x).exp(),
        "ties": (x.abs() * 4).round(),
        "few": torch.where(x > 3, x, 0.0),
        "equal": torch.ones_like(x),
        "sorted": torch.arange(x.numel(), dtype=torch.float32).view_as(x),
        "bfloat16": x.abs().bfloat16(),
        # A strided sample sees one phase only: its guess is wrong, the answer must not be.
        "periodic": (torch.arange(x.numel()) % 21 == 0).float().view_as(x) * 9 + x.abs(),
    }[kind]
    keep = round(density * score.numel())
    assert torch.equal(selection.largest(score, keep), by_sorting(score, keep))


@settings(max_examples=200)
@given(
    values=st.lists(st.integers(0, 5), min_size=1, max_size=40),
    data=st.data(),
)
def test_small_selection_equals_a_stable_sort(values, data) -> None:
    score = torch.tensor(values, dtype=torch.float32)
    keep = data.draw(st.integers(0, len(values)))
    assert torch.equal(selection.largest(score, keep), by_sorting(score, keep))
    assert torch.equal(selection.largest_per_row(score[None], keep)[0], by_sorting(score, keep))


@settings(max_examples=200)
@given(group=st.integers(1, 12), groups=st.integers(1, 4), data=st.data())
def test_groups_equal_a_stable_sort(group, groups, data) -> None:
    keep = data.draw(st.integers(0, group))
    values = data.draw(st.lists(st.integers(0, 3), min_size=group * groups, max_size=group * groups))
    score = torch.tensor(values, dtype=torch.float32)
    expected = torch.cat([by_sorting(part, keep) for part in score.split(group)])
    assert torch.equal(selection.largest_per_group(score[None], keep, group)[0], expected)


@pytest.mark.parametrize("select", [selection.largest, selection.largest_per_row])
def test_nan_is_refused(select) -> None:
    with pytest.raises(ValueError, match="NaN"):
        select(torch.tensor([[1.0, float("nan"), 0.0]]), 1)
