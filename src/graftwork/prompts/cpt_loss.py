"""The loss of context-aware prompt tuning: the mean of w_i CE_i over the labels in the examples and
those of the input, w_i smaller for earlier examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Inputs
from .order import counts
from .tokens import Tokens

if TYPE_CHECKING:
    from ..engine.root import Grafted
    from .cpt import CPTConfig


def with_loss(config: CPTConfig, root: Grafted, outputs: Any, args: Any, kwargs: Any) -> Any:
    """A model's outputs with this loss instead of theirs, where there are labels."""
    inputs, call = Inputs(root.model, args, kwargs), root.switch.current()
    labels, x = inputs.get("labels"), inputs.x
    if labels is None or x is None:
        return outputs
    prompts = [s for n in call.active if isinstance(s := root.switch.shared.get(n), Tokens)]
    ids = [i for one in prompts for i in (one.config.ids if one.weighs else [-100] * one.n)]
    types = [i for one in prompts for i in (one.config.types if one.weighs else [0] * one.n)]
    order = inputs.order(counts({str(i): one for i, one in enumerate(prompts)}, call, x))
    given = call.context.get("input_type_mask")
    given = torch.full_like(labels, 4) if given is None else given.to(labels)
    behind = given + 4 * -(-max(types) // 4) * (given > 0)  # types as of later examples
    kinds = order.join(labels.new_tensor([types]), behind)
    known = order.join(labels.new_tensor([ids]), labels).masked_fill(~is_label(kinds), -100)
    factor = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
    named = isinstance(outputs, Mapping)
    loss = weighted(outputs["logits"] if named else outputs[1], known, weights(kinds, factor))
    if (items := inputs.get("num_items_in_batch")) is not None:  # of batches that are added up
        loss = loss * (labels != -100).sum() / items
    if not named:
        return loss, *outputs[1:]
    outputs["loss"] = loss
    return outputs


def is_label(types: Tensor) -> Tensor:
    """Which tokens are labels of an example."""
    return (types > 0) & (types % 4 == 0)


def weights(types: Tensor, factor: float) -> Tensor:
    """factor^k for the labels that k later examples with labels follow, (rows, t); else 1."""
    out = torch.ones_like(types, dtype=torch.float32)
    for row, weight in zip(types, out, strict=True):
        ends = row[1:][is_label(row[1:])].unique()  # ascending; nothing predicts the first token
        for k, end in enumerate(ends.flip(0)):
            weight[row == end] = factor**k
    return out


def weighted(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean over known labels of their weighted cross entropy."""
    labels = labels[:, 1:].to(logits.device)
    each = F.cross_entropy(logits[:, :-1].mT.float(), labels, reduction="none")  # (rows, t - 1)
    known = labels != -100
    return (each * weights[:, 1:].to(each))[known].mean()
