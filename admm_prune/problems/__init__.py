"""Problems: the loss of pruning, and the sparsity constraint."""
