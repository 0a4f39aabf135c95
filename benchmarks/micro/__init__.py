"""Single operations of the solvers, each with the lower bound of its time: `make bench`."""
