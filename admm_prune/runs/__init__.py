"""Runs of whole models: folders, manifests, journals, comparisons, reports."""
