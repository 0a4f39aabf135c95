"""README and docs as tests see them: fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
PYTHON, SHELL = "python", ("", "sh")
_NOTE = re.compile(r"<!--\s*(.*?)\s*-->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its lines, where its first line stands, and what a comment above it says of it."""

    language: str
    text: str
    line: int
    note: str = ""

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a shell block, as words; lines of anything else (a tree, a formula) are none."""
        if self.language not in SHELL:
            return []
        joined = self.text.replace("\\\n", " ")
        lines = (line for line in joined.splitlines() if line.startswith(("admm-prune ", "make ", "python -m ")))
        return [shlex.split(line, comments=True) for line in lines]


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    note, begun, language = "", None, ""
    for number, line in enumerate(lines, 1):
        if begun is None and line.startswith("```"):
            begun, language = number, line[3:].strip()
        elif begun is not None and line.startswith("```"):
            yield Block(language, "\n".join(lines[begun : number - 1]) + "\n", begun + 1, note)
            begun, note = None, ""
        elif begun is None and line.strip():
            found = _NOTE.fullmatch(line.strip())
            note = found.group(1) if found else ""


def inline_commands(page: Path) -> list[list[str]]:
    """Commands that a sentence names, with their options."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text))
    return [shlex.split(code) for code in found if code.startswith("admm-prune ") and "--" in code]
