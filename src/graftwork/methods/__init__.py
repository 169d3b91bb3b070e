"""One file per method: its formula, its config, its mathematics."""
