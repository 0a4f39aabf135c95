"""Problems of the collection as a benchmark of benchopt: a folder that `benchopt run` takes.

    python -m collection.export_benchopt OUT [--layers PATTERN]
    benchopt run OUT

The checker decides about every solution; to compare another solver is to add a file to OUT/solvers. Stacks of rows are
left out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

from admm_prune.errors import UserError
from collection import build, record

TEMPLATE = Path(__file__).parent / "benchopt"


def export(out: Path, pattern: str = "*") -> list[Path]:
    """Writes the benchmark to a new folder and returns the problem files in it.

    Raises:
        FileNotFoundError: no layer of this name is built.
        UserError: a file has other content than the manifest.
        FileExistsError: `out` is there.
    """
    chosen = [name for name, entry in build.manifest().items() if fnmatch(name, pattern) and entry["module"] != "rows"]
    files = [path for name in chosen if (path := build.place_of(name)).exists()]
    if not files:
        raise FileNotFoundError(f"no layer that is built matches '{pattern}'")
    for file in files:
        build.problems_of(file.stem)  # the records are for the content of the manifest
    shutil.copytree(TEMPLATE, out, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("benchmark_utils", "problems"):
        (out / folder).mkdir()
    (out / "benchmark_utils/__init__.py").touch()
    for name in ("checker.py", "sets.py"):
        shutil.copyfile(Path(__file__).parent / name, out / "benchmark_utils" / name)
    shutil.copyfile(record.TABLE, out / "records.csv")
    return [Path(shutil.copyfile(file, out / "problems" / file.name)) for file in files]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", default="*", help="a pattern of their ids, such as 'stories260k.*'")
    given = parser.parse_args(arguments)
    try:
        written = export(given.out, given.layers)
    except (OSError, UserError) as error:
        sys.exit(f"export_benchopt: {error}")
    print(f"{len(written)} layers in {given.out}: benchopt run {given.out}")


if __name__ == "__main__":
    main()
