"""Optimizers that know the factors of a LoRA."""
