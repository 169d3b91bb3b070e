"""VB-LoRA in the small files of ``save_only_topk_weights``: which vectors are mixed, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError
from .vblora import VBLoRA

DTYPES = {torch.uint8: 8, torch.int16: 15, torch.int32: 31, torch.int64: 63}  # PEFT's, and bits


class Brief(VBLoRA):
    """In a file, of each row of logits: the indices of the largest, and all weights but the last,
    as they add up to one.
    """

    lost = False  # whether the other logits were in no file

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.lost and self.training and self.A.requires_grad:
            raise StateError(
                "this adapter was saved with save_only_topk_weights=True, without the logits that "
                "training needs: call model.eval(), or load a file with all of them"
            )
        return super().factors()

    def file_tensors(self) -> dict[str, Tensor]:
        out = {}
        for key, logits in super().file_tensors().items():
            top, index = logits.topk(self.topk)
            dtype = next(d for d, bits in DTYPES.items() if logits.shape[-1] < 2**bits)
            out[f"{key}_topk_indices"] = index.to(dtype)
            out[f"{key}_topk_weights"] = top.softmax(-1)[..., :-1].contiguous()
        return out

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        for key, logits in super().file_tensors().items():
            if f"{key}_topk_indices" in tensors:
                index = tensors[f"{key}_topk_indices"].to(logits.device, torch.int64)
                weights = tensors[f"{key}_topk_weights"].to(logits)
                last = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
                logits.fill_(-torch.inf).scatter_(-1, index, torch.cat([weights, last], -1).log())
                self.lost = True
