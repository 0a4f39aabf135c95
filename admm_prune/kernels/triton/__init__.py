"""Triton kernels. Each has a plain-torch twin outside this folder, which decides between them (`kernels.backend`).

`device_*.py` hold what is compiled for the GPU; their neighbours launch it. Imported only where Triton runs.
"""
