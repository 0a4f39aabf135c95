"""The help: an example for every command, true to the options there are, and quick to come."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import admm_prune
from admm_prune.cli.app import app
from admm_prune.cli.common import show_table
from tests.cli.outcome import Command

SCRIPT = Path(sys.executable).with_name("admm-prune")
COMMANDS = [
    *(
        "plan",
        "run",
        "compare",
        "reproduce",
        "eval",
        "verify",
        "report",
        "capture",
        "solve",
        "pack",
        "unpack",
        "push",
        "list",
    ),
    *("check-plugin", "recipe", "bench"),
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


def test_the_help_shows_extras_in_brackets(command: Command) -> None:
    for arguments in (("--help",), ("check-plugin", "--help")):
        assert "admm-prune[testing]" in command(*arguments).out.replace("\n", "")


def test_the_version(command: Command) -> None:
    assert command("--version").out == f"admm-prune {admm_prune.__version__}\n"


@pytest.mark.parametrize("name", [*COMMANDS, "recipe show", "bench memory"])
def test_h_is_help_and_flags_have_no_type(command: Command, name: str) -> None:
    short, long = command(*name.split(), "-h"), command(*name.split(), "--help")
    assert (short.status, short.out) == (0, long.out)
    assert "<bool>" not in short.out


def test_the_options_of_run_are_in_panels(command: Command) -> None:
    shown = command("run", "--help").out
    panels = re.findall("╭─ ([A-Z][A-Za-z ]+?) ─", shown)
    assert panels == ["Options", "Pruning", "Structured pruning", "Training", "Text", "Run", "Tasks"]
    assert re.findall("╭─ ([A-Z][A-Za-z ]+?) ─", command("--help").out) == [
        *("Options", "Prune", "Check and report", "Single layers", "Archive and share", "Information"),
    ]


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("admm-prune ru", {"run"}),
        ("admm-prune run --sparsi", {"--sparsity"}),
        ("admm-prune run --method sparsel", {"sparsellm", "sparsellm-release"}),
        ("admm-prune solve layer.safetensors --solver bru", {"brute-force"}),
        ("admm-prune run --constraint row", {"row-wise"}),
        ("admm-prune list mod", {"modules"}),
        ("admm-prune reproduce wa", {"wanda"}),
    ],
)
def test_the_shell_completes(
    command: Command, monkeypatch: pytest.MonkeyPatch, words: str, completed: set[str]
) -> None:
    monkeypatch.setenv("_ADMM_PRUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert set(command().out.split()) == completed


def test_tables_neither_wrap_nor_cut_names(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path, wide = "/models/" + "x" * 200, "y" * 90
    show_table(path, ["name", "figure"], [[wide, "1"], ["[short]", "2"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert path in lines
    assert any(line.strip().startswith(wide) and line.endswith("1") for line in lines)
    assert any("[short]" in line for line in lines)
