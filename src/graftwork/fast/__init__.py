"""Functions of tensors that the engine chooses where they are cheaper; they know of no adapter."""
