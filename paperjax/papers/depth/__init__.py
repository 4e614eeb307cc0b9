"""Papers on networks whose depth goes to infinity."""
