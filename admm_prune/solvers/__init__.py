"""Solvers: how to find the weights. They meet problems only through the protocols of `admm_prune.problem`."""
