"""Solvers. They depend on problems only through the protocols of `admm_prune.problem`."""
