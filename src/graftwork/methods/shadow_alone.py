"""The small model of ShadowPEFT: where it comes from, what it answers, and it on its own."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from ..files.hub import Source


def mirror(config: Any, stack: Any) -> tuple[Any, None]:
    """A smaller model of the same kind as a stack of blocks."""
    small = copy.deepcopy(stack.config)
    for size in config.SIZES:
        names = (size, "ffn_dim", "n_inner") if size == "intermediate_size" else (size,)
        if (value := getattr(config, f"shadow_{size}")) is not None:
            found = next((name for name in names if hasattr(small, name)), None)
            if found is None:
                raise ValueError(f"a {type(small).__name__} has no {size}; leave it out")
            setattr(small, found, value)
    n = small.num_hidden_layers = config.shadow_num_hidden_layers or 1
    if kinds := getattr(small, "layer_types", None):
        small.layer_types = [*kinds, *[kinds[-1]] * n][:n]
    if (window := getattr(small, "max_window_layers", None)) is not None:
        small.max_window_layers = min(window, n)
    return type(stack)(small), None


def pretrained(config: Any, stack: Any) -> tuple[Any, Tensor | None]:
    """A trained model, and the projection to a larger one's width that it may bring along."""
    source = Source(config.shadow_model)
    raw = json.loads(source.need("config.json").read_text(encoding="utf-8"))
    if raw.get("model_type") != "causal_lm_with_hidden_projection":
        return AutoModel.from_pretrained(config.shadow_model), None
    model = AutoModel.from_config(AutoConfig.for_model(**raw["shadow_model_config"]))
    tensors, front = load_file(source.need("model.safetensors")), "shadow_model."
    model.load_state_dict({k[len(front) :]: t for k, t in tensors.items() if k.startswith(front)})
    return model, tensors["shadow_hidden_projection.weight"]


def answers(head: Any, s: Tensor, lm: bool, mask: Any, labels: Any) -> tuple[Tensor, Any]:
    """The logits of hidden states s (rows, positions, width), and their loss, given labels."""
    if not lm:  # at each row's last token that is no padding
        mask = s.new_ones(s.shape[:2]) if mask is None else mask.ne(0)
        s = s.take_along_dim(mask.cumsum(-1).argmax(-1)[:, None, None], 1)[:, 0]
    logits: Tensor = head(s.to(next(head.parameters()).dtype))
    if labels is None:
        return logits, None
    labels = labels.to(logits.device)
    if lm:
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    if logits.shape[-1] == 1:
        return logits, F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).flatten())
    if labels.is_floating_point():
        return logits, F.binary_cross_entropy_with_logits(logits, labels)
    return logits, F.cross_entropy(logits, labels.flatten())


class ShadowAlone(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model or a classifier; the large one's embeddings it refers to, not owns."""

    base_model_prefix = "backbone"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, side: Any, model: Any) -> None:
        super().__init__(side.backbone.config)
        self.backbone, self.shadow_hidden_projection = side.backbone, side.projection
        self.lm, self.head = side.lm, model.get_output_embeddings() if side.lm else side.head
        self.generation_config = self.generation_config_class.from_model_config(self.config)
        if side.shares:
            self.__dict__["embed_tokens"] = model.get_input_embeddings()

    def can_generate(self) -> bool:
        return bool(self.__dict__.get("lm"))

    def get_output_embeddings(self) -> Any:
        return self.head if self.lm else None

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        """As of the large model, with ``labels`` for a loss."""
        kwargs.pop("logits_to_keep", None)
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self.get_input_embeddings()(input_ids)
        out = self.backbone(attention_mask=attention_mask, **kwargs | {"return_dict": True})
        s = self.shadow_hidden_projection(out.last_hidden_state)
        if self.head is None:
            return s
        logits, loss = answers(self.head, s, self.lm, attention_mask, labels)
        if not self.lm:
            return SequenceClassifierOutput(loss, logits)
        return CausalLMOutputWithPast(loss, logits, out.get("past_key_values"))
