"""One declaration of settings: a field that is added to it is found everywhere, without another edit."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import admm_prune
from admm_prune.cli import common
from admm_prune.cli.app import app
from admm_prune.errors import UserError
from admm_prune.methods.target import Target
from admm_prune.plan.plan import make_plan
from admm_prune.runs.compare import ComparisonSettings
from admm_prune.runs.recipe_schema import schema
from admm_prune.settings import PlanSettings, Settings, TextSettings, options
from tests.edited_package import insert, run_edited

FIELD = '    softness: float | None = option(None, "How soft.", least=0.25, commands="run compare plan")\n'
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
compared = said("compare", "--model", model, "--data", data, "--methods", "magnitude", "--sparsity", "0.5",
                "--softness", "0.5", "--out", "compared", "--json")
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
    "compared": json.loads(compared)["settings"],
    "verified": json.loads(said("verify", "compared", "--json"))["outcome"],
}, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> tuple[Path, dict[str, Any]]:
    """What the package shows of a setting that was added to its declaration: the folder of a run, and the rest."""
    place = tmp_path_factory.mktemp("edited")
    insert(place, Path("settings.py"), FIELD, above="    steps: int | None = _training(\n")
    return place / "pruned", run_edited(place, SCRIPT, model_folder, text_file)


@pytest.mark.slow
def test_a_field_is_an_argument_of_prune_and_of_plan(found: tuple[Path, dict[str, Any]]) -> None:
    for name in ("prune", "make_plan"):
        assert "softness: 'float | None' = None" in found[1]["signature"][name]
        assert "    softness: How soft.\n" in found[1]["docstring"][name]
    assert found[1]["refusal"] == "softness must be at least 0.25, not 0.1"


@pytest.mark.slow
def test_a_field_is_an_option_of_the_command_line(found: tuple[Path, dict[str, Any]]) -> None:
    for name in ("run", "plan", "compare"):
        assert re.search(r"--softness .*x>=0.25.* How soft\.", found[1]["help"][name])


@pytest.mark.slow
def test_a_field_is_in_recipes_and_in_the_manifest(found: tuple[Path, dict[str, Any]]) -> None:
    folder, shown = found
    assert shown["schema"]["softness"]["description"] == "How soft."
    assert {"minimum": 0.25, "type": "number"} in shown["schema"]["softness"]["anyOf"]
    assert "\nsoftness: 0.75\n" in (folder / "recipe.yaml").read_text()
    assert json.loads((folder / "admm_prune.json").read_text())["settings"]["softness"] == 0.75
    assert (shown["repeated"]["softness"], shown["replaced"]["softness"]) == (0.75, 2.0)


@pytest.mark.slow
def test_a_field_is_in_the_manifest_of_a_comparison(found: tuple[Path, dict[str, Any]]) -> None:
    assert found[1]["compared"]["softness"] == 0.5
    assert found[1]["verified"] == "verified"


def test_a_comparison_takes_the_settings_that_compare_has_options_for() -> None:
    run = Settings("embedded", stream=True)
    with pytest.raises(UserError, match="a comparison takes no stream"):
        ComparisonSettings(run=run, methods=("wanda",), targets=(Target(0.5),))


@pytest.mark.parametrize("kind", [TextSettings, Settings, PlanSettings])
def test_every_field_is_described(kind: type) -> None:
    for name, declared in options(kind).items():
        assert declared.help.endswith("."), name
        panels = ("Pruning", "Structured pruning", "Training", "Text", "Run", "Tasks", "Machine")
        assert declared.group in panels, name
        assert {*declared.commands.split()} <= {word.name for word in app.registered_commands}, name


def test_prune_takes_the_fields_of_its_settings_and_no_others() -> None:
    parameters = inspect.signature(admm_prune.prune).parameters
    assert set(parameters) == set(options(Settings))
    assert next(iter(parameters)) == "model"
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsty'"):
        admm_prune.prune("embedded", sparsty=0.5)
    with pytest.raises(UserError, match="distillation must be at least 0"):
        admm_prune.prune("embedded", method="elsa", sparsity=0.5, distillation=float("nan"))
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


@pytest.mark.parametrize("name", ["activation_memory", "distillation", "memory", "device_memory"])
def test_no_number_of_the_command_line_is_nan(name: str) -> None:
    """Old versions of click find it in every range."""
    typed = {one.spelled: one.typed_default for one in options(PlanSettings).values() if "plan" in one.commands.split()}
    command = common.takes("plan", PlanSettings)(lambda **_: None)
    command(**typed | {name: 0.5})
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be a number, not nan"):
        command(**typed | {name: float("nan")})


@pytest.mark.parametrize("kind", [Settings, PlanSettings])
def test_every_number_of_python_is_in_its_range(kind: Any) -> None:
    floats = {name: one for name, one in options(kind).items() if one.typed in (float, float | None)}
    assert len(floats) >= 2
    for name, declared in floats.items():
        assert declared.least is not None, name
        with pytest.raises(UserError, match=f"{name} must be"):
            kind("embedded", **{name: float("nan")})


def test_the_schema_has_what_recipes_keep() -> None:
    content = schema()
    kept = {name: one for name, one in options(Settings).items() if one.saved_in == "recipe"}
    text = {name for name, one in kept.items() if one.group == "Text"}
    assert set(content["$defs"]["Text"]["properties"]) == text
    own = {"name", "summary", "source", "deviations", "expected", "objects", "text"}
    assert set(content["properties"]) - own == kept.keys() - text
