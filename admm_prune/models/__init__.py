"""Language models: load, find the prunable weights, capture what enters them, evaluate, save."""
