"""The parts of the solvers, one by one, each beside its floor: `make bench`."""
