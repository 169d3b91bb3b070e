"""The arithmetic of a step in as few passes over the activations as there can be."""

from .scale import blocks, row_norms, scaled
from .watch import plain_path

__all__ = ["blocks", "plain_path", "row_norms", "scaled"]
