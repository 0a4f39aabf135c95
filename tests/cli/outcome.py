"""The outcome of a command, as its caller sees it, and the files that it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Exit status, stdout, stderr."""

    status: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """The one line on stdout of a command that went well."""
        assert self.status == 0, self.err
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1, self.out
        content = json.loads(self.out)
        assert isinstance(content, dict)
        return content


Command = Callable[..., Outcome]
Refused = Callable[..., None]


def snapshot(root: Path) -> dict[str, bytes | None]:
    """The files below a folder with their contents, and its subfolders with None, by relative path."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
