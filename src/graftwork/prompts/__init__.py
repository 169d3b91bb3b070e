"""Virtual tokens: as embeddings in front of the input, or as keys and values in every attention."""
