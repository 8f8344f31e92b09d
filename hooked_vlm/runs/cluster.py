"""A run whose samples are shared out over the machines of a Ray cluster."""
