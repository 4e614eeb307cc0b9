"""Papers on networks whose width goes to infinity."""
