"""Every command and every code block of README and docs: all parse in the fast tests, all run in the slow ones.

`DIR` and `HUB_ID` stand for a model of one's own, `text.txt` for one's own text: here a tiny model and a few stories.
"""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import typer

import admm_prune
from admm_prune.cli.app import app
from tests.cli.outcome import Command
from tests.pages import PAGES, PYTHON, ROOT, blocks, inline_commands
from tests.plugged_in import plugged_in

__all__ = ["plugged_in"]  # a fixture

OWN = {"DIR", "HUB_ID", "DIR_OR_HUB_ID", "MODEL"}
QUICK = {"one-shot.md", "admm.md", "sparsellm.md", "elsa.md"}  # some seconds each
RUNNABLE = [page for page in PAGES if page.name != "CONTRIBUTING.md"]  # its blocks are templates


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def parses(words: list[str]) -> None:
    """The command exists, and takes these options."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), words
        return
    if words[0] == "python":
        source = (ROOT / f"{words[2].replace('.', '/')}.py").read_text()
        for shared in re.findall(r"^from (benchmarks\.\w+) import", source, flags=re.MULTILINE):  # that declare options
            source += (ROOT / f"{shared.replace('.', '/')}.py").read_text()
        assert all(f'"{word}"' in source for word in words[3:] if word.startswith("--")), words
        return
    command: Any = typer.main.get_command(app)
    words = words[1:]
    if words[0].startswith("--"):
        assert words[0] in {option for parameter in command.params for option in parameter.opts}, words
        return
    while hasattr(command, "commands"):
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words)


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as Python-Markdown and GitHub name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_and_the_code_of_a_page_parse(page: Path) -> None:
    for block in blocks(page):
        for words in block.commands:
            parses(words)
        if block.language == PYTHON:
            ast.parse(block.text)
        if block.language == "toml":
            tomllib.loads(block.text)
    for words in inline_commands(page):
        if words != ["admm-prune", "run"]:
            parses(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_extras_and_links_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"admm-prune\[([a-z,-]+)\]", text):
        assert set(named.split(",")) <= set(extras), named
    for link, _, anchor in (found.partition("#") for found in re.findall(r"\]\((?!https?:)([^) ]+)", text)):
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}#{anchor}"
    for source in re.findall(r'(?:src|srcset)="([^"]+)"', text):
        assert (page.parent / source).exists(), source
    for results in re.findall(r"benchmarks/results/[\w.-]+\w", text):
        assert list((ROOT / results).parent.glob(f"{Path(results).name}*")), results


def run_page(page: Path, command: Command, place: Path, model: Path, text: Path) -> None:
    """From top to bottom, in one folder and one Python."""
    (place / "text.txt").write_text(text.read_text())
    module = types.ModuleType("page")
    sys.modules["page"] = module  # dataclasses ask for the module of their class
    for block in blocks(page):
        if block.language == PYTHON:
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, vars(module))
        for words in block.commands:
            if words[0] == "admm-prune" and "not run" not in block.note:
                outcome = command(*(str(model) if word in OWN else word for word in words[1:]))
                assert outcome.status == 0, f"{' '.join(words)}: {outcome.err}"


@pytest.mark.parametrize("page", [page for page in RUNNABLE if page.name in QUICK], ids=name_of)
def test_a_page_runs(page: Path, command: Command, place: Path, model_folder: Path, text_file: Path) -> None:
    run_page(page, command, place, model_folder, text_file)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUNNABLE if page.name not in QUICK], ids=name_of)
def test_a_longer_page_runs(
    page: Path, command: Command, place: Path, model_folder: Path, text_file: Path, plugged_in: Path
) -> None:
    run_page(page, command, place, model_folder, text_file)


def test_the_messages_in_troubleshooting_are_those_of_the_code() -> None:
    said = set()
    for source in (ROOT / "admm_prune").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                said.add("".join(map(str, parts)))
    page = (ROOT / "docs/guides/troubleshooting.md").read_text()
    messages = [message for row in re.findall(r"^\| (`.*?`) \|", page, flags=re.MULTILINE)
                for message in re.findall(r"`([^`]+)`", row)]  # fmt: skip
    assert len(messages) > 25
    for message in messages:
        pieces = [piece.strip(" '\"") for piece in message.split("...")]
        assert all(any(piece in text for text in said) for piece in pieces), message


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    zensical = Path(sys.executable).with_name("zensical")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    config = (ROOT / "zensical.toml").read_text().replace('["."]', f'["{ROOT}"]')
    (tmp_path / "zensical.toml").write_text(config)
    done = subprocess.run(
        [zensical, "build", "--strict", "--clean"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    assert "griffe:" not in done.stdout + done.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        built = tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix("")
        assert (built.parent if page.name == "index.md" else built).joinpath("index.html").is_file(), page


def test_the_reference_covers_the_public_names() -> None:
    pages = {page: page.read_text() for page in (ROOT / "docs/reference/api").glob("*.md")}
    shown = [name for text in pages.values() for name in re.findall(r"^::: admm_prune\.(\w+)$", text, re.MULTILINE)]
    assert sorted([*shown, "prune"]) == sorted([*admm_prune.__all__, "problem", "testing"])  # prune has a page
    overview = (ROOT / "docs/reference/api.md").read_text()
    assert all(f"`{name}`" in overview for name in admm_prune.__all__)


@pytest.mark.parametrize("name", admm_prune.__all__)
def test_a_line_of_the_reference_is_one_parameter(name: str) -> None:
    """A line of several would be shown as one parameter, required and without a type."""
    described = getattr(admm_prune, name)
    documented = [described, *(vars(described).values() if inspect.isclass(described) else [])]
    for one in documented:
        text = inspect.getdoc(one) if isinstance(getattr(one, "__doc__", None), str) else None
        assert not re.findall(r"^ +\w+(?:, \w+)+(?: \([^)]*\))?: ", text or "", re.MULTILINE)


def test_the_generated_reference_is_up_to_date() -> None:
    for path, written in runpy.run_path(str(ROOT / "scripts/write_reference.py"))["PAGES"].items():
        assert (ROOT / path).read_text(encoding="utf-8") == written(), "run: make catalogue"
