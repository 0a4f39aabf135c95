"""Pruning methods end to end: they join problems, solvers and models."""
