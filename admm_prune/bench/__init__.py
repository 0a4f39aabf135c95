"""The GPU benchmark: solvers, selection, training steps and whole blocks, each beside its floor on the same card.

Imports nothing but torch, transformers, safetensors, numpy and scipy, so that it runs where little else is installed.
"""
