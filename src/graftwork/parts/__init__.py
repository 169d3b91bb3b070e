"""What stands in a host beside or instead of a method's own adapters: copies, biases, stacks."""
