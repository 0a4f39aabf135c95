"""The written catalogue says what trying everything says."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_catalogue_and_its_page_are_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts/write_catalogue.py"))
    found = script["capabilities"]()
    assert script["CATALOGUE"].read_text(encoding="utf-8") == script["as_json"](found), "run: make catalogue"
    assert script["PAGE"].read_text(encoding="utf-8") == script["as_page"](found), "run: make catalogue"


def test_it_tells_what_fits() -> None:
    content = json.loads((ROOT / "admm_prune/assets/catalogue.json").read_text(encoding="utf-8"))
    pairs = {(pair["solver"], pair["problem"]): pair for pair in content["pairs"]}
    assert pairs["ADMM", "LayerReconstruction"]["fits"]
    assert not pairs["ADMM", "SurrogateFree"]["fits"]
    assert "SurrogateFree lacks prox" in pairs["ADMM", "SurrogateFree"]["why"]
