"""The arithmetic of a step in as few passes over the activations as there can be."""

from .plain import plain_path
from .scale import blocks, row_norms, scaled

__all__ = ["blocks", "plain_path", "row_norms", "scaled"]
