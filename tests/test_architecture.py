"""Architecture: which folder may import which, without circles, how long a module may be, and its docstring.

Reads the source with `ast`; imports nothing of the package but its table of public names.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import admm_prune

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "admm_prune"
MAX_LINES = 500
MIN_LINES = 40  # of code, of a module with a single importer

WORDS = {"point", "problem", "result"}
MATHEMATICS = WORDS | {"errors", "ops"}

# What each module or folder of the package may import of the package, beside itself. A name stands for all below it.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "point": WORDS,
    "problem": WORDS,
    "result": WORDS,
    "ops": set(),
    "statistics": MATHEMATICS,
    "prunable": {"errors"},
    "problems": MATHEMATICS | {"prunable", "statistics"},
    "solvers": MATHEMATICS | {"prunable"},
    "data": {"errors", "statistics"},
    "models": MATHEMATICS | {"data", "prunable", "statistics"},
    "methods": MATHEMATICS | {"data", "models", "prunable", "problems", "solvers", "statistics"},
}
MAY_IMPORT["testing"] = MATHEMATICS | {"problems", "solvers"}
MAY_IMPORT["settings"] = {"errors", "data", "methods", "problems", "solvers"}  # for types alone, but errors
MAY_IMPORT["runs"] = {*MAY_IMPORT["methods"], "methods", "settings"}
for beside in ("bench", "inference", "plan", "verify"):
    MAY_IMPORT[beside] = {*MAY_IMPORT["runs"], "runs"}
MAY_IMPORT["cli"] = {*MAY_IMPORT["runs"], "runs", "bench", "inference", "plan", "verify", "__init__"}
MAY_IMPORT["__main__"] = {"cli"}
TESTERS = {"cli.check_plugin"}  # the modules that may import the conformance kit
MAY_IMPORT["__init__"] = set(MAY_IMPORT) - {"__main__"}

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path
    for folder in ("admm_prune", "benchmarks", "collection", "docs", "examples", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def dotted(path: Path) -> str:
    """'problems.constraints.blocks' for its file: the name inside the package; '__init__' for the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {dotted(path) for path in MODULES}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) for all that a module imports, at its top or inside; names of `from` are appended."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}" if node.module else prefix) for alias in node.names)
        elif isinstance(node, ast.Call) and called(node).endswith("import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def called(node: ast.Call) -> str:
    """The last part of the name of the function."""
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def ours(name: str) -> str | None:
    """The part of the package that an import reaches: the longest prefix that is a module. None where it is not ours.

    A name of the public table counts as the module that holds it, and the version as nothing.
    """
    head, _, rest = name.partition(".")
    if head != "admm_prune" or rest == "__version__":
        return None
    rest = admm_prune._HOME.get(rest, name).removeprefix("admm_prune").removeprefix(".")
    while rest and rest not in NAMES:
        rest = rest.rpartition(".")[0]
    return rest or "__init__"


def allowed(importer: str, target: str) -> bool:
    """True where the table lets `importer` (dotted) reach `target` (dotted)."""
    home = importer.partition(".")[0]
    if importer in TESTERS and target.partition(".")[0] == "testing":
        return True
    return any(target == room or target.startswith(f"{room}.") for room in {home, *MAY_IMPORT[home]})


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_go_one_way() -> None:
    new = {dotted(path).partition(".")[0] for path in MODULES} - set(MAY_IMPORT)
    assert not new, "a new folder: add what it may import to MAY_IMPORT"
    wrong = [
        f"{relative(path)}:{line} imports {target}"
        for path in MODULES
        for line, name in imported(parsed(path))
        if (target := ours(name)) is not None and not allowed(dotted(path), target)
    ]
    assert not wrong, wrong


def test_imports_are_absolute_and_avoid_the_root_links() -> None:
    wrong = [
        f"{relative(path)}:{line} {name}"
        for path in SOURCES
        for line, name in imported(parsed(path))
        if name.partition(".")[0] in {"", "solvers", "problems"}
    ]
    assert not wrong, wrong


def test_no_module_is_too_long() -> None:
    lines = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {path: count for path, count in lines.items() if count > MAX_LINES}, "split it"


def test_a_small_module_has_two_importers() -> None:
    importers: dict[str, set[str]] = {name: set() for name in NAMES}
    for path in MODULES:
        for _, name in imported(parsed(path)):
            target = ours(name)
            if target is not None and target != dotted(path):
                importers[target].add(dotted(path))
    wrong = [
        relative(path)
        for path in MODULES
        if path.name not in ("__init__.py", "__main__.py")
        and not dotted(path).startswith("cli.")  # a module for each command
        and lines_of_code(path) < MIN_LINES
        and len(importers[dotted(path)]) < 2
    ]
    assert not wrong, f"{wrong}: merge it with its only importer"


def lines_of_code(path: Path) -> int:
    """Lines with a statement or a part of one, without docstrings."""
    tree = parsed(path)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    lines = path.read_text(encoding="utf-8").splitlines()
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in docstrings
        for number, line in enumerate(lines, 1)
    )


def test_every_module_says_what_it_is() -> None:
    wrong = [relative(path) for path in MODULES if not ast.get_docstring(parsed(path))]
    assert not wrong, f"{wrong}: no docstring"


def test_annotations_are_not_evaluated() -> None:
    wrong = [
        relative(path)
        for path in SOURCES
        if annotated(parsed(path)) and "__future__.annotations" not in {name for _, name in imported(parsed(path))}
    ]
    assert not wrong, f"{wrong}: write: from __future__ import annotations"


def annotated(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.AnnAssign)
        or (isinstance(node, ast.arg) and node.annotation is not None)
        or (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None)
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("name", ["solvers", "problems"])
def test_the_root_shows_the_two_halves(name: str) -> None:
    assert (ROOT / name).is_symlink()
    assert (ROOT / name).resolve() == PACKAGE / name


