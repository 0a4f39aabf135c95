"""`python -m admm_prune` is `admm-prune`."""

from admm_prune.cli import main

main()
