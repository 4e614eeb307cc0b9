"""Papers on optimization."""
