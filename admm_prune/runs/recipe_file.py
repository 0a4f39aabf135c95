"""Recipe files: the settings of a run in YAML, saved with its weights, which can be edited and run again."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admm_prune.data.sources import PYTHON_OBJECT
from admm_prune.errors import UserError, unknown
from admm_prune.settings import names_of

if TYPE_CHECKING:
    from admm_prune.runs.recipe_schema import Recipe

RECIPE = "recipe.yaml"
MODULE = " (a PyTorch module)"  # in a manifest, after the class of a model that was passed as a module
_PARTS = ("method", "solver", "problem", "constraint")


def content_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The content of a recipe, from the settings in the manifest of a run; settings with default values are left out.

    What was passed as an object cannot be named in a file; it is described under "objects".
    """
    target, selection = settings["target"], settings["selection"]
    objects = objects_of(settings)
    named = {name: settings[name] for name in ("model", *_PARTS)}
    content: dict[str, Any] = {k: value for k, value in named.items() if value is not None and k not in objects}
    if target["pattern"] is not None:
        content["pattern"] = "{}:{}".format(*target["pattern"])
    else:
        content["sparsity"] = target["sparsity"]
    content |= {name: list(selection[name]) for name in ("targets", "ignore") if selection[name]}
    if selection["overrides"]:
        content["overrides"] = {pattern: _plain(override) for pattern, override in selection["overrides"]}
    text = {name: settings["text"][name] for name in names_of(text=True) if settings["text"][name] is not None}
    content["text"] = {name: value for name, value in text.items() if name not in objects}
    others = {
        name: settings[name] for name in names_of(saved_in=("recipe",), text=False) if name in settings.keys() - content
    }
    content |= {name: value for name, value in others.items() if _is_set(value) and name not in named}
    if objects:
        content["objects"] = objects
    return content


def objects_of(settings: dict[str, Any]) -> dict[str, str]:
    """Descriptions of the model, parts and texts that were passed to a run as objects, from its settings in the
    manifest; a recipe file cannot contain them."""
    parts = {name: settings[name] for name in _PARTS if settings[name] is not None}
    objects = {name: part for name, part in parts.items() if not re.fullmatch(r"[\w-]+", part)}
    if str(settings["model"]).endswith(MODULE):
        objects["model"] = settings["model"]
    return objects | {name: value for name, value in settings["text"].items() if value == PYTHON_OBJECT}


def written(content: dict[str, Any]) -> str:
    """The recipe as YAML, with keys in the order of the content."""
    import yaml

    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


def packaged_names() -> list[str]:
    """The names of the recipes in the package."""
    paths = files("admm_prune").joinpath("assets/recipes").iterdir()
    return sorted(path.name.removesuffix(".yaml") for path in paths if path.name.endswith(".yaml"))


def read_packaged(name: str) -> Recipe:
    """Reads a recipe of the package.

    Raises:
        UserError: there is no recipe of this name; the message lists the names.
    """
    if name not in packaged_names():
        raise unknown("recipe", name, packaged_names(), "or give a file to run --recipe")
    return _read(files("admm_prune").joinpath(f"assets/recipes/{name}.yaml").read_text(encoding="utf-8"), name)


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe from a file, or from the folder of a run.

    Raises:
        UserError: there is no such file, or it is not a recipe; the message names the first invalid field.
    """
    path = path / RECIPE if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from error
    return _read(text, str(path))


@cache
def _loader() -> Any:
    """A safe YAML loader that reads 2:4 as a string, not as 124 (2 and 4 in base 60), and 1e-3 as a number."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml declares no types
        pass

    numbers = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in numbers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    digits = list("-+.0123456789")
    Loader.add_implicit_resolver(numbers[0], re.compile(r"[-+]?[0-9]+\Z"), digits)
    Loader.add_implicit_resolver(
        numbers[1], re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z"), digits
    )
    return Loader


def _is_set(value: Any) -> bool:
    """Whether a value differs from the defaults None, False and empty sequences; 0 and 0.0 do."""
    return value is not None and value is not False and value not in ((), [])


def _plain(text: str) -> float | str:
    """The text as a number if possible, otherwise the text."""
    try:
        return float(text)
    except ValueError:
        return text


def _read(text: str, where: str) -> Recipe:
    import yaml

    from admm_prune.runs.recipe_schema import validated

    try:
        content = yaml.load(text, _loader())
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = "" if place is None else f", line {place.line + 1}"
        raise UserError(f"{where}{line}: not YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: a recipe is a mapping, such as 'model: embedded'")
    return validated(content, where)
