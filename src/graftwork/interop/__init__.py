"""Other libraries: transformers' Trainer, and standing in for peft."""
