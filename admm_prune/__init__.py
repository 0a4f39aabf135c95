"""admm-prune: an optimization toolbox for pruning language models.

A problem defines the loss, a constraint the set of sparse weights, a solver the algorithm.
Imports are lazy: the module of each name below is imported when the name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "Alternating",
    "Blocks",
    "FeedForward",
    "GatedFeedForward",
    "GramAccumulator",
    "GroupOBS",
    "GroupReconstruction",
    "Groups",
    "LayerReconstruction",
    "LayerStatistics",
    "LocalSearch",
    "Magnitude",
    "NetworkOutput",
    "NofM",
    "Point",
    "Product",
    "Progress",
    "Refit",
    "Result",
    "RowWise",
    "SparseAdam",
    "SparseGPT",
    "StackedRows",
    "Status",
    "StochasticADMM",
    "SupportDescent",
    "SurrogateFree",
    "Unstructured",
    "Wanda",
    "keep_sparsity",
    "merge_lora",
    "prune",
]

_HOME = {
    "ADMM": "admm_prune.solvers.admm",
    "Alternating": "admm_prune.solvers.alternating",
    "Blocks": "admm_prune.problems.constraints",
    "FeedForward": "admm_prune.problems.feed_forward",
    "GatedFeedForward": "admm_prune.problems.feed_forward",
    "GramAccumulator": "admm_prune.statistics",
    "GroupOBS": "admm_prune.solvers.group_obs",
    "GroupReconstruction": "admm_prune.problems.structured_groups",
    "Groups": "admm_prune.problems.constraints",
    "LayerReconstruction": "admm_prune.problems.layer",
    "LayerStatistics": "admm_prune.statistics",
    "LocalSearch": "admm_prune.solvers.local_search",
    "Magnitude": "admm_prune.solvers.support_descent",
    "NetworkOutput": "admm_prune.problems.network_output",
    "NofM": "admm_prune.problems.constraints",
    "Point": "admm_prune.point",
    "Refit": "admm_prune.solvers.refit",
    "Product": "admm_prune.problems.constraints",
    "Progress": "admm_prune.result",
    "Result": "admm_prune.result",
    "RowWise": "admm_prune.problems.constraints",
    "SparseAdam": "admm_prune.solvers.sparse_adam",
    "SparseGPT": "admm_prune.solvers.obs",
    "StackedRows": "admm_prune.problems.constraints",
    "Status": "admm_prune.result",
    "StochasticADMM": "admm_prune.solvers.stochastic_admm",
    "SurrogateFree": "admm_prune.problems.surrogate_free",
    "SupportDescent": "admm_prune.solvers.support_descent",
    "Unstructured": "admm_prune.problems.constraints",
    "Wanda": "admm_prune.solvers.support_descent",
    "keep_sparsity": "admm_prune.models.recovery",
    "merge_lora": "admm_prune.models.recovery",
    "prune": "admm_prune.runs.prune",
}

if TYPE_CHECKING:
    from admm_prune.models.recovery import keep_sparsity, merge_lora
    from admm_prune.point import Point
    from admm_prune.problems.constraints import Blocks, Groups, NofM, Product, RowWise, StackedRows, Unstructured
    from admm_prune.problems.feed_forward import FeedForward, GatedFeedForward
    from admm_prune.problems.layer import LayerReconstruction
    from admm_prune.problems.network_output import NetworkOutput
    from admm_prune.problems.structured_groups import GroupReconstruction
    from admm_prune.problems.surrogate_free import SurrogateFree
    from admm_prune.result import Progress, Result, Status
    from admm_prune.runs.prune import prune
    from admm_prune.solvers.admm import ADMM
    from admm_prune.solvers.alternating import Alternating
    from admm_prune.solvers.group_obs import GroupOBS
    from admm_prune.solvers.local_search import LocalSearch
    from admm_prune.solvers.obs import SparseGPT
    from admm_prune.solvers.refit import Refit
    from admm_prune.solvers.sparse_adam import SparseAdam
    from admm_prune.solvers.stochastic_admm import StochasticADMM
    from admm_prune.solvers.support_descent import Magnitude, SupportDescent, Wanda
    from admm_prune.statistics import GramAccumulator, LayerStatistics
else:  # hidden from type checkers, so that a misspelt name stays an error to them

    def __getattr__(name: str) -> object:
        """PEP 562: imports the module of a public name when the name is first used."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
