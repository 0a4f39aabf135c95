"""How the kit says that a promise is broken."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from admm_prune.point import Point


def named(thing: object) -> str:
    """The class of a thing, with those of its settings that are not the default ones where it is a dataclass."""
    kind = type(thing).__name__
    if not is_dataclass(thing):
        return kind
    shown = []
    for part in fields(thing):
        value = getattr(thing, part.name)
        if part.default is MISSING or value != part.default:
            inner = named(value) if is_dataclass(value) else repr(value)
            shown.append(f"{part.name}={inner}")
    return f"{kind}({', '.join(shown)})"


@dataclass(frozen=True)
class Case:
    """Who is checked, and on which input: the opening of every message."""

    owner: str
    input: str

    def but(self, more: str) -> Case:
        """The same case with more said of its input."""
        return replace(self, input=f"{self.input}, {more}")

    def promise(self, kept: bool, duty: str, found: str = "") -> None:
        """Raises AssertionError unless kept: '`owner` on `input` must `duty`; `found`'."""
        if not kept:
            raise AssertionError(f"{self.owner} on {self.input} must {duty}" + (f"; {found}" if found else ""))

    @contextmanager
    def doing(self, what: str) -> Generator[None, None, None]:
        """Turns whatever the class under test raises meanwhile into an AssertionError that says so."""
        try:
            yield
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(f"{self.owner} on {self.input} must {what}; it raised {kind}: {error}") from error


def same_bits(a: Point, b: Point) -> bool:
    """True where names, dtypes, shapes and all entries are equal."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def equal(a: Any, b: Any) -> bool:
    """True where two answers of a problem are equal to the bit: points, numbers, or tuples of them."""
    if isinstance(a, Point) and isinstance(b, Point):
        return same_bits(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def same_form(a: Point, b: Point) -> bool:
    """True where names, shapes, dtypes and devices are equal."""
    return a.keys() == b.keys() and all(
        a[name].shape == x.shape and a[name].dtype == x.dtype and a[name].device == x.device for name, x in b.items()
    )


def shares_memory(a: Point, b: Point) -> bool:
    """True where a tensor of one point and one of the other have a storage in common."""
    theirs = {x.untyped_storage().data_ptr() for x in b.values() if x.numel()}
    return any(x.numel() and x.untyped_storage().data_ptr() in theirs for x in a.values())
