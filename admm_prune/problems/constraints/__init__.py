"""Constraint sets, each with an exact projection in any positive diagonal metric that keeps exactly its budget."""

from admm_prune.problems.constraints.base import SparseSet
from admm_prune.problems.constraints.elementwise import NofM, RowWise, Unstructured
from admm_prune.problems.constraints.grouped import Blocks, Groups
from admm_prune.problems.constraints.product import Product, StackedRows

__all__ = ["Blocks", "Groups", "NofM", "Product", "RowWise", "SparseSet", "StackedRows", "Unstructured"]
