"""Recipes: the methods end to end, as flat functions that join problems, solvers and models."""
