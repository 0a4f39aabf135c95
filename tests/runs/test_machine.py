"""PeakMemory against allocations of known size; the free memory of the host, as a control group limits it."""

from __future__ import annotations

import gc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from admm_prune.runs import machine
from admm_prune.runs.machine import PeakMemory, free_bytes, peak_resident_bytes


@pytest.fixture(autouse=True)
def collected() -> None:
    """Garbage of other tests must not be collected within a measurement."""
    gc.collect()


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


def nested() -> tuple[float, float]:
    """The peaks in MiB of a measurement and of one within it."""
    with PeakMemory() as outer:
        block = touch(200)
        del block
        with PeakMemory() as inner:
            block = touch(50)
            del block
    return outer.extra_mib, inner.extra_mib


def test_one_measurement_within_another_takes_nothing_from_it() -> None:
    """In a process of its own: one that has run other tests may return memory of theirs meanwhile."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        outer, inner = pool.submit(nested).result()
    assert outer == pytest.approx(200, rel=0.15)
    assert inner == pytest.approx(50, rel=0.3)


def test_the_peak_of_the_process_outlives_measurements() -> None:
    """They reset the kernel's mark: what a whole run took must not become what its last phase took."""
    block = touch(400)
    highest = peak_resident_bytes()
    del block
    with PeakMemory():
        block = touch(20)
        del block
    assert peak_resident_bytes() >= highest - 2**21  # pages that the kernel counts late


@pytest.mark.gpu
def test_the_peak_on_a_device_is_what_torch_allocated_there() -> None:
    with PeakMemory("cuda") as memory:
        block = torch.ones(200 * 2**20, dtype=torch.uint8, device="cuda")
        del block
    assert memory.extra_mib == pytest.approx(200, abs=1)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"max": "1000", "current": "700"}, 300),
        ({"max": "1000", "current": "700", "stat": "anon 100\ninactive_file 250\nactive_file 350\n"}, 550),
        ({"max": "1000", "current": "700", "stat": "not what a kernel writes"}, 300),
        ({"max": "1000", "current": "1200", "stat": "inactive_file 0\n"}, 0),
        ({"max": "max", "current": "700", "stat": "inactive_file 250\n"}, 4000),
        ({"max": "1000000", "current": "700"}, 4000),
        ({}, 4000),
    ],
)
def test_free_memory_is_that_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: int
) -> None:
    """Pages of files that were read are not in use: a model that was read once leaves as much memory as before."""
    for name, content in files.items():
        (tmp_path / f"memory.{name}").write_text(content)
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    monkeypatch.setattr(machine, "_meminfo", lambda _: 4000)
    assert free_bytes("cpu") == free
