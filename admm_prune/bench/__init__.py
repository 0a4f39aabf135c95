"""The GPU benchmark: solvers, selection, training steps and blocks, each compared with its lower bound.

Imports nothing but torch, transformers, safetensors, numpy and scipy, so that it runs where little else is installed.
"""
