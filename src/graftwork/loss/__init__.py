"""The loss of a causal language model, computed in parts: its logits are never there at once."""
