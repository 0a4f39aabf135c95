"""admm-prune list: what there is, and what fits what."""

from __future__ import annotations

from admm_prune.cli import common


def list_(json: common.Json = False) -> None:
    """List methods, solvers, problems and constraints, and which solver fits which problem, or why not.

    Example: admm-prune list
    """
    from admm_prune.recipes.listing import capabilities

    content = capabilities()
    if json:
        common.emit(content)
        return
    methods = [[m["name"], m["summary"]] for m in content["methods"]]
    common.show_table("methods (run, compare, solve)", ["name", "what it does"], methods, prose=True)
    references = [[m["name"], m["summary"]] for m in content["references"]]
    common.show_table("references for small layers (solve)", ["name", "what it does"], references, prose=True)
    problems = [[p["name"], p["summary"]] for p in content["problems"]]
    common.show_table("problems", ["name", "what is kept"], problems, prose=True)
    constraints = [[c["name"], c["summary"]] for c in content["constraints"]]
    common.show_table("constraints", ["name", "set"], constraints, prose=True)
    fits = {(f["solver"], f["constraint"]): f for f in content["fits"]}
    solvers, columns = (list(dict.fromkeys(key[i] for key in fits)) for i in (0, 1))
    matrix = [[s, *("yes" if fits[s, c]["fits"] else "no" for c in columns)] for s in solvers]
    common.show_table("solver x constraint, on a small LayerReconstruction", ["solver", *columns], matrix)
    for fit in fits.values():
        if not fit["fits"]:
            print(f"{fit['solver']}, {fit['constraint']}: {fit['why']}")
