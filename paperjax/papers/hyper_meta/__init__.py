"""Papers on choosing architectures and hyperparameters."""
