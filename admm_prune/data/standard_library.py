"""The embedded corpus: source and documentation of the running interpreter's standard library.

Every machine that runs this package has this text, so none is committed. A module is held out when a fixed hash of its
name says so, hence the split is the same for every Python release and the embedded model never saw a held-out module.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 10

# Test suites are packaged apart on some systems; the code pages of `encodings` and the build's
# configuration dump are tables, not language.
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings"})
_SKIPPED_PREFIX = "_sysconfigdata"


def is_held_out(module: str) -> bool:
    """sha256(module name) mod 10 == 0: a tenth of the modules, the same ones on every machine."""
    return hashlib.sha256(module.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def modules(root: Path | None = None, *, tests: bool = False) -> Iterator[tuple[str, str]]:
    """Yields (dotted module name, source text) in the order of the names.

    Args:
        root: the library's folder; the running interpreter's own by default.
        tests: yield the test suites instead of the library proper; they may be absent.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1] or parts
        if not _SKIPPED_FOLDERS.isdisjoint(parts) or parts[-1].startswith(_SKIPPED_PREFIX):
            continue
        if _TEST_FOLDERS.isdisjoint(parts) != tests:
            found.append((".".join(parts), path))
    for name, path in sorted(found):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test modules are written in other encodings on purpose
            continue
        if text.strip():
            yield name, text


def documents(held_out: bool, root: Path | None = None) -> list[str]:
    """The text of the held-out modules, or of all the others, one document a module."""
    return [text for name, text in modules(root) if is_held_out(name) == held_out]
