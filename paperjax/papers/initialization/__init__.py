"""Papers on how parameters start."""
