"""Triton kernels. Each has a reference implementation in plain torch in `ops`, which decides between them
(`ops.backend`).

A module holds the kernels (`*_kernel`, compiled for the GPU) and the functions that launch them. Imported only where
Triton runs.
"""
