"""Tries every solver on every problem and set, and writes down what was found: for `admm-prune list` and the docs.

python scripts/write_catalogue.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from admm_prune.recipes.listing import capabilities

ROOT = Path(__file__).resolve().parents[1]
CATALOGUE = ROOT / "admm_prune/assets/catalogue.json"
PAGE = ROOT / "docs/reference/matrix.md"

HEAD = """# Problem x solver

Tried out by `make catalogue` on tiny problems, not written down by hand; a test holds this page to the code. A pair
that does not fit raises a `TypeError` that names both sides and what is missing; the reasons stand below each table.
"""


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def as_page(content: dict[str, Any]) -> str:
    """Markdown: methods, the two tables, and why not."""
    lines = [HEAD, "## Solvers and problems", ""]
    lines += _table(content["pairs"], "problem")
    lines += ["", "## Layer methods and sparse sets", "", "On a small `LayerReconstruction`.", ""]
    lines += _table(content["fits"], "constraint")
    for title, key in (("Problems", "problems"), ("Sparse sets", "constraints")):
        lines += ["", f"## {title}", "", "| class | on the command line | what it is |", "|---|---|---|"]
        lines += [f"| `{x['name']}` | {_code(x['option'])} | {_cell(x['summary'])} |" for x in content[key]]
    lines += ["", "## Methods", "", "| name | what it does |", "|---|---|"]
    lines += [f"| `{x['name']}` | {_cell(x['summary'])} |" for x in content["methods"]]
    lines += ["", "References for small layers:", "", "| name | what it does |", "|---|---|"]
    lines += [f"| `{x['name']}` | {_cell(x['summary'])} |" for x in content["references"]]
    return "\n".join(lines) + "\n"


def _table(tried: list[dict[str, Any]], column: str) -> list[str]:
    fits = {(t["solver"], t[column]): t for t in tried}
    solvers, columns = (list(dict.fromkeys(key[i] for key in fits)) for i in (0, 1))
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| `{s}` | {' | '.join('yes' if fits[s, c]['fits'] else 'no' for c in columns)} |" for s in solvers]
    reasons: dict[tuple[str, str], list[str]] = {}
    for (solver, other), found in fits.items():
        if not found["fits"]:
            reasons.setdefault((solver, found["why"].replace(other, "it")), []).append(other)
    told = (f"- `{solver}`, {', '.join(others)}: {_cell(why)}" for (solver, why), others in reasons.items())
    return [*lines, "", *told]


def _cell(text: str) -> str:
    """Text that markdown leaves as it is."""
    for sign in ("\\", "|", "*", "_", "<", "[", "{"):
        text = text.replace(sign, "\\" + sign if sign != "<" else "&lt;")
    return text


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def main() -> None:
    content = capabilities()
    CATALOGUE.write_text(as_json(content), encoding="utf-8")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(as_page(content), encoding="utf-8")
    print(f"{CATALOGUE.relative_to(ROOT)} and {PAGE.relative_to(ROOT)} are written")


if __name__ == "__main__":
    main()
