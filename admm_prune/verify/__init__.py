"""`admm-prune verify`: recomputes what a layer file or a run folder reports."""
