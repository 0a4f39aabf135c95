"""Installed with fewer extras: the mathematics works without any, and what is missing is named in one line.

A package is hidden by `None` in `sys.modules`, which makes its import fail as if it were not installed.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from admm_prune import errors
from tests.cli.outcome import Refused
from tests.pages import PYTHON, ROOT, blocks

EXTRAS = dict(errors._EXTRAS)
ALL = [package for packages in EXTRAS.values() for package in packages]
COMMAND = "from admm_prune.cli import main; sys.argv = ['admm-prune', *{}]; main()"


def hidden(packages: list[str], code: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter to which these packages are not installed."""
    before = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", before + code], capture_output=True, text=True, check=False, cwd=place
    )  # fmt: skip


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["optional-dependencies"]
    modules = {"huggingface-hub": "huggingface_hub", "pyyaml": "yaml"}
    for extra, packages in EXTRAS.items():
        names = {modules.get(name, name) for name in (Requirement(line).name for line in declared[extra])}
        assert names == set(packages) - {"pyarrow"}, "datasets brings pyarrow"
    (everything,) = map(Requirement, declared["all"])
    assert everything.extras == set(EXTRAS)
    assert {Requirement(line).name for line in project["dependencies"]} == {"torch", "numpy", "scipy", "safetensors"}


def test_the_examples_of_the_mathematics_run_without_any_extra(tmp_path: Path) -> None:
    examples = [
        block.text
        for page, name in ((ROOT / "README.md", "ADMM"), (ROOT / "docs/methods/elsa.md", "SparseAdam"))
        for block in blocks(page)
        if block.language == PYTHON and f"import {name}" in block.text
    ]
    assert len(examples) >= 2
    done = hidden(ALL, "\n".join(examples) + "\nprint(sorted(masks))", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['0.weight', '2.weight']"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune", "load_packed"])
def test_a_public_name_that_needs_an_extra_says_so(tmp_path: Path, name: str) -> None:
    code = (
        f"try:\n    from admm_prune import {name}\n    {name}('embedded')\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    done = hidden(ALL, code, tmp_path)
    line = done.stdout.splitlines()
    assert len(line) == 1, done.stderr
    assert line[0].startswith("MissingExtraError this needs the package ")
    assert line[0].endswith(": pip install 'admm-prune[models]'")


MISSING = [
    ("typer", ["list"], "cli"),
    ("rich.console", ["list"], "cli"),
    ("transformers", ["eval", "embedded"], "models"),
    ("yaml", ["recipe", "list"], "models"),
    ("matplotlib", ["run", "--sparsity", "0.5", "--out", "out"], "plots"),
    ("jinja2", ["compare", "--sparsity", "0.5", "--out", "out"], "plots"),
    ("datasets", ["eval", "embedded", "--data", "wikitext2"], "text"),
    ("pyarrow.parquet", ["eval", "embedded", "--data", "rows.parquet"], "text"),
    ("pyarrow", ["eval", "embedded", "--data", "rows.txt.zst"], "text"),
]


@pytest.mark.parametrize(
    ("module", "arguments", "extra"), MISSING, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_missing_extra_is_one_line(
    refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch, module: str, arguments: list[str], extra: str
) -> None:
    for name in ("rows.parquet", "rows.txt.zst"):
        (place / name).write_bytes(b"none")
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    refused(f"admm-prune: this needs the package {package}: pip install 'admm-prune[{extra}]'\n", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_is_one_line_in_a_new_interpreter(tmp_path: Path, extra: str) -> None:
    """Where no module of the extra was imported before."""
    (tmp_path / "rows.parquet").write_bytes(b"none")
    arguments = next(
        arguments for module, arguments, of in reversed(MISSING) if of == extra and "zst" not in arguments[-1]
    )
    done = hidden(list(EXTRAS[extra]), COMMAND.format(arguments), tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("admm-prune: this needs the package ")
    assert done.stderr.endswith(f": pip install 'admm-prune[{extra}]'\n")


@pytest.mark.slow
def test_a_run_needs_no_datasets(tmp_path: Path) -> None:
    """As `make demo`, which does without the extra `text`."""
    how = ["--method", "magnitude", "--sparsity", "0.5", "--samples", "2", "--eval-samples", "2", "--length", "32"]
    done = hidden(list(EXTRAS["text"]), COMMAND.format(["run", *how, "--out", "out"]), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/report.html").is_file()


def test_another_module_that_is_missing_is_an_error_of_its_own() -> None:
    assert errors.named_extra(ModuleNotFoundError("No module named 'nonesuch'", name="nonesuch")) is None
    with pytest.raises(ModuleNotFoundError, match="nonesuch"):
        errors.optional_module("nonesuch")
