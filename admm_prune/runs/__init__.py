"""Runs: what stands around a recipe: folders, manifests, comparisons, plots."""
