"""The small model of ShadowPEFT without the large one: head(projection(backbone(x)))."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from .shadow_models import last_of, loss_of


class ShadowAlone(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model or a classifier; ``table`` are embeddings that it refers to, not owns."""

    main_input_name = "input_ids"
    base_model_prefix = "backbone"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, backbone: Any, projection: nn.Module, head: Any, table: Any = None, lm: bool = True
    ) -> None:
        super().__init__(backbone.config)
        self.backbone, self.shadow_hidden_projection, self.head = backbone, projection, head
        self.table, self.lm = (table,), lm
        self.generation_config = GenerationConfig.from_model_config(self.config)

    def can_generate(self) -> bool:
        return bool(self.__dict__.get("lm"))

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.table[0] or self.backbone.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head if self.lm else None

    def owning(self) -> ShadowAlone:
        """A copy that shares nothing, with embeddings of its own."""
        table, self.table = self.table, (None,)
        try:
            twin = copy.deepcopy(self)
        finally:
            self.table = table
        if table[0] is not None:
            twin.backbone.set_input_embeddings(copy.deepcopy(table[0]))
        return twin

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of the large model, with ``labels`` for a loss."""
        kwargs.pop("logits_to_keep", None)
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self.get_input_embeddings()(input_ids)
        kwargs["return_dict"] = True
        out = self.backbone(attention_mask=attention_mask, **kwargs)
        s = self.shadow_hidden_projection(out.last_hidden_state)
        if self.head is None:
            return s
        logits = self.head(s if self.lm else last_of(s, attention_mask))
        loss = None if labels is None else loss_of(logits, labels, self.lm)
        if not self.lm:
            return SequenceClassifierOutput(loss=loss, logits=logits)
        past = getattr(out, "past_key_values", None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)
