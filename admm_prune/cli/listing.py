"""admm-prune list: the available methods, solvers, problems and constraints, and the modules of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from admm_prune.cli import common

_KINDS = ("methods", "references", "problems", "constraints", "plugins", "solvers", "modules")
_TABLES: Mapping[str, tuple[str, str]] = {
    "methods": ("methods (run, compare; layer-wise methods: solve)", "name"),
    "references": ("references for small layers (solve)", "name"),
    "problems": ("problems", "--problem"),
    "constraints": ("constraints; for N:M use --pattern", "--constraint"),
}


def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            help=f"What to list: {', '.join(_KINDS[:-1])}, or modules (of --model); by default all but modules.",
            autocompletion=lambda: list(_KINDS),
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Of modules: 'embedded', the default, a from_pretrained folder, or a Hub id."),
    ] = None,
    trust_remote_code: common.TrustRemoteCode = False,
    why: Annotated[bool, typer.Option("--why", help="Of solvers: also say why a solver refuses a problem.")] = False,
    json: common.Json = False,
) -> None:
    """List methods, solvers, problems, constraints and plug-ins, or the prunable modules of a model.

    Example: admm-prune list modules --model embedded
    """
    from admm_prune.errors import UserError, unknown

    if kind is not None and kind not in _KINDS:
        raise unknown("kind", kind, _KINDS)
    if why and kind not in (None, "solvers"):
        raise UserError(f"--why is for the solvers, not for {kind}: give 'list solvers --why'")
    if kind == "modules":
        _list_modules(model or "embedded", json, trust_remote_code)
        return
    if model is not None or trust_remote_code:
        raise UserError("a model is for its modules: give 'list modules --model ...'")
    content = _catalogue()
    if json:
        keys = (kind,) if kind in ("methods", "references", "problems", "constraints", "plugins") else ("pairs", "fits")
        common.emit(content if kind is None else {key: content[key] for key in keys})
        return
    for one, (title, option) in _TABLES.items():
        if kind in (None, one):
            _show_named(title, option, content[one])
    if kind in (None, "plugins") and (content["plugins"] or kind):
        rows = [[p["name"], p["kind"], p["package"], p["object"]] for p in content["plugins"]]
        common.show_table("plug-ins of installed packages", ["name", "kind", "package", "object"], rows, prose=True)
    if kind in (None, "solvers"):
        _show_fits("solver x problem", content["pairs"], "problem", why)
        _show_fits("method x constraint, on a small LayerReconstruction", content["fits"], "constraint", why)


def _catalogue() -> dict[str, Any]:
    from admm_prune.methods.parts import all_declared

    content = common.catalogue()
    content["plugins"] = all_declared()
    names = {
        "solvers": {m["name"] for m in (*content["methods"], *content["references"])},
        "problems": {x["option"] for x in content["problems"]},
        "constraints": {x["option"] for x in content["constraints"]},
    }
    for plugin in content["plugins"]:
        if plugin["name"] in names[plugin["kind"]]:
            plugin["object"] += " (cannot be used: the name is built in)"
    return content


def _show_named(title: str, option: str, rows: list[dict[str, Any]]) -> None:
    if option == "name":
        common.show_table(title, [option, "description"], [[m["name"], m["summary"]] for m in rows], prose=True)
    else:
        table = [[x["name"], x["option"], x["summary"]] for x in rows]
        common.show_table(title, ["class", option, "description"], table, prose=True)


def _show_fits(title: str, tried: list[dict[str, Any]], column: str, why: bool) -> None:
    fits = {(t["solver"], t[column]): t for t in tried}
    solvers, columns = (list(dict.fromkeys(key[i] for key in fits)) for i in (0, 1))
    matrix = [[s, *("yes" if fits[s, c]["fits"] else "no" for c in columns)] for s in solvers]
    common.show_table(title, ["", *columns], matrix)
    for pair, fit in fits.items():
        if why and not fit["fits"]:
            print(f"{pair[0]}, {pair[1]}: {fit['why']}")


def _list_modules(source: str, json: bool, trust_remote_code: bool) -> None:
    """The modules that --targets, --ignore and --override select from; weights are not read."""
    from admm_prune.plan.anatomy import Anatomy

    blocks = Anatomy.of(source, trust_remote_code=trust_remote_code).blocks
    modules = [
        {
            "name": view.module_name,
            "block": block.name,
            "class": type(view.module).__name__,
            "shape": list(view.shape),
        }
        for block in blocks
        for view in block.weights
    ]
    if json:
        common.emit({"model": source, "blocks": [block.name for block in blocks], "modules": modules})
        return
    counts: dict[tuple[str, str, str], int] = {}
    for module in modules:
        name = str(module["name"]).removeprefix(f"{module['block']}.")
        shape = "{} x {}".format(*module["shape"])
        key = (re.sub(r"\.\d+(?=\.|$)", ".*", name), str(module["class"]), shape)  # the experts of a mixture are alike
        counts[key] = counts.get(key, 0) + 1
    rows = [[*key, f"{count:,}"] for key, count in counts.items()]
    title = f"{source}: {len(modules):,} matrices in {len(blocks)} blocks, {blocks[0].name} to {blocks[-1].name}"
    common.show_table(title, ["module of a block", "class", "out x in", "count"], rows)
    kinds = " or ".join(dict.fromkeys(type(block.module).__name__ for block in blocks))
    print(f"The blocks are of class {kinds}. --targets, --ignore and --override take the end of a name, such as")
    print(f"{rows[0][0].rpartition('.')[2]}, a whole name ({modules[0]['name']}), a class, or re:REGEX.")
