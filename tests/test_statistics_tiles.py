"""Statistics of inputs in panels and tiles beside the formulas at once: their sizes are made small."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from admm_prune import statistics
from admm_prune.statistics import GramAccumulator, LayerStatistics, TargetAccumulator
from tests.unchanged import unchanged

DTYPES = [torch.float32, torch.float64]
WIDTH, TOKENS = 11, 53


def drawn(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=[1, 3, 4, 11])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    size: int = request.param
    for name, value in (("_TILE", size), ("_NARROWEST", size), ("_PANELS", WIDTH), ("_PIECE", 7), ("_SHORT", 5)):
        monkeypatch.setattr(statistics, name, value)
    return size


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if torch.float32 in (dtype, found.dtype) else 1e-12
    torch.testing.assert_close(found.double(), expected, atol=tolerance * float(expected.abs().max()), rtol=tolerance)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_grams(weighted: bool, centre: bool, dtype: torch.dtype) -> None:
    x = drawn(TOKENS, WIDTH, dtype) + 2
    weights = drawn(TOKENS, 1, torch.float64, 1)[:, 0].abs() if weighted else None
    total = GramAccumulator(WIDTH, centre=centre)
    with unchanged(x, *([] if weights is None else [weights])):
        total.add(x[:30], None if weights is None else weights[:30])
        total.add(x[30:], None if weights is None else weights[30:], lengths=(3, 20))
    wide, s = x.double(), torch.ones(TOKENS, dtype=torch.float64) if weights is None else weights
    expected = (wide * s[:, None]).T @ wide
    close(total.gram, expected, dtype)
    assert torch.equal(total.gram, total.gram.T)
    for chosen in (slice(0, 0), slice(2, 5), slice(3, None), slice(0, 1)):
        assert torch.equal(total.rows(chosen), total.gram[chosen])
    close(total.mean, wide.mean(0), dtype)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_joined_tokens(dtype: torch.dtype) -> None:
    x, held = drawn(TOKENS, WIDTH, dtype) + 2, drawn(20, WIDTH, dtype, 1)
    x[:, 4] = 3  # constant
    parts = [GramAccumulator(WIDTH, centre=True) for _ in range(3)]
    for part, inputs in zip(parts, (x[:40], x[40:], held), strict=True):
        part.add(inputs)
    found = LayerStatistics.collected(*parts, centre=True)
    wide = x.double()
    away = wide - wide.mean(0)
    assert found.validation is not None
    assert found.holdout is not None
    assert found.centred is not None
    close(found.gram, wide.T @ wide, dtype)
    close(found.validation, wide[40:].T @ wide[40:], dtype)
    close(found.holdout, held.double().T @ held.double(), dtype)
    close(found.centred, away.T @ away, dtype)
    assert not found.centred[4].any()
    assert not found.centred[:, 4].any()


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centre", [False, True])
def test_correlations_with_targets(centre: bool, dtype: torch.dtype) -> None:
    x, y = drawn(TOKENS, WIDTH, dtype) + 2, drawn(TOKENS, 5, dtype, 1) - 1
    total = TargetAccumulator(5, WIDTH, centre=centre)
    with unchanged(x, y):
        total.add(x, y, lengths=(3, 50))
    close(total.correlation, y.double().T @ x.double(), dtype)
    close(total.total, y.double().sum(0), dtype)
    assert total.energy == pytest.approx(float(y.double().square().sum()), rel=1e-6)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetry_is_decided_over_all_tiles(dtype: torch.dtype) -> None:
    x = drawn(TOKENS, WIDTH, torch.float64)
    gram = x.T @ x
    gram = ((gram + gram.T) / 2).to(dtype)
    with unchanged(gram):
        statistics.check_gram("H", gram, WIDTH)
        assert statistics.symmetric(gram) is gram
    for i, j in ((0, WIDTH - 1), (WIDTH - 1, 0), (WIDTH - 1, WIDTH - 2), (4, 3)):
        other = gram.clone()
        other[i, j] += 0.1 * float((gram[i, i] * gram[j, j]).sqrt())
        with unchanged(other):
            with pytest.raises(ValueError, match="H is not symmetric"):
                statistics.check_gram("H", other, WIDTH)
            found = statistics.symmetric(other)
        torch.testing.assert_close(found, (other + other.T) / 2)
        assert torch.equal(found, found.T)
