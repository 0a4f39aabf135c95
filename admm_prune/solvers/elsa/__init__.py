"""ELSA: ADMM whose x-step is a run of Adam on the true loss. `SparseAdam` and the solver `ELSA` are made of these."""
