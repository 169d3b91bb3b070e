"""What goes beside the model in ShadowPEFT: a small model, and the shadow from block to block."""

from __future__ import annotations

import inspect
from collections import UserDict
from copy import deepcopy
from typing import Any
from uuid import uuid4

from torch import Tensor, compiler, nn

from ..engine import Shared
from ..engine.inject import switch_of
from ..engine.tree import inside
from ..errors import StateError
from ..hooks import need_all


class Side(Shared):
    """The small model, a projection to the width of the blocks, and a classifier's head."""

    def __init__(self, config: Any, model: Any, stack: nn.Module) -> None:
        from .shadow_alone import mirror, pretrained

        super().__init__()
        self.model = (model,)  # in a tuple: referred to, not owned
        self.name = f"shadow-{uuid4()}"  # of its states in a call
        self.inputs = list(inspect.signature(model.forward).parameters)
        self.width = int(model.config.get_text_config().hidden_size)
        self.last_shadow_loss: Tensor | None = None
        mirrored = config.shadow_model == "mirror"
        self.backbone, weight = (mirror if mirrored else pretrained)(config, stack)
        own = self.backbone.config.hidden_size
        fits = own == self.width and weight is None
        self.projection = nn.Identity() if fits else nn.Linear(own, self.width, bias=False)
        if weight is not None:
            self.projection.load_state_dict({"weight": weight})
        self.shares = config.share_embeddings and mirrored and own == self.width
        if self.shares and hasattr(self.backbone, "embed_tokens"):
            self.backbone.embed_tokens = None
        elif self.shares or not mirrored:  # buffers, which nothing that unfreezes an adapter finds
            table = self.backbone.get_input_embeddings()
            for n in [n for n, _ in table.named_parameters(recurse=False)]:
                table.register_buffer(n, table._parameters.pop(n).data)
        self.lm = config.task_type == "CAUSAL_LM"
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
        self.head = deepcopy(inside(head)) if head and config.task_type == "SEQ_CLS" else None
        self.keys = {k: f"shadow_{k}".replace(".", ".default.", 1) for k in self.state_dict()}

    def front(self, path: str, context: dict[str, Any]) -> Tensor:
        """The shadow in front of a block: behind the one before it that has run."""
        if self.name not in context:
            raise StateError(
                "a shadow is made of the model's own inputs, so call the PeftModel, not the model "
                "inside it"
            )
        first, behind = context[self.name]
        before = [*behind][: [*behind, path].index(path)]  # in a repeated forward, later ones too
        return behind[before[-1]] if before else first  # type: ignore[no-any-return]

    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> nn.Module:
        """The small model on its own, which answers and generates without the large one.

        Args:
            adapter_name: whose; by default that of the active adapter.
            copy: independent of this model, rather than sharing its tensors.
        """
        from .shadow_alone import ShadowAlone

        model, side = self.model[0], self
        if adapter_name is not None and (switch := switch_of(model)) is not None:
            side = switch.shared[switch.check((adapter_name,))[0]]
        alone = ShadowAlone(side, model)
        alone = deepcopy(alone) if copy else alone
        if copy and side.shares:  # embeddings of its own, which are not tied to its head
            alone.backbone.set_input_embeddings(deepcopy(alone.__dict__.pop("embed_tokens")))
        return alone


def before(config: Any, root: Any, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """The first shadow, from the model's inputs."""
    side = root.switch.shared[name]
    given = dict(zip(side.inputs, args, strict=False)) | kwargs
    need_all("a shadow", given)
    if "use_cache" in side.inputs:  # blocks that get some of the rows would mix up a cache
        kwargs["use_cache"] = False
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    seen = {n: given[n] for n in names if given.get(n) is not None}
    with root.switch.call((name,)):
        if side.shares and "input_ids" in seen:
            seen["inputs_embeds"] = root.model.get_input_embeddings()(seen.pop("input_ids"))
        if "inputs_embeds" in seen:
            seen["inputs_embeds"] = seen["inputs_embeds"].to(side.dtype)
        s = side.backbone(**seen, use_cache=False, return_dict=True).last_hidden_state
    return {side.name: (side.projection(s), UserDict())}  # no dict, which groups of rows would copy


def after(config: Any, root: Any, name: str, outputs: Any, args: Any, kwargs: Any) -> Any:
    """The outputs with the small model's own loss added to theirs."""
    from .shadow_alone import answers

    side, weight = root.switch.shared[name], config.auxiliary_loss_weight
    given = dict(zip(side.inputs, args, strict=False)) | kwargs
    head = root.model.get_output_embeddings() if side.lm else side.head
    side.last_shadow_loss = None
    if given.get("labels") is None or head is None or getattr(outputs, "loss", None) is None:
        return outputs
    s, _ = root.switch.current().context[side.name]
    _, loss = answers(head, s, side.lm, given.get("attention_mask"), given["labels"])
    if not compiler.is_compiling():
        side.last_shadow_loss = loss.detach()
    if weight > 0:
        outputs.loss = outputs.loss + (weight * loss).to(outputs.loss.dtype)
    return outputs
