"""Methods that train all parameters of the model: surrogate-free ADMM (ELSA) and its baselines."""
