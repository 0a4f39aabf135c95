"""The lists that the product tests run over: add a line here, and everything is tested against everything.

The constraints and the problems are those of the conformance kit: add theirs to `admm_prune/testing/instances.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.base import Solver
from admm_prune.solvers.exchange_search import ExchangeSearch
from admm_prune.solvers.group_obs import GroupMask, GroupOBS
from admm_prune.solvers.local_search import LocalSearch
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.one_shot import Magnitude, Wanda
from admm_prune.solvers.refit import Refit
from admm_prune.solvers.schedules import Constant
from admm_prune.testing.instances import (
    CONSTRAINTS,
    PROBLEMS,
    ROWS,
    WIDTH,
    correlated_inputs,
    layer,
    random_weight,
    retargeted,
)

__all__ = [
    "CONSTRAINTS",
    "PROBLEMS",
    "ROWS",
    "SOLVERS",
    "WIDTH",
    "correlated_inputs",
    "layer",
    "random_weight",
    "retargeted",
]

SOLVERS: dict[str, Callable[[], Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "sparsegpt, one mask": lambda: SparseGPT(mask_scope="layer"),
    "sparsegpt, small blocks": lambda: SparseGPT(block=4),
    "admm": ADMM,
    "admm fast": ADMM.fast,
    "admm best": ADMM.best,
    "admm alps": ADMM.alps,
    "admm gradual": ADMM.gradual,
    "admm watched": lambda: ADMM(objective_every=1, penalty=Constant(0.5)),
    "magnitude, polished": lambda: Refit(Magnitude()),
    "wanda, polished": lambda: Refit(Wanda()),
    "group mask": GroupMask,
    "group mask, interactions": lambda: GroupMask(interactions=True),
    "group obs": GroupOBS,
    "group obs, one-shot": lambda: GroupOBS(batch=0),
    "admm, swaps": lambda: LocalSearch(ADMM()),
    "exchanges": ExchangeSearch,
}
