"""Many trainings in one pass over one base model: ``train_together``."""
