"""The structured methods by name: one recipe in several configurations."""

from __future__ import annotations

from admm_prune.problems.allocation import EqualSlope, Uniform
from admm_prune.recipes.struprune import StruPrune

STRUCTURED: tuple[StruPrune, ...] = (
    StruPrune(),
    StruPrune(name="struprune-uniform", summary="struprune with all blocks alike: a stock model", uniform=True),
    StruPrune(
        name="struprune-padded",
        summary="struprune, filled up to the widest block by zeros: a stock model",
        form="padded",
    ),
    StruPrune(
        name="structured-global",
        summary="baseline: all statistics of the dense model at once, one greedy choice over all of it",
        allocator=EqualSlope(),
        inputs="dense",
    ),
    StruPrune(
        name="structured-wanda",
        summary="baseline: the same fraction of every branch by Wanda's score of its units, nothing answers",
        selector="mask",
        compensate=False,
        fold_bias=False,
        allocator=Uniform(),
        ridge=0.0,
    ),
)
