"""Merging an adapter into a model's files: one after another, with no model in memory."""

from .merge import Merged, merge_files

__all__ = ["Merged", "merge_files"]
