"""Errors that the user can correct."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import SequenceMatcher, get_close_matches
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

_EXTRAS: Mapping[str, tuple[str, ...]] = {  # the packages of each extra, under the names by which they are imported
    "models": ("huggingface_hub", "pydantic", "tokenizers", "transformers", "yaml"),
    "text": ("datasets", "pyarrow"),
    "plots": ("jinja2", "matplotlib"),
    "cli": ("rich", "typer"),
}


class UserError(ValueError):
    """Invalid input; the message is one line that states the problem and the remedy.

    The command line prints it without a traceback and exits with status 2. Any other exception is a bug.
    """


class NonFiniteError(UserError, ArithmeticError):
    """Of all points that a solver met, none has a finite value."""


class WriteError(UserError):
    """A file of a run cannot be written, for example on a full disk. The journal adds what work it has kept."""

    @classmethod
    def of(cls, place: Path, error: OSError) -> Self:
        """The error for a file or folder, with the reason that the operating system gives."""
        return cls(f"cannot write to {place}: {error.strerror or error}")


class MissingExtraError(UserError, ImportError):
    """A package of an extra is not installed; the message names the extra.

    Args:
        package: the name by which it is imported.
    """

    def __init__(self, package: str) -> None:
        super().__init__(f"this needs the package {package}: pip install 'admm-prune[{_extra_of(package)}]'")


class RemoteCodeError(UserError):
    """A model or a tokenizer needs code that comes with it, and the user has not permitted to run it.

    Args:
        source: the model as the user named it.
    """

    def __init__(self, source: str) -> None:
        super().__init__(f"{source}: it needs code that comes with it, which is run only with --trust-remote-code")


def named_extra(error: ModuleNotFoundError) -> MissingExtraError | None:
    """The error for a package that could not be imported; None if it does not belong to an extra."""
    package = (error.name or "").partition(".")[0]
    return MissingExtraError(package) if _extra_of(package) else None


def check_installed(*packages: str) -> None:
    """Raises MissingExtraError if one of these packages is not installed; imports nothing."""
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(package)


def optional_module(name: str) -> Any:
    """Imports a module that needs the package of an extra.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise named_extra(error) or error from error


def _extra_of(package: str) -> str:
    return next((extra for extra, packages in _EXTRAS.items() if package in packages), "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'sparsegpt'?)" for a misspelled name, to insert into a message; empty if no name is similar."""
    by_lower = {one.lower(): one for one in known}
    matches = get_close_matches(name.lower(), by_lower, n=3)
    ratios = [SequenceMatcher(None, name.lower(), match).ratio() for match in matches]
    nearest = [f"'{by_lower[match]}'" for match, ratio in zip(matches, ratios, strict=True) if ratio == max(ratios)]
    return f" (did you mean {' or '.join(nearest)}?)" if nearest else ""


def unknown(what: str, name: str, known: Iterable[str], otherwise: str = "") -> UserError:
    """The error for an unknown name, which lists the known names and suggests a similar one.

    Args:
        what: what the name is for, such as "method".
        otherwise: an alternative to the known names, for the end of the message.
    """
    if re.fullmatch(r"[\w.]+:\w+", name):
        return UserError(
            f"'{name}' is no name of a {what}: MODULE:ATTRIBUTE is for 'check-plugin'; declare an entry point, or pass "
            "the object to admm_prune.prune"
        )
    names = list(known)
    listed = ", ".join([*names, *([otherwise] if otherwise else [])])
    return UserError(f"unknown {what} '{name}'{did_you_mean(name, names)}: choose one of {listed}")


_TYPES: Mapping[str, tuple[type, str]] = {  # the parts of an annotation: their types, and their names in messages
    "bool": (bool, "True or False"),
    "int": (Integral, "an integer"),
    "float": (Real, "a number"),
    "str": (str, "a string"),
    "Path": (Path, "a path"),
    "Sequence[str]": (Sequence, "a sequence of strings"),
    "None": (type(None), "None"),
}


def check_type(name: str, annotation: str, value: object) -> None:
    """Raises UserError if a value does not have the annotated type. Only annotations with plain types are checked."""
    parts = annotation.split(" | ")
    if not all(part in _TYPES for part in parts):
        return
    fits = isinstance(value, tuple(_TYPES[part][0] for part in parts)) and not isinstance(value, bytes)
    if isinstance(value, bool):
        fits = "bool" in parts
    elif isinstance(value, Sequence) and not isinstance(value, str):
        fits = fits and all(isinstance(one, str) for one in value)
    if not fits:
        raise UserError(f"{name} must be {' or '.join(_TYPES[part][1] for part in parts)}, not {value!r}")


def check_at_least(settings: object, **least: float) -> None:
    """Raises UserError if a setting of a dataclass does not have its declared type, or is smaller than this, or NaN;
    None is not compared."""
    for name, lowest in least.items():
        value = _checked_number(settings, name)
        if value is not None and not value >= lowest:
            raise UserError(f"{name} of {type(settings).__name__} must be at least {lowest:g}, not {value}")


def check_positive(settings: object, *names: str) -> None:
    """Raises UserError if a setting of a dataclass does not have its declared type, or is not positive and finite; None
    is not compared."""
    for name in names:
        value = _checked_number(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} of {type(settings).__name__} must be positive and finite, not {value}")


def check_fractions(settings: object, *names: str) -> None:
    """Raises UserError if a setting of a dataclass does not have its declared type, or is not between 0 and 1."""
    for name in names:
        value = _checked_number(settings, name)
        if not 0 <= value <= 1:
            raise UserError(f"{name} of {type(settings).__name__} must lie between 0 and 1, not {value}")


def _checked_number(settings: Any, name: str) -> Any:
    """The value of a setting of a dataclass. Raises UserError if it does not have its declared type, or is NaN."""
    declared = next(one.type for one in fields(settings) if one.name == name)
    value, label = getattr(settings, name), f"{name} of {type(settings).__name__}"
    check_type(label, declared if isinstance(declared, str) else getattr(declared, "__name__", str(declared)), value)
    if isinstance(value, Real) and math.isnan(value):
        raise UserError(f"{label} must be a number, not nan")
    return value
