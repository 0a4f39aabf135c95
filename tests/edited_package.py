"""The package with one line more in one module, all else as it is, used in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import admm_prune

PACKAGE = Path(admm_prune.__file__).parent


def insert(place: Path, module: Path, line: str, *, above: str) -> None:
    """Makes the package in `place` by links, but for a module (a path in the package), which gets a line."""
    for folder in reversed(module.parents):
        (place / "admm_prune" / folder).mkdir()
        for path in (PACKAGE / folder).iterdir():
            if not (PACKAGE / module).is_relative_to(path) and path.name != "__pycache__":
                (place / "admm_prune" / folder / path.name).symlink_to(path)
    source = (PACKAGE / module).read_text(encoding="utf-8")
    assert source.count(above) == 1
    (place / "admm_prune" / module).write_text(source.replace(above, line + above), encoding="utf-8")


def run_edited(place: Path, script: str, *arguments: object) -> Any:
    """Runs a script with the package in `place`; returns what it wrote to found.json."""
    environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, cwd=place, env=environment)
    return json.loads((place / "found.json").read_text())
