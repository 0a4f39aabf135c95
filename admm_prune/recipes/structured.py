"""The structured methods by name: one recipe in several configurations."""

from __future__ import annotations

import math

from admm_prune.problems.allocation import EqualSlope, Uniform
from admm_prune.recipes.struprune import StruPrune

TEMPERATURES = (0.0, 0.5, 1.0, 2.0, math.inf)  # from the global greedy choice to the same fraction everywhere

STRUCTURED: tuple[StruPrune, ...] = (
    StruPrune(temperatures=TEMPERATURES),
    StruPrune(
        name="struprune-uniform",
        summary="struprune with all blocks alike: a stock model",
        uniform=True,
        temperatures=TEMPERATURES,
    ),
    StruPrune(
        name="struprune-padded",
        summary="struprune, filled up to the widest block by zeros: a stock model",
        form="padded",
        temperatures=TEMPERATURES,
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
