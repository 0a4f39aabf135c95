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
    "AttentionOutput",
    "AttentionTokens",
    "Blocks",
    "Callback",
    "ExchangeSearch",
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
    "PackedLinear",
    "Point",
    "Probabilities",
    "Product",
    "Progress",
    "Refit",
    "Report",
    "Result",
    "RowWise",
    "SparseAdam",
    "SparseGPT",
    "StackedRows",
    "Status",
    "StochasticADMM",
    "SupportDescent",
    "SurrogateFree",
    "TokenContext",
    "Unstructured",
    "UserError",
    "Wanda",
    "keep_sparsity",
    "load_packed",
    "load_report",
    "merge_lora",
    "pack_model",
    "prune",
]

_MODULES = {
    "errors": ("UserError",),
    "inference.packed_folder": ("load_packed",),
    "inference.packed_linear": ("PackedLinear", "pack_model"),
    "methods.callbacks": ("Callback",),
    "models.recovery": ("keep_sparsity", "merge_lora"),
    "point": ("Point",),
    "problems.attention": ("AttentionOutput", "AttentionTokens", "Probabilities"),
    "problems.constraints": ("Blocks", "Groups", "NofM", "Product", "RowWise", "StackedRows", "Unstructured"),
    "problems.feed_forward": ("FeedForward", "GatedFeedForward"),
    "problems.layer": ("LayerReconstruction",),
    "problems.network_output": ("NetworkOutput",),
    "problems.structured_groups": ("GroupReconstruction",),
    "problems.surrogate_free": ("SurrogateFree",),
    "result": ("Progress", "Result", "Status"),
    "runs.prune": ("prune",),
    "runs.results": ("Report", "load_report"),
    "solvers.admm": ("ADMM",),
    "solvers.alternating": ("Alternating",),
    "solvers.group_obs": ("GroupOBS",),
    "solvers.exchange_search": ("ExchangeSearch",),
    "solvers.local_search": ("LocalSearch",),
    "solvers.obs": ("SparseGPT",),
    "solvers.one_shot": ("Magnitude", "Wanda"),
    "solvers.refit": ("Refit",),
    "solvers.sparse_adam": ("SparseAdam",),
    "solvers.stochastic_admm": ("StochasticADMM",),
    "solvers.support_descent": ("SupportDescent",),
    "statistics": ("GramAccumulator", "LayerStatistics", "TokenContext"),
}
_HOME = {name: f"admm_prune.{module}" for module, names in _MODULES.items() for name in names}

if TYPE_CHECKING:
    from admm_prune.errors import UserError
    from admm_prune.inference.packed_folder import load_packed
    from admm_prune.inference.packed_linear import PackedLinear, pack_model
    from admm_prune.methods.callbacks import Callback
    from admm_prune.models.recovery import keep_sparsity, merge_lora
    from admm_prune.point import Point
    from admm_prune.problems.attention import AttentionOutput, AttentionTokens, Probabilities
    from admm_prune.problems.constraints import Blocks, Groups, NofM, Product, RowWise, StackedRows, Unstructured
    from admm_prune.problems.feed_forward import FeedForward, GatedFeedForward
    from admm_prune.problems.layer import LayerReconstruction
    from admm_prune.problems.network_output import NetworkOutput
    from admm_prune.problems.structured_groups import GroupReconstruction
    from admm_prune.problems.surrogate_free import SurrogateFree
    from admm_prune.result import Progress, Result, Status
    from admm_prune.runs.prune import prune
    from admm_prune.runs.results import Report, load_report
    from admm_prune.solvers.admm import ADMM
    from admm_prune.solvers.alternating import Alternating
    from admm_prune.solvers.exchange_search import ExchangeSearch
    from admm_prune.solvers.group_obs import GroupOBS
    from admm_prune.solvers.local_search import LocalSearch
    from admm_prune.solvers.obs import SparseGPT
    from admm_prune.solvers.one_shot import Magnitude, Wanda
    from admm_prune.solvers.refit import Refit
    from admm_prune.solvers.sparse_adam import SparseAdam
    from admm_prune.solvers.stochastic_admm import StochasticADMM
    from admm_prune.solvers.support_descent import SupportDescent
    from admm_prune.statistics import GramAccumulator, LayerStatistics, TokenContext
else:  # hidden from type checkers, so that a misspelt name stays an error to them

    def __getattr__(name: str) -> object:
        """PEP 562: imports the module of a public name when the name is first used."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from admm_prune.errors import optional_module

        value = getattr(optional_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
