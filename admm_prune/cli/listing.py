"""admm-prune list: the available methods, solvers, problems and constraints."""

from __future__ import annotations

import json as json_
from importlib.resources import files
from typing import Any

from admm_prune.cli import common


def list_(json: common.Json = False) -> None:
    """List methods, solvers, problems, constraints and plug-ins, and which solver accepts which problem.

    Example: admm-prune list
    """
    from admm_prune.methods.parts import all_declared

    # Written by `make catalogue`, which tries every pair: reading it needs no heavy imports.
    content: dict[str, Any] = json_.loads((files("admm_prune") / "assets/catalogue.json").read_text(encoding="utf-8"))
    content["plugins"] = all_declared()
    names = {
        "solvers": {m["name"] for m in (*content["methods"], *content["references"])},
        "problems": {x["option"] for x in content["problems"]},
        "constraints": {x["option"] for x in content["constraints"]},
    }
    for plugin in content["plugins"]:
        if plugin["name"] in names[plugin["kind"]]:
            plugin["object"] += " (cannot be used: the name is built in)"
    if json:
        common.emit(content)
        return
    methods = [[m["name"], m["summary"]] for m in content["methods"]]
    common.show_table("methods (run, compare; layer-wise methods: solve)", ["name", "description"], methods, prose=True)
    references = [[m["name"], m["summary"]] for m in content["references"]]
    common.show_table("references for small layers (solve)", ["name", "description"], references, prose=True)
    for title, key, option in (
        ("problems", "problems", "--problem"),
        ("constraints; for N:M use --pattern", "constraints", "--constraint"),
    ):
        rows = [[x["name"], x["option"], x["summary"]] for x in content[key]]
        common.show_table(title, ["class", option, "description"], rows, prose=True)
    if content["plugins"]:
        rows = [[p["name"], p["kind"], p["package"], p["object"]] for p in content["plugins"]]
        common.show_table("plug-ins of installed packages", ["name", "kind", "package", "object"], rows, prose=True)
    _show_fits("solver x problem", content["pairs"], "problem")
    _show_fits("method x constraint, on a small LayerReconstruction", content["fits"], "constraint")


def _show_fits(title: str, tried: list[dict[str, Any]], column: str) -> None:
    fits = {(t["solver"], t[column]): t for t in tried}
    solvers, columns = (list(dict.fromkeys(key[i] for key in fits)) for i in (0, 1))
    matrix = [[s, *("yes" if fits[s, c]["fits"] else "no" for c in columns)] for s in solvers]
    common.show_table(title, ["", *columns], matrix)
    for pair, fit in fits.items():
        if not fit["fits"]:
            print(f"{pair[0]}, {pair[1]}: {fit['why']}")
