"""Which layers a config means: what a model offers, and what of it a config names."""
