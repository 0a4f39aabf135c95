"""The packages of examples/plugins, as if they were installed: their module and their entry points on sys.path."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

PACKAGES = sorted((Path(__file__).parent.parent / "examples/plugins").iterdir())


@pytest.fixture
def plugged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts all of them on sys.path, each with the dist-info that installing it would write; gives their place."""
    place = tmp_path / "site"
    place.mkdir()
    modules = []
    for package in PACKAGES:
        project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
        info = place / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        groups = project["entry-points"].items()
        (info / "entry_points.txt").write_text(
            "".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups)
        )
        for source in package.glob("*.py"):
            (place / source.name).write_text(source.read_text())
            modules.append(source.stem)
    monkeypatch.syspath_prepend(place)
    yield place
    for name in modules:
        sys.modules.pop(name, None)
