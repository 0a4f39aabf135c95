"""The package as its users get it: light to import, complete in its names, whole in its wheel."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import admm_prune

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = {"bitsandbytes", "cvxpy", "datasets", "hypothesis", "matplotlib", "pydantic", "pyscipopt"}
HEAVY = OPTIONAL | {"jinja2", "numpy", "rich", "scipy", "tokenizers", "torch", "transformers", "typer"}
REPORT_LOADED = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def loaded_by(statements: str) -> set[str]:
    """The top-level packages in memory after the statements ran in a fresh interpreter."""
    command = [sys.executable, "-c", f"{statements}\n{REPORT_LOADED}"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))


def mathematics() -> list[str]:
    """The modules that need torch alone: the words, kernels, problems, and solvers but the references."""
    package = ROOT / "admm_prune"
    files = [package / f"{name}.py" for name in ("point", "problem", "result")]
    for folder in ("ops", "problems", "solvers"):
        files += sorted(path for path in (package / folder).rglob("*.py") if "reference" not in path.parts)
    dotted = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files)
    return [name.removesuffix(".__init__") for name in dotted]


def test_import_is_light() -> None:
    seconds = []
    for _ in range(3):  # the best of three: other work on the machine only ever adds
        began = time.perf_counter()
        loaded = loaded_by("import admm_prune")
        seconds.append(time.perf_counter() - began)
    assert "admm_prune" in loaded
    assert not loaded & HEAVY
    assert min(seconds) < 1.5


def test_mathematics_loads_no_optional_package() -> None:
    loaded = loaded_by("\n".join(f"import {name}" for name in mathematics()))
    assert "torch" in loaded
    assert not loaded & (OPTIONAL | {"transformers"})


@pytest.mark.parametrize("name", admm_prune.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(admm_prune, name)
    assert value.__name__ == name
    assert getattr(admm_prune, name) is value


def test_public_names_are_listed_alike() -> None:
    (checked,) = (
        node
        for node in ast.parse(Path(admm_prune.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen_by_type_checkers = {
        alias.name: node.module for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen_by_type_checkers == admm_prune._HOME
    assert admm_prune.__all__ == sorted(admm_prune._HOME)
    assert set(admm_prune.__all__) <= set(dir(admm_prune))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'admm_prune' has no attribute 'Prune'"):
        admm_prune.Prune  # noqa: B018


def test_version_is_the_one_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert admm_prune.__version__ == project["version"]
    assert admm_prune.__version__ == importlib.metadata.version("admm-prune")


def test_constraints_admit_what_the_project_asks() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    assert all(line.count("==") == 1 and not set(line) & set("+@/ ") for line in lines), "NAME==VERSION, nothing local"
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    for asked in (*project["dependencies"], *(line for extra in extras for line in extra)):
        requirement = Requirement(asked)
        if requirement.name != "admm-prune":
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, asked


def test_the_oldest_versions_are_the_declared_bounds() -> None:
    """In pyproject.toml, in the file that the workflow installs them from, and in the docs."""
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    oldest = {canonicalize_name(name): Version(version) for name, version in pinned.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = {}
    for line in (*project["dependencies"], *extras["models"], *extras["plots"], *extras["cli"]):
        requirement = Requirement(line)
        (bound,) = requirement.specifier
        assert bound.operator == ">=", line
        declared[canonicalize_name(requirement.name)] = Version(bound.version)
    assert oldest == declared
    install = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    for name in ("torch", "transformers"):
        assert f"{name} {declared[name].major}.{declared[name].minor}" in install
    assert "-c constraints-oldest.txt" in (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")


def wheel_of(place: Path, **environment: str) -> Path:
    """A wheel, built from a copy of what is tracked that it needs, without a network."""
    checkout, wheels = place / "checkout", place / "wheels"
    checkout.mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(ROOT / "admm_prune", checkout / "admm_prune", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for folder in ("solvers", "problems"):
        (checkout / folder).symlink_to(f"admm_prune/{folder}")
    for folder in ("tests", "benchmarks", "collection"):
        (checkout / folder).mkdir()
        (checkout / folder / "__init__.py").touch()
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(checkout)]
    subprocess.run(build, check=True, cwd=place, env={**os.environ, **environment})
    (wheel,) = wheels.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_wheel_without_a_compiler(tmp_path: Path) -> None:
    """It is built all the same, for every platform; products with packed weights are torch's."""
    wheel = wheel_of(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_wheel_is_whole_and_works_outside_the_checkout(tmp_path: Path) -> None:
    target = tmp_path / "target"
    wheel = wheel_of(tmp_path)
    compiler = shutil.which(os.environ.get("CXX", "c++")) is not None
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert libraries == (["admm_prune/ops/_packed.so"] if compiler else [])
    assert f"-py3-none-{'linux' if compiler else 'any'}" in wheel.name
    assert wheel.stat().st_size < 20 << 20

    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "admm_prune").rglob("*.py")}
    assert {name.partition("/")[0] for name in files} == {"admm_prune"}
    assert source <= files
    assert "admm_prune/py.typed" in files
    assert any(name.startswith("admm_prune/assets/embedded/") and name.endswith(".safetensors") for name in files)

    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, cwd=tmp_path)
    script = (
        "import admm_prune; from importlib.metadata import entry_points; from importlib.resources import files\n"
        "print(admm_prune.__file__)\n"
        "print(admm_prune.ADMM.__module__)\n"
        "print(files('admm_prune').joinpath('assets/embedded').is_dir())\n"
        "print(entry_points(group='console_scripts')['admm-prune'].load().__name__)\n"
        "from admm_prune.ops import packed; print(packed.described().split()[0])"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    run = subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    kernels = "C++" if compiler else "torch,"
    place = str(target / "admm_prune/__init__.py")
    assert run.stdout.split() == [place, "admm_prune.solvers.admm", "True", "main", kernels]
