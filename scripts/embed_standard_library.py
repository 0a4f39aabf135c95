"""Writes the embedded text: source and documentation of the running interpreter's standard library.

    python3.11 scripts/embed_standard_library.py

One JSON object a line, {"module": dotted name, "text": source}, in the order of the names. It is committed because
installed libraries differ: between releases, between distributors of one release (some package idlelib or the tests
apart), and in files that the build generates, which hold the paths of the machine.
"""

from __future__ import annotations

import gzip
import json
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "admm_prune" / "assets" / "standard_library"

# Test suites are packaged apart on some systems; the code pages of `encodings` are tables, not language.
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings"})
_GENERATED = ("_sysconfigdata", "config-")  # by the build: they hold the paths and the compiler flags of one machine


def modules(root: Path | None = None, *, tests: bool = False) -> Iterator[tuple[str, str]]:
    """Yields (dotted module name, source text) in the order of the names.

    Args:
        root: the library's folder; the running interpreter's own by default.
        tests: yield the test suites instead of the library proper; they may be absent.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1] or parts
        if not _SKIPPED_FOLDERS.isdisjoint(parts) or any(part.startswith(_GENERATED) for part in parts):
            continue
        if _TEST_FOLDERS.isdisjoint(parts) != tests:
            paths.append((".".join(parts), path))
    for name, path in sorted(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test modules are written in other encodings on purpose
            continue
        if text.strip():
            yield name, text


def main() -> None:
    lines = "".join(json.dumps({"module": name, "text": text}, ensure_ascii=False) + "\n" for name, text in modules())
    ASSETS.mkdir(parents=True, exist_ok=True)
    target = ASSETS / "modules.jsonl.gz"
    target.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))
    shutil.copy(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", ASSETS / "LICENSE.txt")
    print(f"{target.name}: CPython {platform.python_version()}, {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
