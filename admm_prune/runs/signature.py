"""Functions with the signature and the documentation of the fields of a settings class."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, TypeVar

from admm_prune.errors import did_you_mean, named_extra
from admm_prune.settings import options

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")


def takes(
    kind: Callable[P, S], command: str | None = None, *, also: Collection[str] = ()
) -> Callable[[Callable[[S], R]], Callable[P, R]]:
    """Decorator that turns a function of settings into a function of their fields. In its docstring, one line for each
    field replaces "{options}".

    Args:
        kind: the class of the settings.
        command: document only the fields that are options of this command.
        also: fields to document in addition.
    """
    declared = options(kind)

    def wrap(function: Callable[[S], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **given: P.kwargs) -> R:
            for name in given:
                if name not in declared:
                    near = did_you_mean(name, declared)
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument '{name}'{near}")
            try:
                return function(kind(*args, **given))
            except ModuleNotFoundError as error:
                raise named_extra(error) or error from error

        signature = inspect.signature(kind)
        first, *others = sorted(signature.parameters.values(), key=lambda p: list(declared).index(p.name))
        returns = inspect.signature(function).return_annotation
        made: Any = call
        made.__signature__ = signature.replace(parameters=[first, *others], return_annotation=returns)
        made.__annotations__ = {p.name: p.annotation for p in (first, *others)} | {"return": returns}
        lines = [
            textwrap.fill(f"{name}: {one.help} {one.python}", 116, initial_indent="    ", subsequent_indent="        ")
            for name, one in declared.items()
            if command is None or command in one.commands.split() or name in also
        ]
        made.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("    {options}", "\n".join(lines))
        return call

    return wrap
