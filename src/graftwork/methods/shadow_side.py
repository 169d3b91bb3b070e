"""The small model of ShadowPEFT: what it is built from, what it makes of the inputs, its loss."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine import Shared
from ..engine.inject import switch_of
from ..engine.root import Grafted
from ..engine.rows import PerRow
from ..engine.schedule import add_to_loss
from ..engine.tree import inside
from ..errors import StateError, TargetError
from ..hooks import need_all
from ..targets.offer import Offer
from .shadow_models import frozen, last_of, loss_of, mirror, pretrained

if TYPE_CHECKING:
    from .shadow import ShadowConfig

NUMBER = count()


@dataclass
class Plan:
    """What is to be known of the model: its blocks, their width, how it is called and its head."""

    model: nn.Module
    blocks: list[str]
    width: int
    stack: nn.Module
    inputs: list[str]
    head: nn.Module | None  # a classifier's, copied

    @classmethod
    def of(cls, config: ShadowConfig, offer: Offer) -> Plan:
        """The plan for one model.

        Raises:
            TargetError: it is no single stack of blocks with a hidden state.
        """
        model: Any = offer.model
        if not hasattr(model, "get_decoder") or model.config.is_encoder_decoder:
            raise TargetError(
                f"a shadow follows one stack of transformer blocks, and a {type(model).__name__} "
                "is none that is known"
            )
        stack = inside(model.get_decoder())
        lists = {
            path: len(module)
            for path, module in offer.modules.items()
            if isinstance(module, nn.ModuleList) and _holds(stack, module)
        }
        longest = max(lists, key=lambda path: lists[path], default="")
        blocks = [f"{longest}.{i}" for i in range(lists.get(longest, 0))]
        head = None
        if getattr(config.task_type, "value", "") == "SEQ_CLS":
            found = getattr(model, "score", None) or getattr(model, "classifier", None)
            head = None if found is None else copy.deepcopy(inside(found))
        inputs = list(inspect.signature(model.forward).parameters)
        width = int(model.config.get_text_config().hidden_size)
        return cls(model, blocks, width, stack, inputs, head)


def _holds(stack: nn.Module, module: nn.Module) -> bool:
    return any(inside(m) is module for m in stack.modules())


class Trail(PerRow, dict[int, Tensor]):
    """The shadow in front of each block, for all rows of a batch or some of them."""

    parent: Trail | None = None
    index: Tensor

    @property
    def rows(self) -> int:  # type: ignore[override]
        """Of how many rows it is."""
        return len(self[0])

    def take(self, index: Tensor) -> Trail:
        own = Trail({place: s[index] for place, s in self.items()})
        own.parent, own.index = self, index
        return own

    def __setitem__(self, place: int, s: Tensor) -> None:
        super().__setitem__(place, s)
        if self.parent is not None:
            old = self.parent.get(place)
            whole = self.parent[0].new_zeros(self.parent[0].shape) if old is None else old
            self.parent[place] = whole.index_copy(0, self.index, s.to(whole.dtype))


class Side(Shared):
    """The small model, a projection to the width of the blocks, and a head."""

    def __init__(self, config: ShadowConfig, plan: Plan) -> None:
        super().__init__()
        self.config, self.width, self.inputs = config, plan.width, plan.inputs
        self.model = (plan.model,)  # in a tuple: referred to, not owned
        self.name = f"shadow{next(NUMBER)}"  # of its states in a call
        self.places: dict[str, int] = {}
        mirrored = config.shadow_model == "mirror"
        self.backbone, projection = (
            mirror(config, plan.stack) if mirrored else pretrained(config.shadow_model)
        )
        own = int(self.backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]
        if projection is None and own != self.width:
            projection = nn.Linear(own, self.width, bias=False)
        self.projection = nn.Identity() if projection is None else projection
        self.shares = config.share_embeddings and mirrored and own == self.width
        if self.shares and hasattr(self.backbone, "embed_tokens"):
            self.backbone.embed_tokens = None  # type: ignore[assignment]
        elif self.shares or not mirrored:
            frozen(self.backbone.get_input_embeddings())  # type: ignore[operator]
        self.head = plan.head
        self.lm = getattr(config.task_type, "value", "") == "CAUSAL_LM"
        fronts = {n: f"shadow_{n}.default." for n in ("backbone", "projection", "head")}
        parts = [(key, *key.partition(".")[::2]) for key in self.state_dict()]
        self.keys = {key: fronts[part] + leaf for key, part, leaf in parts}
        self.last_shadow_loss: Tensor | None = None

    def place(self, path: str) -> int:
        """The number of a block."""
        return self.places.setdefault(path, len(self.places))

    def before(self, root: Grafted, name: str, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The shadow in front of the first block, from the model's inputs."""
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        need_all("a shadow", given)
        if "use_cache" in self.inputs:  # blocks that get some of the rows would mix up a cache
            kwargs["use_cache"] = False
        names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        seen = {n: given[n] for n in names if given.get(n) is not None}
        model: Any = root.model
        with root.switch.call((name,)):
            if self.shares and "input_ids" in seen:
                seen["inputs_embeds"] = model.get_input_embeddings()(seen.pop("input_ids"))
            if "inputs_embeds" in seen:
                seen["inputs_embeds"] = seen["inputs_embeds"].to(self.dtype)
            out = self.backbone(**seen, use_cache=False, return_dict=True)
        return {self.name: Trail({0: self.projection(out.last_hidden_state)})}

    def trail(self, context: dict[str, Any]) -> Trail:
        """The states of this call."""
        if self.name not in context:
            raise StateError(
                "a shadow is made of the model's own inputs, so call the PeftModel, not the model "
                "inside it"
            )
        found: Trail = context[self.name]
        return found

    def state(self, context: dict[str, Any], place: int) -> Tensor:
        """The shadow in front of a block: behind the one before it that has run."""
        trail = self.trail(context)
        return trail[max(n for n in trail if n <= place)]

    def after(self, root: Grafted, outputs: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The outputs with the small model's own loss added to theirs."""
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        labels, model = given.get("labels"), root.model
        head: Any = model.get_output_embeddings() if self.lm else self.head  # type: ignore[operator]
        self.last_shadow_loss = None
        if labels is None or head is None or getattr(outputs, "loss", None) is None:
            return outputs
        s = self.trail(root.switch.current().context)[0]
        s = s.to(next(head.parameters()).dtype)
        logits = head(s if self.lm else last_of(s, given.get("attention_mask")))
        loss = loss_of(logits, labels, self.lm)
        if not torch.compiler.is_compiling():
            self.last_shadow_loss = loss.detach()
        weight = self.config.auxiliary_loss_weight
        return add_to_loss(outputs, [weight * loss] if weight > 0 else [])

    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> nn.Module:
        """The small model on its own, which answers and generates without the large one.

        Args:
            adapter_name: whose; by default that of the active adapter.
            copy: independent of this model, rather than sharing its tensors.
        """
        from .shadow_alone import ShadowAlone

        switch, model = switch_of(self.model[0]), self.model[0]
        side: Any = self
        if adapter_name is not None and switch is not None:
            side = switch.shared[switch.check((adapter_name,))[0]]
        head = model.get_output_embeddings() if side.lm else side.head  # type: ignore[operator]
        table = model.get_input_embeddings() if side.shares else None  # type: ignore[operator]
        alone = ShadowAlone(side.backbone, side.projection, head, table, side.lm)
        return alone.owning() if copy else alone
