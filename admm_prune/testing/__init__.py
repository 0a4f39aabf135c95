"""The conformance kit: everything this project promises of a constraint, a problem or a solver, checked in one line.

    assert_constraint_conforms(MySet(0.5), shape=(4, 12))
    assert_problem_conforms(lambda seed: MyProblem(...))
    assert_solver_conforms(MySolver())

A broken promise raises AssertionError in words: which class, on which input, what it must do, what it did. Every draw
is seeded: two runs check the same inputs. Needs hypothesis: `pip install admm-prune[dev]`.
"""

from __future__ import annotations

from admm_prune.testing.constraints import assert_constraint_conforms
from admm_prune.testing.problems import assert_problem_conforms
from admm_prune.testing.solvers import Conformance, assert_solver_conforms

__all__ = ["Conformance", "assert_constraint_conforms", "assert_problem_conforms", "assert_solver_conforms"]
