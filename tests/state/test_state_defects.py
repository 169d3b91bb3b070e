"""Short sequences that have once shown a defect, and what no sequence of one model shows."""

from __future__ import annotations