@pytest.mark.parametrize(
    ("importer", "statement", "fits"),
    [
        ("problems.layer", "from admm_prune.ops import selection", True),
        ("problems.layer", "from admm_prune import problem", True),
        ("problems.layer", "from admm_prune.errors import UserError", True),
        ("problems.layer", "from admm_prune.solvers.admm import ADMM", False),
        ("problems.layer", "from admm_prune import ADMM", False),
        ("problems.layer", "from admm_prune import __version__", True),
        ("problems.layer", "import admm_prune", False),
        ("solvers.admm", "def f():\n    import admm_prune.problems.layer", False),
        ("solvers.admm", "import_module('admm_prune.problems.layer')", False),
        ("solvers.admm", "from admm_prune.solvers.base import Iterative", True),
        ("models.capture", "from admm_prune.statistics import GramAccumulator", True),
        ("models.capture", "from admm_prune import statistics", True),
        ("models.capture", "from admm_prune.problems.constraints import NofM", False),
        ("data.text", "from admm_prune.models import blocks", False),
        ("data.layer_file", "from admm_prune.problems.layer import LayerReconstruction", False),
        ("methods.api", "from admm_prune.solvers.admm import ADMM", True),
        ("methods.api", "from admm_prune.runs import journal", False),
        ("runs.journal", "from admm_prune.cli import main", False),
        ("point", "from admm_prune.errors import UserError", False),
        ("ops.selection", "from admm_prune.point import Point", False),
        ("cli.run", "import admm_prune", True),
        ("testing.solvers", "from admm_prune.solvers.base import Solver", True),
        ("testing.solvers", "from admm_prune.methods import layerwise", False),
        ("solvers.admm", "from admm_prune.testing.instances import layer", False),
        ("runs.prune", "from admm_prune.testing import assert_solver_conforms", False),
        ("cli.run", "from admm_prune import testing", False),
        ("cli.check_plugin", "from admm_prune import testing", True),
    ],
)
def test_the_reader_of_imports_sees(importer: str, statement: str, fits: bool) -> None:
    targets = [target for _, name in imported(ast.parse(statement)) if (target := ours(name)) is not None]
    assert all(allowed(importer, target) for target in targets) == fits


@cache
def classes_of_methods() -> set[str]:
    """Names of all classes that are defined in methods/."""
    trees = (parsed(path) for path in MODULES if dotted(path).startswith("methods"))
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def class_checks(tree: ast.AST, classes: set[str]) -> Iterator[tuple[int, str]]:
    """Yields (line, class) wherever an object is told apart by one of the classes that a module imports from methods/:
    isinstance and issubclass, a comparison of types, a `case` of that class, a table with classes as keys."""
    names = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("admm_prune.methods")
        for alias in node.names
    }
    for node in ast.walk(tree):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.Call) and called(node) in {"isinstance", "issubclass"}:
            found = [*node.args[1:]]
        elif isinstance(node, ast.Compare):
            found = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchClass):
            found = [node.cls]
        elif isinstance(node, ast.Dict):
            found = [*node.keys]
        for part in (inner for outer in found if outer is not None for inner in _types(outer)):
            if isinstance(part, ast.Name) and names.get(part.id) in classes:
                yield node.lineno, names[part.id]
            elif isinstance(part, ast.Attribute) and ast.unparse(part.value) in names and part.attr in classes:
                yield node.lineno, part.attr


def _types(node: ast.expr) -> Iterator[ast.expr]:
    """The expression itself, or those of a tuple or a union."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        for inner in node.elts:
            yield from _types(inner)
    elif isinstance(node, ast.BinOp):
        yield from _types(node.left)
        yield from _types(node.right)
    else:
        yield node


def test_no_module_outside_of_methods_checks_for_a_class_of_theirs() -> None:
    wrong = [
        f"{relative(path)}:{line} {name}"
        for path in MODULES
        if not dotted(path).startswith("methods")
        for line, name in class_checks(parsed(path), classes_of_methods())
    ]
    assert not wrong, f"{wrong}: ask for a capability of methods/base.py instead"


@pytest.mark.parametrize(
    ("statement", "fits"),
    [
        ("isinstance(x, Trained)", False),
        ("isinstance(x, int | Trained)", False),
        ("isinstance(x, (int, Trained))", False),
        ("isinstance(x, trained.Trained)", False),
        ("issubclass(type(x), Trained)", False),
        ("type(x) is Trained", False),
        ("type(x) in (int, Trained)", False),
        ("plan = {Trained: 1}[type(x)]", False),
        ("match x:\n    case Trained():\n        pass", False),
        ("isinstance(x, Elsewhere)", True),
        ("isinstance(x, int)", True),
        ("x: Trained = Trained()", True),
    ],
)
def test_the_reader_of_class_checks_sees(statement: str, fits: bool) -> None:
    imports = "from admm_prune.methods.elsa import trained\nfrom admm_prune.methods.elsa.trained import Trained\n"
    tree = ast.parse(f"{imports}from somewhere import Elsewhere\n{statement}")
    assert (not list(class_checks(tree, {"Trained", "Elsewhere"}))) == fits


def test_the_protocol_of_a_method_loads_no_solver() -> None:
    listing = (
        "import sys, admm_prune.methods.base; print(*(name for name in sys.modules if name.startswith('admm_prune')))"
    )
    loaded = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True).stdout.split()
    assert "admm_prune.methods.base" in loaded
    wrong = [name for name in loaded if name.split(".")[1:2] in (["solvers"], ["problems"])]
    assert not wrong, wrong
