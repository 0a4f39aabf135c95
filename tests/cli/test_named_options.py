"""Every option that a message, a help text, a page or a template names exists, in the command that it is named with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from admm_prune.cli.app import app
from tests.pages import PAGES, ROOT

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
WITH_COMMAND = re.compile(r"admm-prune ((?:[a-z]+ )*[a-z]+)\b([^`'\"|;:]*)")
PACKAGE = ROOT / "admm_prune"
OTHERS = {  # options of other programs, and what they belong to
    "--compile": "scripts/train_embedded_model.py",
    "--help": "every command",
    "--local-dir": "hf",
    "--no-python": "torchrun",
    "--nproc-per-node": "torchrun",
    "--no-index": "pip",
    "--inplace": "setuptools",
    "--no-deps": "pip",
    "--extra-index-url": "pip",
    "--index-url": "pip",
}


def commands() -> dict[str, set[str]]:
    """The options of every command, by its words."""
    found: dict[str, set[str]] = {}

    def enter(command: Any, name: str) -> None:
        for word, inner in getattr(command, "commands", {}).items():
            enter(inner, f"{name} {word}".strip())
        found[name] = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}

    enter(typer.main.get_command(app), "")
    return found


COMMANDS = commands()
OF_COMMAND = re.compile(rf"\b({'|'.join(name for name in COMMANDS if name)}) ({OPTION.pattern})")
STYLE = re.compile(r"var\(--[\w-]*")  # a colour of a page
ANY = set().union(*COMMANDS.values())


def literals(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):  # an f-string, its values left out
            yield "".join(v.value if isinstance(v, ast.Constant) else "X" for v in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def wrong(text: str, known: set[str] = ANY) -> list[str]:
    """What a text names that is not there: an option, or one of a command that it names ('run --recipe FILE')."""
    found = [f"{name} {option}" for name, option in OF_COMMAND.findall(text) if option not in COMMANDS[name]]
    alone = OF_COMMAND.sub("", STYLE.sub("", text))
    found += [option for option in OPTION.findall(alone) if option not in known and option not in OTHERS]
    for words, rest in WITH_COMMAND.findall(text):
        names = words.split(" ")
        name = next((n for k in (2, 1) if (n := " ".join(names[:k])) in COMMANDS), None)
        if name is not None:
            known_here = COMMANDS[name] | set(OTHERS)
            found += [f"{name} {option}" for option in OPTION.findall(rest) if option not in known_here]
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_messages_and_help_texts() -> None:
    assert [f"{path}: {found}" for path in MODULES for text in literals(path) for found in wrong(text)] == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda path: path.stem)
def test_a_command_names_its_own_options(path: Path) -> None:
    """Where one module holds one command; the help of options that several share is in `common`."""
    own = {"evaluate": "eval", "listing": "list"}.get(path.stem, path.stem)
    if own not in COMMANDS or any(name.startswith(f"{own} ") for name in COMMANDS):
        return
    texts = [text for text in literals(path) if "admm-prune" not in text]
    # Names are for options of other commands, and modules for those that select them.
    others = {"--problem", "--constraint", "--pattern", "--targets", "--ignore", "--override"}
    listed = others if own == "list" else set()
    assert [found for text in texts for found in wrong(text, COMMANDS[own] | listed)] == []


@pytest.mark.parametrize("name", sorted(name for name in COMMANDS if name))
def test_the_help_of_a_command_names_its_own_options(name: str) -> None:
    command: Any = typer.main.get_command(app)
    for word in name.split():
        command = command.commands[word]
    texts = [getattr(parameter, "help", None) or "" for parameter in command.params]
    assert [found for text in texts for found in wrong(text, COMMANDS[name] | {"--json"})] == []


@pytest.mark.parametrize(
    "path", [*PAGES, *(PACKAGE / "assets/embedded").glob("*.md")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_pages(path: Path) -> None:
    """Lines that call a script of `benchmarks` or `examples`, or another program, name options of theirs."""
    lines = [
        line
        for line in path.read_text(encoding="utf-8").splitlines()
        if not re.search(r"python -m benchmarks|benchmarks/|examples/|scripts/card|python -m pip|pytest ", line)
    ]
    assert [found for line in lines for found in wrong(line)] == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "assets/reports").glob("*.j2")), ids=lambda path: path.name)
def test_templates(path: Path) -> None:
    text = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert [found for line in text.splitlines() for found in wrong(line)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("choose one with --no-such-option", ["--no-such-option"]),
        ("measure it: 'admm-prune pack a b --sparsity 0.5'", ["pack --sparsity"]),
        ("give compare --stream", ["compare --stream"]),
        ("see 'admm-prune bench memory --most 1e8'", []),
        ("a dash -- and --- are none", []),
    ],
)
def test_the_search_finds_what_is_not_there(text: str, found: list[str]) -> None:
    assert wrong(text) == found
