"""One declaration of settings: a field that is added to it is found everywhere, without another edit."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import admm_prune
from admm_prune.cli.app import app
from admm_prune.errors import UserError
from admm_prune.plan.plan import make_plan
from admm_prune.runs.recipe_schema import schema
from admm_prune.settings import PlanSettings, Settings, TextSettings, options

PACKAGE = Path(admm_prune.__file__).parent
FIELD = '    softness: float | None = option(None, "How soft.", least=0.25)\n'
SCRIPT = """
import contextlib, inspect, io, json, sys
import admm_prune
from admm_prune.cli import main
from admm_prune.errors import UserError
from admm_prune.plan.plan import make_plan

def said(*arguments):
    sys.argv = ["admm-prune", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try: main()
        except SystemExit as end: assert not end.code, arguments
    return out.getvalue()

model, data = sys.argv[1:]
how = {"method": "magnitude", "sparsity": 0.5, "data": data, "device": "cpu"}
admm_prune.prune(model, **how, softness=0.75, out="pruned")
try: refusal = admm_prune.prune(model, **how, softness=0.1)
except UserError as error: refusal = str(error)
json.dump({
    "signature": {f.__name__: str(inspect.signature(f)) for f in (admm_prune.prune, make_plan)},
    "docstring": {f.__name__: f.__doc__ for f in (admm_prune.prune, make_plan)},
    "help": {name: said(name, "--help") for name in ("run", "plan", "compare")},
    "schema": json.loads(said("recipe", "schema"))["properties"],
    "repeated": json.loads(said("run", "--recipe", "pruned", "--dry-run", "--json"))["recipe"],
    "replaced": json.loads(said("run", "--recipe", "pruned", "--softness", "2", "--dry-run", "--json"))["recipe"],
    "refusal": refusal,
}, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> tuple[Path, dict[str, Any]]:
    """What the package shows of a setting that was added to its declaration: the folder of a run, and the rest."""
    place = tmp_path_factory.mktemp("edited")
    (place / "admm_prune").mkdir()
    for path in PACKAGE.iterdir():
        if path.name not in ("settings.py", "__pycache__"):
            (place / "admm_prune" / path.name).symlink_to(path)
    source = (PACKAGE / "settings.py").read_text(encoding="utf-8")
    above = "    steps: int | None = option(\n"
    assert source.count(above) == 1
    (place / "admm_prune/settings.py").write_text(source.replace(above, FIELD + above), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "120"}
    command = [sys.executable, "-c", SCRIPT, str(model_folder), str(text_file)]
    subprocess.run(command, check=True, cwd=place, env=environment)
    return place / "pruned", json.loads((place / "found.json").read_text())


def test_a_field_is_an_argument_of_prune_and_of_plan(found: tuple[Path, dict[str, Any]]) -> None:
    for name in ("prune", "make_plan"):
        assert "softness: 'float | None' = None" in found[1]["signature"][name]
        assert "    softness: How soft.\n" in found[1]["docstring"][name]
    assert found[1]["refusal"] == "softness must be at least 0.25, not 0.1"


def test_a_field_is_an_option_of_the_command_line(found: tuple[Path, dict[str, Any]]) -> None:
    for name in ("run", "plan"):
        assert re.search(r"--softness .*x>=0.25.* How soft\.", found[1]["help"][name])
    assert "--softness" not in found[1]["help"]["compare"], "whose settings are its own"


def test_a_field_is_in_recipes_and_in_the_manifest(found: tuple[Path, dict[str, Any]]) -> None:
    folder, shown = found
    assert shown["schema"]["softness"]["description"] == "How soft."
    assert {"minimum": 0.25, "type": "number"} in shown["schema"]["softness"]["anyOf"]
    assert "\nsoftness: 0.75\n" in (folder / "recipe.yaml").read_text()
    assert json.loads((folder / "admm_prune.json").read_text())["settings"]["softness"] == 0.75
    assert (shown["repeated"]["softness"], shown["replaced"]["softness"]) == (0.75, 2.0)


@pytest.mark.parametrize("kind", [TextSettings, Settings, PlanSettings])
def test_every_field_is_described(kind: type) -> None:
    for name, declared in options(kind).items():
        assert declared.help.endswith("."), name
        assert declared.group in ("Pruning", "Text", "Run", "Machine"), name
        assert {*declared.commands.split()} <= {word.name for word in app.registered_commands}, name


def test_prune_takes_the_fields_of_its_settings_and_no_others() -> None:
    parameters = inspect.signature(admm_prune.prune).parameters
    assert set(parameters) == set(options(Settings))
    assert next(iter(parameters)) == "model"
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsty'"):
        admm_prune.prune("embedded", sparsty=0.5)
    with pytest.raises(UserError, match="length must be at least 2, not 1"):
        make_plan("embedded", sparsity=0.5, length=1)


@pytest.mark.parametrize("name", ["run", "reproduce", "compare", "plan", "capture", "solve", "eval"])
def test_a_command_has_the_options_that_name_it(name: str) -> None:
    command: Any = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    declared = options(PlanSettings if name == "plan" else Settings).values()
    expected = {one.spelled: one.help for one in declared if name in one.commands.split()}
    assert (
        expected.items() <= {parameter.name: getattr(parameter, "help", None) for parameter in command.params}.items()
    )


def test_the_schema_has_what_recipes_keep() -> None:
    content = schema()
    kept = {name: one for name, one in options(Settings).items() if one.saved_in == "recipe"}
    text = {name for name, one in kept.items() if one.group == "Text"}
    assert set(content["$defs"]["Text"]["properties"]) == text
    own = {"name", "summary", "source", "deviations", "objects", "text"}
    assert set(content["properties"]) - own == kept.keys() - text
