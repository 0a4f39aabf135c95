"""Lists phrases and identifiers that the project has replaced by plain ones; exit status 1 if there are any.

python scripts/check_words.py [--phrases | --names]

Phrases are searched in the READMEs, CONTRIBUTING.md, docs/, the templates of reports, and in the docstrings, comments,
messages and help texts of the package; identifiers (names, attributes, arguments, functions, classes, modules) in its
syntax trees.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "admm_prune"

# Metaphors and literal translations; regular expressions, matched in text without regard to line breaks.
PHRASES = (
    r"the house", r"let go\b", r"lets? .{1,30} go\b", r"hands? on\b", r"goes on\b", r"go on (with|from|within|at)\b",
    r"went on\b", r"what (comes|came) (of|out of)\b", r"gains by it", r"what that cost", r"asked for\b",
    r"is asked (of|by)\b", r"(is|are|was|were|be) told\b", r"told (from|apart|by|truly)\b", r"says what\b",
    r"\btwins?\b",
    r"(?<!`)\bjudges?\b(?![`:,(])", r"\bjudged\b(?!:)", r"\bjudging (the|tokens|batch)", r"\bdoctor\b", r"made up for",
    r"makes? up for", r"to the bit\b", r"to the byte\b", r"by the bit\b", r"left as it (is|was)\b",
    r"stays? as (it is|they are)\b", r"(was|were|is|are) at hand\b", r"at work on\b", r"falls to\b", r"played back",
    r"for good\b", r"(has|have|had) to go\b", r"nothing is the matter", r"no part in\b", r"whose turn\b",
    r"into being", r"promise is broken", r"broken promise", r"begin anew", r"(one|a) bit a weight",
    r"(bytes?|questions|process|file|message|sequences) a (weight|step|target|task|model|sequence)\b", r"unlike blocks",
    r"blocks unlike", r"\blocal\.md\b",
)  # fmt: skip

# Identifiers of the former vocabulary, each with its replacement.
NAMES = {
    "Residence": "Offloading", "hollow": "is_offloaded",
    "Shelf": "ActivationStore", "shelf": "store", "Flow": "BatchState", "Visit": "BlockResult",
    "walk": "for_each_block",
    "judge": "validation_loss", "judges": "validation", "judged": "validated", "judging": "validation",
    "Judgement": "Evaluation", "twin": "reference", "trusted": "skip_nan_check", "Polish": "Refit", "polish": "refit",
    "doctor": "diagnostics", "Later": "DeferredGradient", "later": "deferred", "boldness": "lr_multiplier",
    "tightened": "scaled_to", "Branch": "Sublayer", "branch": "sublayer", "branches": "sublayers",
    "handed": "broadcast", "gathered": "all_gather", "from_first": "broadcast_from_rank0",
    "here": "local", "own_rows": "local_shard",
    "told": "what the thing is", "found": "what the thing is", "kept": "what the thing is", "own": "what the thing is",
    "wanted": "what the thing is", "asked": "what the thing is",
}  # fmt: skip
METHODS = {"total": "all_reduce", "share": "column_slice"}  # as methods only: `world.total(x)`


def text_of(path: Path) -> Iterator[tuple[int, str]]:
    """(first line, text) of the docstrings, other strings of several words, and comments of a module."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value
    comments = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    yield from ((token.start[0], token.string) for token in comments)


def phrases(path: Path) -> Iterator[tuple[int, str]]:
    """(line, phrase) for every phrase in a page or in the text of a module."""
    texts = text_of(path) if path.suffix == ".py" else [(1, path.read_text(encoding="utf-8"))]
    for first, text in texts:
        for phrase in PHRASES:
            for hit in re.finditer(phrase.replace(" ", r"\s+"), text, flags=re.IGNORECASE):
                yield first + text.count("\n", 0, hit.start()), " ".join(hit.group().split())


def names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name and its replacement) for every identifier of NAMES in a module, and every method of METHODS."""
    if path.stem in NAMES:
        yield 1, f"{path.name} -> {NAMES[path.stem]}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(attr=used)) if used in METHODS:
                yield node.lineno, f"{used} -> {METHODS[used]}"
                continue
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                used = name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                used = name
            case ast.alias(name=name, asname=alias):
                used = alias or name
            case _:
                continue
        if used.strip("_") in NAMES:
            yield node.lineno, f"{used} -> {NAMES[used.strip('_')]}"


def main(arguments: list[str]) -> int:
    modules = sorted(PACKAGE.rglob("*.py"))
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "collection/README.md")]
    pages += sorted([*(ROOT / "docs").rglob("*.md"), *(PACKAGE / "assets").rglob("*.md"), *PACKAGE.rglob("*.j2")])
    count = 0
    for option, search, files in (("--phrases", phrases, [*pages, *modules]), ("--names", names, modules)):
        if not arguments or option in arguments:
            for path in files:
                for line, hit in sorted(search(path)):
                    print(f"{path.relative_to(ROOT)}:{line}: {hit}")
                    count += 1
    print(f"{count} found")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
