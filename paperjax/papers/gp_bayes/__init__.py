"""Papers on networks as Gaussian processes and their kin."""
