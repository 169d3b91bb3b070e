"""What adapters change, as updates of weights: combined, converted, made smaller, swapped."""
