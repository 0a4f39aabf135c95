"""ELSA: ADMM whose x-step is a run of Adam on the true loss: the parts of `SparseAdam`."""
