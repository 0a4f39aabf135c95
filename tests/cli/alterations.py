"""Single alterations of files: of every value of a JSON content, of every tensor, of the files of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Alteration:
    """One alteration of a JSON content.

    Attributes:
        place: the keys and indices that lead to the value.
        how: what is done to it.
        content: the whole content, altered.
        neutral: the new value equals the old one, as 1.0 equals 1.
    """

    place: Place
    how: str
    content: Any
    neutral: bool = False

    @property
    def name(self) -> str:
        """As verify names it: "layers[].bound"."""
        text = ""
        for key in self.place:
            text += "[]" if isinstance(key, int) else f".{key}" if text else key
        return text


def of_json(content: Any) -> Iterator[Alteration]:
    """Every value, object and list of a content altered in every way, one at a time."""
    for place, value in _values(content, ()):
        for how, new in _instead_of(value):
            if repr(new) == repr(value):
                continue
            if not place:
                yield Alteration(place, how, new)
                continue
            altered = deepcopy(content)
            holder = altered
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = new
            yield Alteration(place, how, altered, neutral=bool(new == value))
        if isinstance(value, dict):
            for key in value:
                altered = deepcopy(content)
                holder = altered
                for step in place:
                    holder = holder[step]
                del holder[key]
                yield Alteration((*place, key), "removed", altered)


def of_text(text: str) -> Iterator[tuple[str, str]]:
    """Texts that a lenient reader of JSON takes for the same content, or for none."""
    yield "a key twice", text.replace("{", '{"method": "admm",', 1)
    yield "trailing garbage", text + "}"
    yield "NaN", text.replace("null", "NaN", 1) if "null" in text else text.replace("0", "NaN", 1)
    yield "Infinity", text.replace("{", '{"more": Infinity,', 1)
    yield "a number beyond float64", text.replace("{", '{"more": 1e999,', 1)
    yield "a list", "[]"
    yield "nested deeply", "[" * 100_000
    yield "empty", ""


def of_tensors(path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every tensor of a file altered in one entry, in its sign of zero, in dtype, removed; one added; the metadata."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})

    def write(new: dict[str, torch.Tensor], told: dict[str, str] = metadata) -> Callable[[], None]:
        return lambda: save_file(new, path, told)

    for name, tensor in tensors.items():
        for how, value in _entries_of(tensor):
            yield f"{name}: {how}", write({**tensors, name: value})
        yield f"{name}: removed", write({key: value for key, value in tensors.items() if key != name})
        yield f"{name}: renamed", write({f"{key}x" if key == name else key: value for key, value in tensors.items()})
    yield "a tensor added", write({**tensors, "another": torch.ones(2)})
    yield "a key of the metadata added", write(tensors, {**metadata, "another": "1"})


def _values(content: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    yield place, content
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, item in items:
        yield from _values(item, (*place, key))


def _instead_of(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield from (("flipped", not value), ("null", None), ("a text", str(value)), ("a number", int(value)))
    elif isinstance(value, int):
        yield from (("one more", value + 1), ("large", 1000 * value + 7), ("negative", -value - 1))
        yield from (("a float", float(value)), ("a text", str(value)), ("null", None), ("a list", [value]))
    elif isinstance(value, float):
        yield from (("a little more", value * 1.001 + 1e-3 * (value == 0)), ("large", 1e6 * value + 1))
        yield from (("zero", 0.0), ("a text", repr(value)), ("null", None), ("an object", {}))
    elif isinstance(value, str):
        yield from (("longer", f"{value}x"), ("empty", ""), ("a number", 7), ("null", None), ("a list", [value]))
    elif value is None:
        yield from (("a number", 0.5), ("a text", "x"), ("true", True), ("an object", {}))
    elif isinstance(value, list):
        yield from (("one more", [*value, value[-1] if value else 1]), ("null", None), ("an object", {}))
        if value:
            yield from (("empty", []), ("one less", value[:-1]))
    else:
        yield from (("a key added", {**value, "another": 1}), ("null", None), ("a list", [value]))
        if value:
            yield "empty", {}


def _entries_of(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    flat = tensor.reshape(-1)
    largest, first = int(flat.abs().argmax()), 0
    for how, index, change in (
        ("an entry a little more", largest, lambda x: x * 1.001),
        ("an entry zero", largest, lambda x: 0 * x),
        ("the first entry one more", first, lambda x: x + 1),
        ("an entry NaN", first, lambda x: x * torch.nan),
    ):
        altered = flat.clone()
        altered[index] = change(altered[index])
        yield how, altered.reshape(tensor.shape)
    yield "another dtype", tensor.double() if tensor.dtype is not torch.float64 else tensor.float()


def written(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
