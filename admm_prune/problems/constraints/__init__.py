"""Constraint sets, each with an exact projection in any positive diagonal metric that keeps exactly its budget."""

from admm_prune.problems.constraints.base import SparseSet
from admm_prune.problems.constraints.elementwise import FREE, NofM, RowWise, Unstructured
from admm_prune.problems.constraints.grouped import Blocks, Groups
from admm_prune.problems.constraints.product import Product, StackedRows

__all__ = ["FREE", "Blocks", "Groups", "NofM", "Product", "RowWise", "SparseSet", "StackedRows", "Unstructured"]
