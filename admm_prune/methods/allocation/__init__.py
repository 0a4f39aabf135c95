"""Allocation of one budget of weights over all matrices of a model: measurements, rules by name, and a search."""
