"""The engine: everything about adapters that is not the mathematics of one method."""
