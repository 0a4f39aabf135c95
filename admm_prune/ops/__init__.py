"""Array kernels in plain torch: exact selection by threshold."""
