"""Which layers a config means, and the error for every entry that means none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graftwork import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    TargetError,
    TrainableTokensConfig,
    get_peft_model,
    register_site,
)
from graftwork.engine.site import KINDS, Site
from graftwork.targets.match import Match
from graftwork.targets.offer import Offer
from graftwork.testing.bench import shake
from tiny import MODELS, Plain, build


def sites(model: nn.Module, config: Any) -> list[str]:
    match = Match(Offer(model), config)
    config.target_modules = match.resolved()
    return [t.name for t in match.targets()]


VIT = (
    "q_proj k_proj v_proj o_proj fc1 fc2 query key value dense".split()
)  # by transformers' version
FULL: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["layers.0.self_attn.v_proj"],
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0, 1],
    "layers_pattern": ["layers"],
    "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3},
    "alpha_pattern": {"v_proj": 4},
    "trainable_token_indices": {"embed_tokens": [3]},
}
WRONG: list[tuple[str, Any, str, str]] = [
    ("target_modules", ["q_porj", "v_proj"], "q_porj", "q_proj"),
    ("target_modules", ["q_proj", "v_prj"], "v_prj", "v_proj"),
    ("target_modules", r".*\.q_prok", "q_prok", "q_proj"),
    ("exclude_modules", ["layers.0.self_attn.v_prj"], "v_prj", "v_proj"),
    ("exclude_modules", r".*\.v_prj", "v_prj", "v_proj"),
    ("modules_to_save", ["lm_haed"], "lm_haed", "lm_head"),
    ("modules_to_save", ["classifier"], "classifier", "lm_head"),
    ("layers_to_transform", [0, 7], "7", "0, 1"),
    ("layers_pattern", ["layer"], "layer", "layers"),
    ("rank_pattern", {"q_porj": 2}, "q_porj", "q_proj"),
    ("rank_pattern", {"q_proj": 2, "k_proj": 2}, "k_proj", "q_proj"),
    ("alpha_pattern", {"v_porj": 4}, "v_porj", "v_proj"),
    ("trainable_token_indices", {"embed_tokns": [3]}, "embed_tokns", "embed_tokens"),
    ("target_parameters", ["experts.gate_up_prj"], "gate_up_prj", "gate_up_proj"),
]


@pytest.mark.fault("B1")
@pytest.mark.fault("B6")
@pytest.mark.parametrize("field, value, entry, right", WRONG, ids=[f"{w[0]}-{w[2]}" for w in WRONG])
def test_every_misspelt_entry_is_named_with_the_right_one(
    field: str, value: Any, entry: str, right: str
) -> None:
    options = {**FULL, field: value}
    if isinstance(options["target_modules"], str):
        options |= {"layers_to_transform": None, "layers_pattern": None}
    model = build("mixtral" if field == "target_parameters" else "llama")
    before = dict(model.named_modules())
    with pytest.raises(TargetError) as error:
        get_peft_model(model, LoraConfig(**options))
    text = str(error.value)
    assert field in text and entry in text and right in text
    assert "q_proj x2 Linear(32, 32)" in text and "allow_unmatched=True" in text
    assert dict(model.named_modules()).keys() == before.keys(), "something was left behind"
    assert all(p.requires_grad for p in model.parameters())
    if not isinstance(
        options["target_modules"], str
    ):  # a regex alone that matches nothing: no layer
        with pytest.warns(UserWarning, match="It has no effect"):
            get_peft_model(model, LoraConfig(**options, allow_unmatched=True))


@pytest.mark.fault("B6")
@pytest.mark.fault("J3")
def test_the_full_config_is_right() -> None:
    model = get_peft_model(build("llama"), LoraConfig(**FULL))
    ranks = {row.site.removeprefix("model."): row.rank for row in model.adapters()}
    assert ranks == {
        "layers.0.self_attn.q_proj": 2,
        "layers.1.self_attn.q_proj": 2,
        "layers.1.self_attn.v_proj": 3,
        "embed_tokens": None,
        "lm_head": None,
    }


@pytest.mark.fault("B1")
@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_porj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=["down_proj"]),
        AdaLoraConfig(target_modules=["q_porj"], total_step=5),
        TrainableTokensConfig(target_modules=["embed_tokns"], token_indices=[1]),
    ],
)
def test_the_other_methods_check_their_entries_too(config: Any) -> None:
    with pytest.raises(TargetError, match=r"did you mean|matches none of the 2 adapted layers"):
        get_peft_model(build("llama"), config)


@pytest.mark.fault("B2")
def test_nothing_to_adapt_is_an_error_even_where_entries_may_be_unmatched() -> None:
    for options in (
        {"target_modules": ["nothing"], "allow_unmatched": True},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]},
    ):
        with pytest.raises(TargetError, match="finds no layer to adapt"):
            with_warnings = LoraConfig(**options)
            if with_warnings.allow_unmatched:
                with pytest.warns(UserWarning, match="matches no module"):
                    get_peft_model(build("llama"), with_warnings)
            get_peft_model(build("llama"), with_warnings)


def test_a_layer_that_cannot_be_adapted_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.kernel

    model = nn.Sequential(Odd(), nn.Linear(4, 4))
    with pytest.raises(TargetError, match=r"register_site\(Odd, \.\.\.\)"):
        get_peft_model(model, LoraConfig(target_modules=["0", "1"]))
    with pytest.raises(TargetError, match="holds some; name them"):
        get_peft_model(build("llama"), LoraConfig(target_modules=["self_attn"]))
    with pytest.raises(TargetError, match="no regular expression"):
        get_peft_model(build("llama"), LoraConfig(target_modules="*proj"))


def test_a_users_own_layer_can_be_registered() -> None:
    class Kernel(nn.Module):
        """A linear layer that stores its weight as (in, out) under another name."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    class KernelSite(Site):
        def measure(self) -> tuple[int, int]:
            in_, out = self.raw.shape
            return out, in_

        def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.mT

        def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
            return matrix.mT

    register_site(Kernel, KernelSite)
    try:
        for config in (
            LoraConfig(r=2, target_modules=["0"]),
            LoraConfig(r=2, use_dora=True, target_modules=["0"]),
            IA3Config(target_modules=["0"]),
        ):
            model = nn.Sequential(Kernel()).eval()
            wrapped = get_peft_model(model, config).eval()
            shake(wrapped)
            x = torch.randn(3, 4)
            y = wrapped(x)
            wrapped.merge_adapter()
            torch.testing.assert_close(wrapped(x), y)
    finally:
        del KINDS[Kernel]


