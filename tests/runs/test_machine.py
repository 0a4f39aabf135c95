"""The free memory of the host, as a control group limits it."""

from __future__ import annotations

from pathlib import Path

import pytest

from admm_prune.runs import machine
from admm_prune.runs.machine import free_bytes


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
