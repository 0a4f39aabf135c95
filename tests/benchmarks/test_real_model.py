"""The benchmarks on real models, on a tiny one: rows that are measured once, tables, and BLiMP as a task."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from benchmarks import pruning_time, real_model
from benchmarks.journal import Record


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two files of three pairs each, and one without pairs, as BLiMP has them."""
    path = tmp_path / "blimp.tar.xz"
    with tarfile.open(path, "w:xz") as files:
        pairs = [
            {"sentence_good": f"the cat sat {n}", "sentence_bad": f"cat the sat {n}", "UID": "x"} for n in range(3)
        ]
        for name, rows in (("agreement", pairs), ("islands", pairs), ("summary", [{"UID": "x", "gpt2": 0.9}])):
            content = "\n".join(map(json.dumps, rows)).encode()
            member = tarfile.TarInfo(f"{name}.jsonl")
            member.size = len(content)
            files.addfile(member, io.BytesIO(content))
    return path


def record(method: str, target: str, seed: int, perplexity: float, blimp: float) -> Record:
    row = dict.fromkeys(real_model.COLUMNS, "1")
    row |= {"perplexity": str(perplexity), "blimp": str(blimp), "blimp_error": "0.01", "settings": "2 sequences"}
    return {"model": "tiny", "target": target, "method": method, "seed": str(seed), **row}


DENSE = record("dense", "dense", 0, 6.0, 0.8)


def test_ratios_are_to_sparsegpt_on_the_same_draw() -> None:
    rows = real_model.rows_of(
        [
            DENSE,
            record("magnitude", "0.6", 0, 60.0, 0.5),
            *(record("sparsegpt", "0.6", seed, 10.0 + seed, 0.6) for seed in range(2)),
            *(record("admm", "0.6", seed, 8.0 + 2 * seed, 0.7) for seed in range(2)),
        ]
    )
    by_method = {row["method"]: row for row in rows}
    assert by_method["admm"]["ratio"] == pytest.approx((8 / 10 + 10 / 11) / 2)
    assert by_method["sparsegpt"]["ratio"] == pytest.approx(1.0)
    assert by_method["magnitude"]["ratio"] == pytest.approx((60 / 10 + 60 / 11) / 2)
    assert by_method["admm"]["draws"] == 2
    table = real_model.text_table(rows, "head")
    assert "0.855" in table
    assert "published ratios, OPT-125M: D2Prune 0.876" in table
    lines = real_model.markdown(rows).splitlines()
    assert lines[0] == "| method | 60 % |"
    assert "| admm | 9.0 (0.85) |" in lines
    assert "| SparseLLM, published for OPT-125M | (0.95) |" in lines


def test_an_order_that_blimp_contradicts_is_named_beyond_two_standard_errors() -> None:
    rows = real_model.rows_of([DENSE, record("admm", "0.5", 0, 8.0, 0.60), record("wanda", "0.5", 0, 9.0, 0.70)])
    (found,) = real_model.inversions(rows)
    assert found.startswith("at 0.5, wanda has 0.700 on BLiMP and admm 0.600, with perplexities of 9.0 and 8.0")
    rows = real_model.rows_of([DENSE, record("admm", "0.5", 0, 8.0, 0.60), record("wanda", "0.5", 0, 9.0, 0.62)])
    assert real_model.inversions(rows) == []


@pytest.mark.slow
def test_a_grid_is_measured_once(
    tmp_path: Path, model_folder: Path, text_file: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = [str(out), "--model", str(model_folder), "--data", str(text_file), "--eval-data", str(text_file)]
    words += ["--methods", "magnitude,sparsegpt", "--targets", "0.5,2:4", "--samples", "2", "--length", "32"]
    words += ["--eval-samples", "2", "--blimp", str(archive), "--pairs", "2", "--draws", "0.5:2"]
    real_model.main(words)
    rows = json.loads((out / "real_model.json").read_text())["rows"]
    assert [(row["target"], row["method"], row["draws"]) for row in rows] == [
        ("0.5", "magnitude", 1), ("0.5", "sparsegpt", 2), ("2:4", "magnitude", 1), ("2:4", "sparsegpt", 1),
    ]  # fmt: skip
    assert all(row["sparsity"] == pytest.approx(0.5) and 0 <= row["blimp"] <= 1 for row in rows)
    assert len((out / "blimp" / "pairs.jsonl").read_text().splitlines()) == 4
    assert (out / "real_model.png").stat().st_size > 1000
    assert not list(out.glob("*/model.safetensors")), "pruned models are deleted"
    kept = {path.name for path in (out / "sparsegpt-0.5-1").iterdir()}
    assert kept == {"admm_prune.json", "timings.json", "recipe.yaml"}
    monkeypatch.setattr(real_model, "command", lambda *words: pytest.fail("measured again"))
    real_model.main(words)


def test_a_run_that_was_stopped_is_resumed_and_has_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, commands = tmp_path / "out", []

    def command(*words: object) -> tuple[dict[str, object], float]:
        commands.append(words)
        if words[0] == "eval":
            return {"perplexity": 8.0, "bits_per_char": 1.0, "tokens": 64}, 10.0
        folder = out / "wanda-0.5-0"
        folder.mkdir()
        (folder / "admm_prune.json").write_text('{"texts": {"calibration": {"tokens": 128}}}')
        return {"sparsity": 0.5, "seconds": 3.0}, 20.0

    monkeypatch.setattr(real_model, "command", command)
    (out / "wanda-0.5-0.partial").mkdir(parents=True)
    words = [str(out), "--model", "tiny", "--data", "a", "--eval-data", "b", "--methods", "wanda", "--targets", "0.5"]
    real_model.main(words)
    assert [words[0] for words in commands] == ["eval", "run", "eval"]
    assert "--resume" in commands[1]
    (row,) = json.loads((out / "real_model.json").read_text())["rows"]
    assert (row["perplexity"], row["dense"], row["tokens"]) == (8.0, 8.0, 128)
    assert row["pruning_seconds"] is row["seconds"] is None
    assert "wanda" in (out / "real_model.txt").read_text()


def test_phases_cover_the_wall_clock(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    out = tmp_path / "time"
    words = [str(out), "--model", str(model_folder), "--data", str(text_file), "--samples", "4", "--length", "32"]
    pruning_time.main([*words, "--methods", "wanda --refit block", "--threads", "1", "--blocks", "1"])
    (row,) = json.loads(Path(f"{out}.json").read_text())["rows"]
    assert (row["method"], row["tokens"]) == ("wanda --refit block", 4 * 32)
    phases = row["phases"]
    assert {*pruning_time.INSIDE, "opening the model", "writing the model", "loading the folder again"} < set(phases)
    assert all(phases[name] > 0 for name in pruning_time.INSIDE)
    assert sum(phases[name] for name in pruning_time.INSIDE) <= row["pruning"] <= row["wall"]
    assert sum(phases.values()) <= row["wall"]
    assert set(row["floors"]) < set(phases)
    assert row["floors"]["moments"] > 0
    assert "of two forward passes" in Path(f"{out}.txt").read_text()


def test_blimp_is_made_of_pairs_alone(tmp_path: Path, archive: Path) -> None:
    folder = real_model.blimp(archive, tmp_path, 2)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert rows == [{"sentence_good": f"the cat sat {n}", "sentence_bad": f"cat the sat {n}"} for n in (0, 1)] * 2