def test_the_shorthand_and_the_defaults() -> None:
    llama = build("llama")
    everything = {
        s.rpartition(".")[2] for s in sites(llama, LoraConfig(target_modules="all-linear"))
    }
    assert everything == set("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    assert {s.rpartition(".")[2] for s in sites(llama, LoraConfig())} == {"q_proj", "v_proj"}
    assert {s.rpartition(".")[2] for s in sites(build("gpt2"), IA3Config())} == {"c_attn", "c_proj"}
    bert = build("bert")
    plain = sites(bert, LoraConfig(target_modules="all-linear"))
    task = sites(bert, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert set(plain) - set(task) == {"classifier"}
    with pytest.raises(TargetError, match="has no repeated blocks"):
        get_peft_model(Plain(), LoraConfig())


@pytest.mark.fault("B2")
@pytest.mark.fault("L3")
@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("plain", "attention")])
def test_the_structure_of_known_architectures_is_found(name: str) -> None:
    model = build(name)
    del model.config.__class__.model_type  # an architecture that nobody has heard of
    try:
        found = sites(model, LoraConfig())
    finally:
        model.config.__class__.model_type = name.split("_")[0]
    leaves = {s.rpartition(".")[2] for s in found}
    paths = dict(model.named_modules())
    wanted = {
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        "bert": {"query", "key", "value", "dense"},
        "t5": {"q", "k", "v", "o", "wi", "wo"},
        "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "vit": {leaf for leaf in VIT if any(p.endswith(f".{leaf}") for p in paths)},
    }.get(name, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
    assert leaves == wanted, leaves ^ wanted
    assert not any(s.startswith(("lm_head", "classifier", "bert.pooler")) for s in found)


@pytest.mark.fault("B3")
def test_all_linear_says_when_it_leaves_stacked_experts_out() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,eio->bo", x, self.up)

    model = nn.Sequential(nn.Linear(4, 4), Experts())
    with pytest.warns(UserWarning, match=r"leaves the stacked parameters 1\.up out"):
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(TargetError, match=r"\['w1'\] without \['w3'\]"):
        get_peft_model(build("mixtral"), LoraConfig(target_modules=["w1"]))


def test_a_high_rank_is_a_warning_that_says_the_size() -> None:
    text = r"r=40 at model\.layers\.0\.self_attn\.q_proj Linear\(32, 32\) and 3 more"
    with pytest.warns(UserWarning, match=text):
        get_peft_model(build("llama"), LoraConfig(r=40))


@pytest.mark.parametrize("r", [0, -1, 2.5, "8", True])
def test_a_rank_is_a_positive_whole_number(r: Any) -> None:
    for make in (
        lambda: LoraConfig(r=r),
        lambda: LoraConfig(rank_pattern={"q_proj": r}),
        lambda: AdaLoraConfig(init_r=r, total_step=5),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
