"""MiCA (arXiv 2604.01694): W + s U_r A, with U_r the left singular vectors of W of the r smallest
singular values, frozen; A starts at zero.
"""

from __future__ import annotations

from ..engine import Site
from .lora import LoRA
from .lora_config import LoraConfig


class MiCA(LoRA):
    """LoRA whose B (out, r) is kept in files and does not train."""

    def __init__(self, config: LoraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        b = self.B.detach()
        del self.B
        self.register_buffer("B", b)
