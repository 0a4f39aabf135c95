"""benchmarks.packed_matvec: every kind, number of tokens and of threads has its row, with bytes and ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import packed_matvec


@pytest.mark.parametrize("threads", ["1", pytest.param("1,2", marks=pytest.mark.slow)])
def test_every_kind_is_compared_with_dense_products(tmp_path: Path, threads: str) -> None:
    words = ["--shape", "64x96", "--sparsity", "0.5", "--tokens", "1,3", "--layers", "1", "--repeats", "2"]
    packed_matvec.main([str(tmp_path / "out.json"), *words, "--threads", threads])
    content = json.loads((tmp_path / "out.json").read_text())
    kinds, counts = ("packed", "dense", "dense-float32", "csr"), [int(count) for count in threads.split(",")]
    rows = {(row["tokens"], row["threads"], row["kind"]): row for row in content["rows"]}
    assert set(rows) == {(tokens, count, kind) for tokens in (1, 3) for count in counts for kind in kinds}
    assert rows[1, 1, "dense"]["bytes"] == 64 * 96 * 2
    for row in rows.values():
        least, most = row["range"]
        assert 0 < least <= row["seconds"] <= most
        assert row["ratio_range"][0] <= row["times_as_fast_as_dense"] <= row["ratio_range"][1]
        if row["threads"] == counts[0]:
            assert row["times_as_fast_as_first_threads"] == 1
        if row["kind"] == "dense":
            assert row["times_as_fast_as_dense"] == 1
    assert ("scaling_of_processes" in content) == (len(counts) > 1)
