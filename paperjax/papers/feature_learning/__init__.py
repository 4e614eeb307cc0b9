"""Papers on what makes the features of wide networks move."""
