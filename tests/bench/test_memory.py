"""The benchmark of memory, with processes that report known figures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from admm_prune.bench import memory
from admm_prune.bench.memory import LlamaShape
from admm_prune.errors import UserError
from admm_prune.runs.journal.folder import MANIFEST

GROWING, DEEPER = (LlamaShape(128, 1), LlamaShape(256, 2)), (LlamaShape(128, 1), LlamaShape(128, 2))


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "FAMILIES", {"growing": GROWING, "deeper": DEEPER})


def test_what_the_processes_report_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, commands = iter(((3.0, 1.5), (12.0, 4.0), (5.0, 2.0), (5.0, 3.0))), []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        config = json.loads((Path(command[3]) / "config.json").read_text())
        assert (config["hidden_size"], config["num_hidden_layers"]) == [(128, 1), (256, 2), (128, 1), (128, 2)][
            len(commands) - 1
        ]
        mib, seconds = next(figures)
        return subprocess.CompletedProcess(
            command, 0, f"a warning\n{json.dumps({'mib': mib, 'seconds': seconds})}\n", ""
        )

    monkeypatch.setattr(memory.subprocess, "run", run)
    content = memory.bench_memory(tmp_path / "out", tokens=512, sparsity=0.25)
    assert [command[:3] + command[5:] for command in commands] == [
        [sys.executable, "-m", "admm_prune.bench.memory", "512", "0.25"]
    ] * 4
    sizes = [shape.parameters for shape in (*GROWING, *DEEPER)]
    assert [peak["parameters"] for peak in content["peaks"]] == sizes
    assert [peak["peak_mib"] for peak in content["peaks"]] == [3.0, 12.0, 5.0, 5.0]
    assert [peak["seconds"] for peak in content["peaks"]] == [1.5, 4.0, 2.0, 3.0]
    assert [peak["weights_mib"] for peak in content["peaks"]] == [round(n / 2**18, 1) for n in sizes]
    assert content["exponents"]["growing"] == pytest.approx(math.log(4) / math.log(sizes[1] / sizes[0]))
    assert content["exponents"]["deeper"] == pytest.approx(0)
    assert "--tokens 512 --sparsity 0.25" in content["command"]
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == content
    table = (tmp_path / "out/memory.txt").read_text()
    assert f"growing: peak ~ N^{content['exponents']['growing']:.3f}" in table
    assert (tmp_path / "out/memory.png").stat().st_size > 1000


def test_a_process_that_fails_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError: no memory\n")
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="M parameters: the process failed: MemoryError: no memory"):
        memory.bench_memory(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fewer_than_two_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--most 1000 leaves fewer than two models: give at least"):
        memory.bench_memory(tmp_path / "out", most=1000)


@pytest.mark.parametrize(("tokens", "given"), [(1000, 1024), (255, 256), (0, 256), (-256, 256), (257, 512)])
def test_tokens_that_fill_no_whole_sequences_are_refused(tokens: int, given: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--tokens {tokens} is not a multiple of 256, .*: give {given}$"):
        memory.bench_memory(tmp_path / "out", tokens=tokens)
    assert not (tmp_path / "out").exists()


def test_all_tokens_are_in_sequences() -> None:
    assert [row.ids.shape[0] for row in memory.random_tokens(768).rows] == [256] * 3
