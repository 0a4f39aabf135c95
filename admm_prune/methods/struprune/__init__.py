"""Structured pruning of sublayers under one budget, as STRUPRUNE does it."""
