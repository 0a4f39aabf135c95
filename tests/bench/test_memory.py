"""PeakMemory against allocations of known size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from admm_prune.bench import memory
from admm_prune.errors import UserError
from admm_prune.runs.machine import PeakMemory, peak_resident_bytes


def touch(mib: int) -> np.ndarray:
    """Memory of this size, every page of it written."""
    return np.ones(mib * 2**20, dtype=np.uint8)


def test_the_peak_of_what_was_touched_and_freed_is_seen() -> None:
    with PeakMemory() as memory:
        block = touch(200)
        del block
    assert memory.extra_mib == pytest.approx(200, rel=0.15)


def test_what_came_before_does_not_count() -> None:
    before = touch(300)
    del before
    held = touch(50)
    with PeakMemory() as memory:
        block = touch(100)
        del block
    assert held[0] == 1
    assert memory.extra_mib == pytest.approx(100, rel=0.15)


def test_one_measurement_within_another_takes_nothing_from_it() -> None:
    with PeakMemory() as outer:
        block = touch(200)
        del block
        with PeakMemory() as inner:
            block = touch(50)
            del block
    assert outer.extra_mib == pytest.approx(200, rel=0.15)
    assert inner.extra_mib == pytest.approx(50, rel=0.3)


def test_the_peak_of_the_process_outlives_measurements() -> None:
    """They reset the kernel's mark: what a whole run took must not become what its last phase took."""
    block = touch(400)
    highest = peak_resident_bytes()
    del block
    with PeakMemory():
        block = touch(20)
        del block
    assert peak_resident_bytes() >= highest - 2**21  # pages that the kernel counts late


@pytest.mark.parametrize(("tokens", "given"), [(1000, 1024), (255, 256), (0, 256), (-256, 256), (257, 512)])
def test_tokens_that_fill_no_whole_sequences_are_refused(tokens: int, given: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--tokens {tokens} is not a multiple of 256, .*: give {given}$"):
        memory.bench_memory(tmp_path / "out", tokens=tokens)
    assert not (tmp_path / "out").exists()
    assert [row.ids.shape[0] for row in memory.random_tokens(768).rows] == [256] * 3


@pytest.mark.gpu
def test_the_peak_on_a_device_is_what_torch_allocated_there() -> None:
    with PeakMemory("cuda") as memory:
        block = torch.ones(200 * 2**20, dtype=torch.uint8, device="cuda")
        del block
    assert memory.extra_mib == pytest.approx(200, abs=1)
