"""The conformance kit: checks all requirements on a constraint, a problem or a solver in one line.

    assert_constraint_conforms(MySet(0.5), shape=(4, 12))
    assert_problem_conforms(lambda seed: MyProblem(...))
    assert_solver_conforms(MySolver())

A violation raises an AssertionError that names the class, the input, the requirement and the result. Every draw is
seeded: two runs check the same inputs. Needs hypothesis: `pip install 'admm-prune[testing]'`.
"""

from __future__ import annotations

from admm_prune.testing.constraints import assert_constraint_conforms
from admm_prune.testing.problems import assert_problem_conforms
from admm_prune.testing.solvers import Conformance, assert_solver_conforms

__all__ = ["Conformance", "assert_constraint_conforms", "assert_problem_conforms", "assert_solver_conforms"]
