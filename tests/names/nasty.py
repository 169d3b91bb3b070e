"""Names that tools trip over, and a small model whose modules are called so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from graftwork.testing.layers import Told

# what stands in files between and behind the names of modules, and what libraries look for in names
MODULES = [
    *("lora_A", "lora_B", "lora", "lora_magnitude_vector", "lora_embedding_A", "weight", "bias"),
    *("default", "base_layer", "base_model", "model", "modules_to_save", "original_module"),
    *(
        "token_adapter",
        "trainable_tokens_delta",
        "adapters",
        "mlp",
        "module",
        "q",
        "q_proj",
        "proj",
    ),
    *("hada_w1_a", "lokr_w1", "vera_lambda_b", "vera_A", "ia3_l", "oft_r", "layernorm", "weighted"),
    *("_orig_mod", "_fsdp_wrapped_module", "keys", "items", "values", "pop", "switch", "site"),
    *("param:weight", "a:b", "/", "/x", "\\", "x y", "x\ny", "%s{}", "[0]", "(a|b)*"),
    *(
        "^$",
        "a+b",
        "\\d",
        "\"'",
        "é",
        "e\u0301",
        "重み",
        "😀",
        "\u202eabc",
        "0",
        "00",
        "-1",
        "٣",
        "K",
    ),
    *("con", "NUL", "prompt_embeddings", "prefix", "shared", "copy", "bottleneck", "__base__"),
    *("w" * 300, "L" + "ong_" * 40),
]
ADAPTERS = [
    *("default", "lora", "lora_A", "weight", "bias", "base_layer", "base_model", "model", "mlp"),
    *(
        "modules_to_save",
        "original_module",
        "token_adapter",
        "adapters",
        "a",
        "A",
        "aa",
        "default2",
    ),
    *("keys", "items", "pop", "update", "forward", "values", "type", "half", "to"),
    *("with space", "hy-phen", "UPPER", "upper", "CON", "nul", "é", "e\u0301", "重み", "😀", "0"),
    "00",
    *("%s{}", "[0]", "(a|b)*", "^$", "a+b", "a:b", "\"'", "q_proj", "layers", "hada_w1_a"),
    *("vera_lambda_b", "ia3_l", "org/name", "__base", "_", "shared", "training_state", "x" * 200),
]


def well_formed(name: str) -> bool:
    """Whether torch takes it as the name of a module."""
    return bool(name) and "." not in name and not hasattr(nn.Module(), name)


_FREE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=["."]), min_size=1)
MODULE = st.one_of(st.sampled_from(MODULES), st.sampled_from(MODULES), _FREE).filter(well_formed)


class Tree(nn.Module):
    """Modules under any names, the first of which is called."""

    def named(self, name: str, module: nn.Module) -> Any:
        """The module, a child of this name from now on."""
        self.add_module(name, module)
        return module

    def forward(self, x: Any) -> Any:
        return next(iter(self._modules.values()))(x)  # type: ignore[misc]


class Block(Tree):
    """Two linear layers and a norm."""

    def __init__(self, names: tuple[str, str, str]) -> None:
        super().__init__()
        layers = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)
        for name, layer in zip(names, layers, strict=True):
            self.named(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        up, down, norm = self._modules.values()
        y: Tensor = norm(x + down(torch.tanh(up(x))))  # type: ignore[misc]
        return y


class Body(Tree):
    """An embedding, two blocks, and an output layer."""

    def __init__(self, names: tuple[str, str, str], block: tuple[str, str, str]) -> None:
        super().__init__()
        self.named(names[0], nn.Embedding(12, 8))
        blocks = self.named(names[1], Tree())
        for i in "01":
            blocks.named(i, Block(block))
        self.named(names[2], nn.Linear(8, 12, bias=False))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        embed, blocks, head = self._modules.values()
        x = embed(ids)  # type: ignore[misc]
        for block in blocks._modules.values():  # type: ignore[union-attr]
            x = block(x)  # type: ignore[misc]
        return x, head(x)  # type: ignore[misc]


class Named(Tree):
    """A small model.

    Args:
        outer: the names of the modules around all that it has.
        root: the names of the embedding, of the list of blocks, and of the output layer.
        block: the names of a block's layers, and of its norm.
    """

    def __init__(
        self, outer: tuple[str, ...], root: tuple[str, str, str], block: tuple[str, str, str]
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=8, model_type="named")
        front = "".join(f"{name}." for name in outer)
        self.embed, self.head = front + root[0], front + root[2]
        self.layers = {f"{front}{root[1]}.{i}.{name}" for i in (0, 1) for name in block[:2]}
        holder: Tree = self
        for name in outer[:-1]:
            holder = holder.named(name, Tree())
        holder.named(outer[-1], Body(root, block))

    def forward(
        self, ids: Tensor, output_hidden_states: bool = False, return_dict: bool = False
    ) -> Any:
        x, y = super().forward(ids)
        return Told((x,), y) if output_hidden_states else y


@st.composite
def trees(draw: Any) -> tuple[Any, ...]:
    """The arguments of ``Named``."""
    outer = tuple(draw(st.lists(MODULE, min_size=1, max_size=2)))
    root = tuple(draw(st.lists(MODULE, min_size=3, max_size=3, unique=True)))
    block = tuple(draw(st.lists(MODULE, min_size=3, max_size=3, unique=True)))
    return outer, root, block


ADAPTER = st.sampled_from(ADAPTERS)
