"""The embedded text: source and documentation of CPython 3.11.7's standard library, the same on every machine.

A module is held out when a fixed hash of its name says so; the embedded model never saw a held-out module.
`scripts/embed_standard_library.py` writes the file that is read here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from importlib.resources import files

HELD_OUT_ONE_IN = 10


def is_held_out(module: str) -> bool:
    """sha256(module name) mod 10 == 0: a tenth of the modules."""
    return hashlib.sha256(module.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def modules() -> Iterator[tuple[str, str]]:
    """Yields (dotted module name, source text) in the order of the names."""
    packed = files("admm_prune").joinpath("assets/standard_library/modules.jsonl.gz").read_bytes()
    for line in gzip.decompress(packed).decode().split("\n"):  # not splitlines(): modules hold form feeds and U+2028
        if line:
            row = json.loads(line)
            yield row["module"], row["text"]


def documents(held_out: bool) -> list[str]:
    """The text of the held-out modules, or of all the others, one document a module."""
    return [text for name, text in modules() if is_held_out(name) == held_out]
