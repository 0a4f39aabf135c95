"""Bytes, launches and waits of the GPU kernels, counted in Triton's interpreter, against the committed counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial

import pytest

from admm_prune.ops import backend
from benchmarks import traffic

pytestmark = pytest.mark.skipif(not backend.interpreted(), reason="Triton compiles for the GPU of this machine")
COMMITTED = {row["step"]: row for row in json.loads(traffic.AFTER.read_text(encoding="utf-8"))}
BEFORE = {row["step"]: row for row in json.loads(traffic.BEFORE.read_text(encoding="utf-8"))}


def test_the_page_is_up_to_date() -> None:
    written = traffic.PAGE.read_text(encoding="utf-8")
    assert written == traffic.page(), "run: python -m benchmarks.traffic --report"


def test_the_counts_are_what_was_asked_for() -> None:
    assert COMMITTED["threshold"]["bytes"] <= 2
    for name in ("mask", "mask, bfloat16 with ties", "mask of 2^15 scores"):
        assert COMMITTED[name]["bytes"] <= 3
    for name in traffic.CONFIGURATIONS:
        assert COMMITTED[name]["kernels"] <= 4
        assert COMMITTED[name]["waits"] == 1
    assert COMMITTED["SparseAdam"]["bytes"] < 40  # Adam with clipping
    for name in ("70 %", "2:4"):
        step, solve = (f"ADMM: {part}, {name}" for part in ("two iterations", "default solve"))
        assert COMMITTED[step]["launches"] <= 8
        assert COMMITTED[step]["waits"] == 0
        assert COMMITTED[solve]["launches"] < BEFORE[solve]["launches"] / 2
    for name, row in COMMITTED.items():
        assert row["waits"] <= BEFORE[name]["waits"]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(partial(traffic.training_steps, ["SparseAdam"]), id="SparseAdam"),
        pytest.param(traffic.training_steps, marks=pytest.mark.slow),
        pytest.param(traffic.admm_steps, marks=pytest.mark.slow),
        pytest.param(traffic.eliminations, marks=pytest.mark.slow),
        pytest.param(traffic.selections, marks=pytest.mark.slow),
    ],
)
def test_what_is_counted_again_is_what_was_committed(rows: Callable[[], Iterable[traffic.Row]]) -> None:
    for row in rows():
        expected = COMMITTED[row["step"]]
        assert row["bytes"] == pytest.approx(expected["bytes"], rel=0.02), row["step"]
        assert row["kernels"] == expected["kernels"], row["step"]
        assert row["launches"] <= expected["launches"] + 2, row["step"]  # operators of torch may be made of others
        assert row["waits"] <= expected["waits"], row["step"]


def test_copies_and_waits_are_counted() -> None:
    import torch

    x, on_host = torch.ones(1000), torch.ones(5)

    def work() -> None:
        (x + 1).view(10, 100)
        x.sum().item()
        (on_host + 1).tolist()
        x.cpu().tolist()

    found = traffic.of(work, [on_host])
    assert dict(found.launches) == {"add": 1, "sum": 1}
    assert found.read >= 8000
    assert found.written >= 4000
    assert found.waits == 2
