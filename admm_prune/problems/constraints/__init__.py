"""Sparse sets: each is an exact projection in any positive diagonal metric, and keeps exactly the count asked."""

from admm_prune.problems.constraints.base import SparseSet
from admm_prune.problems.constraints.elementwise import NofM, RowWise, Unstructured
from admm_prune.problems.constraints.grouped import Blocks, Groups
from admm_prune.problems.constraints.product import Product, StackedRows

__all__ = ["Blocks", "Groups", "NofM", "Product", "RowWise", "SparseSet", "StackedRows", "Unstructured"]
