"""Papers on how networks, rates and multipliers scale with width and depth."""
