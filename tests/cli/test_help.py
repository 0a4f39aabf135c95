"""The help: an example for every command, true to the options there are, and quick to come."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from admm_prune.cli.app import app
from tests.cli.outcome import Command

SCRIPT = Path(sys.executable).with_name("admm-prune")
COMMANDS = [
    "run",
    "compare",
    "eval",
    "capture",
    "solve",
    "verify",
    "report",
    "reproduce",
    "recipe",
    "push",
    "check-plugin",
    "list",
    "bench",
]


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def test_the_help_names_every_command(command: Command) -> None:
    outcome = command("--help")
    assert outcome.status == 0
    assert outcome.err == ""
    assert all(f"│ {name} " in outcome.out for name in COMMANDS)
    assert command().out == outcome.out, "no arguments at all ask for the help"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_in_the_help_of_a_command_parses(command: Command, name: str) -> None:
    outcome = command(name, "--help")
    assert outcome.status == 0
    group = typer.main.get_command(app)
    inner = group.get_command(group.make_context("admm-prune", [name], resilient_parsing=True), name)
    example = plain(inner.help).partition("Example: ")[2]
    assert example.startswith(f"admm-prune {name}")
    assert f"Example: {example}" in plain(outcome.out)
    assert inner.make_context(name, shlex.split(example)[2:]).command is inner


def test_the_help_comes_without_torch() -> None:
    """A cold start: what takes seconds to import may load only when there is work to do."""
    code = (
        "import sys; sys.argv = ['admm-prune', 'run', '--help']\n"
        "from admm_prune.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command() -> None:
    """As `torchrun -m admm_prune` and tools without a path to scripts call it."""
    calls = ([SCRIPT], [sys.executable, "-m", "admm_prune"])
    told = [subprocess.run([*call, "list", "--json"], capture_output=True, text=True, check=True) for call in calls]
    assert told[0].stdout == told[1].stdout != ""


def test_the_installed_script_refuses_in_one_line(tmp_path: Path, text_file: Path) -> None:
    command = [SCRIPT, "run", "--model", tmp_path / "none", "--data", text_file, "--sparsity", "0.5", "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"admm-prune: {tmp_path / 'none'}: there is no such model folder\n"
    assert not list(tmp_path.iterdir())
