"""Tensor operations in plain torch, some with a Triton kernel of the same results (`ops.backend`)."""
