"""check-plugin: the examples conform, by name and as objects; a violation is named; wrong input is one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cli.outcome import Command, Refused
from tests.plugged_in import plugged_in

__all__ = ["plugged_in"]  # a fixture

BROKEN = '''
from dataclasses import dataclass

from admm_prune import LayerReconstruction, Magnitude, StackedRows, Unstructured


@dataclass(frozen=True)
class Overfull(Unstructured):
    """Claims to contain everything."""

    def contains(self, z):
        return True


class Negative(LayerReconstruction):
    def value(self, point):
        return -1.0


@dataclass(frozen=True)
class InPairs(Unstructured):
    """Pairs of rows, each with a budget of its own."""

    def select(self, score):
        return self.stacked(score).select(score)

    def contains(self, z):
        return self.stacked(z).contains(z)

    def column_slice(self, start, stop, shape):
        return self.pairs(shape[0]).column_slice(start, stop, shape)

    def select_each(self, score):
        return self.pairs(score.shape[1]).select_each(score)

    def runs(self, shape):
        return None

    def strips(self, shape):
        return self.pairs(shape[0]).strips(shape)

    def stacked(self, x):
        return self.pairs(len(x["weight"]))

    def pairs(self, rows):
        if rows % 2:
            raise ValueError("an odd number of rows has no pairs")
        return StackedRows(((2, Unstructured(self.sparsity)),) * (rows // 2))


class Bounded:
    """An objective that is no LayerReconstruction."""

    def initial(self):
        raise NotImplementedError

    def value(self, point):
        return 0.0


class NeverFeasible:
    def solve(self, problem, *, start=None):
        raise RuntimeError("out of\\nideas")


number = 3
'''


@pytest.fixture
def broken(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in the working folder whose parts violate what they promise; importing it leaves no bytecode there."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (place / "broken_parts.py").write_text(BROKEN)
    yield place
    sys.modules.pop("broken_parts", None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("row-mixture", "constraints"),
        ("relative", "problems"),
        ("loss-weighted", "problems"),
        ("row_mixture:RowMixture", "constraints"),
        ("relative_reconstruction:RelativeReconstruction", "problems"),
        pytest.param("projected-gradient", "solvers", marks=pytest.mark.slow),
        pytest.param("projected_gradient:ProjectedGradient", "solvers", marks=pytest.mark.slow),
    ],
)
def test_the_examples_conform(plugged_in: Path, command: Command, name: str, kind: str) -> None:
    content = command("check-plugin", name, "--examples", 2, "--json").json()
    assert (content["kind"], content["conforms"], content["violation"]) == (kind, True, None)


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [("Overfull", "Overfull"), ("Negative", "Negative"), ("NeverFeasible", "RuntimeError: out of ideas")],
)
def test_a_violation_is_named_in_a_line(broken: Path, command: Command, attribute: str, reason: str) -> None:
    outcome = command("check-plugin", f"broken_parts:{attribute}", "--examples", 2)
    assert outcome.status == 1
    assert outcome.out.startswith(f"broken_parts:{attribute} does not conform: ")
    assert reason in outcome.out
    assert outcome.out.count("\n") == 1
    assert outcome.err == ""


def test_a_set_is_checked_on_shapes_that_it_admits(broken: Path, command: Command, refused: Refused) -> None:
    name = ("check-plugin", "broken_parts:InPairs", "--examples", 2)
    refused("refuses a matrix of 3 x 4 (an odd number of rows has no pairs): give shapes", *name)
    refused("--shape is OUTxIN, such as 6x16, not '4'", *name, "--shape", "4")
    refused("--shape is OUTxIN, such as 6x16, not '0x4'", *name, "--shape", "0x4")
    content = command(*name, "--shape", "2x4", "--shape", "4x6", "--json").json()
    assert (content["conforms"], content["shapes"]) == (True, "2 x 4 and 4 x 6")


def test_another_objective_is_referred_to_python(broken: Path, refused: Refused) -> None:
    refused("by admm_prune.testing.assert_problem_conforms", "check-plugin", "broken_parts:Bounded")
    refused("call solver.solve(problem) from Python", "check-plugin", "broken_parts:Bounded", "--kind", "problem")


def test_wrong_names_are_refused(broken: Path, refused: Refused, plugged_in: Path) -> None:
    refused("there is no plug-in 'nonesuch': the installed ones are ", "check-plugin", "nonesuch")
    refused("no_module:X cannot be imported: ModuleNotFoundError", "check-plugin", "no_module:X")
    refused("broken_parts:None1 cannot be imported: AttributeError", "check-plugin", "broken_parts:None1")
    refused("say which it is to be with --kind", "check-plugin", "broken_parts:number")
    refused("kind must be solver, problem or constraint, not 'set'", "check-plugin", "relative", "--kind", "set")
    refused("there is no plug-in 'relative'", "check-plugin", "relative", "--kind", "solver")
    refused("which makes no sparse set", "check-plugin", "broken_parts:number", "--kind", "constraint")


def test_without_hypothesis_it_says_what_to_install(
    plugged_in: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("admm_prune.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("admm_prune.testing", raising=False)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    refused("admm_prune.testing needs hypothesis: pip install 'admm-prune[testing]'", "check-plugin", "relative")
