"""Files cross both ways with the real peft: the same names, the same shapes, the same outputs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import graftwork
from tiny import build, run

peft = pytest.importorskip("peft", reason="the real peft is the oracle of these tests")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn about themselves

LINEAR = {
    "plain": ["lin0", "lin1"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "dense"],
    "t5": ["q", "wo"],
    "vit": ["q_proj", "fc2"],
    "mixtral": ["q_proj", "v_proj"],
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ADALORA = {"init_r": 3, "target_r": 2, "total_step": 10, "orth_reg_weight": 0.1}


def _cases() -> list[tuple[str, str, str, dict[str, Any]]]:
    cases: list[tuple[str, str, str, dict[str, Any]]] = []

    def add(model: str, name: str, kind: str = "Lora", **options: Any) -> None:
        if kind == "Lora":
            options = {"r": 4, "lora_alpha": 6, **options}
        cases.append((model, f"{model}-{name}", f"{kind}Config", options))

    for model, names in LINEAR.items():
        where = {"target_modules": names}
        add(model, "lora", **where)
        add(model, "dora", use_dora=True, **where)
        add(model, "rslora", use_rslora=True, **where)
        add(model, "lora_bias", lora_bias=True, **where)
        add(model, "dropout", lora_dropout=0.1, **where)
        add(model, "random", init_lora_weights=False, **where)
        add(model, "gaussian", init_lora_weights="gaussian", **where)
        add(model, "orthogonal", init_lora_weights="orthogonal", **where)
        add(model, "pissa", init_lora_weights="pissa", **where)
        if model != "gpt2":  # peft's OLoRA leaves a wrong base weight in GPT-2's Conv1D
            add(model, "olora", init_lora_weights="olora", **where)
        add(model, "bias_all", bias="all", **where)
        add(model, "bias_lora_only", bias="lora_only", **where)
        add(model, "patterns", rank_pattern={names[0]: 2}, alpha_pattern={names[1]: 3}, **where)
        add(model, "all_linear", target_modules="all-linear")
        add(model, "adalora", "AdaLora", **ADALORA, **where)
        add(model, "ia3", "IA3", feedforward_modules=[names[-1]], **where)
    for model in ("llama", "gpt2", "bert"):  # (peft itself fails on Mixtral's default)
        add(model, "default_targets")
        add(model, "ia3_default", "IA3")
        add(model, "adalora_default", "AdaLora", **ADALORA)
    for model, heads in {
        "bert": ["classifier"],
        "vit": ["classifier"],
        "llama": ["lm_head"],
    }.items():
        add(model, "saved", target_modules=LINEAR[model], modules_to_save=heads)
        add(
            model,
            "adalora_saved",
            "AdaLora",
            **ADALORA,
            target_modules=LINEAR[model],
            modules_to_save=heads,
        )
        add(
            model,
            "ia3_saved",
            "IA3",
            target_modules=LINEAR[model],
            feedforward_modules=[],
            modules_to_save=heads,
        )
    add("bert", "task", task_type="SEQ_CLS")
    add("llama", "task", task_type="CAUSAL_LM")
    add("t5", "task", task_type="SEQ_2_SEQ_LM")
    add(
        "bert", "saved_norms", target_modules=["query"], modules_to_save=["LayerNorm", "classifier"]
    )
    add("llama", "saved_embedding", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    add("llama", "blocks", target_modules=["q_proj"], layers_to_transform=[1])
    add("llama", "excluded", target_modules="all-linear", exclude_modules=["o_proj"])
    add("llama", "regex", target_modules=r".*layers\.0\..*(q|k)_proj")
    for model in ("llama", "llama_tied", "gpt2"):
        table = "wte" if model == "gpt2" else "embed_tokens"
        add(model, "tokens", "TrainableTokens", token_indices=[5, 9, 60], target_modules=[table])
        if model != "gpt2":
            add(model, "tokens_default", "TrainableTokens", token_indices=[5, 9, 60])
        add(
            model,
            "lora_tokens",
            target_modules=LINEAR.get(model, ["q_proj"]),
            trainable_token_indices=[5, 9],
        )
        add(model, "embedding", target_modules=[table])
        add(model, "embedding_dora", target_modules=[table], use_dora=True)
    add(
        "llama",
        "tokens_both",
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [5], "lm_head": [7]},
    )
    add("llama", "head", target_modules=["lm_head", "q_proj"])
    add("llama_tied", "head_and_embedding", target_modules=["lm_head", "embed_tokens"])
    for model in ("llama", "llama_tied"):
        add(
            model,
            "tokens_beside_a_head",
            target_modules=["q_proj", "lm_head"],
            trainable_token_indices=[5, 9],
        )
    for i, ends in enumerate((["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])):
        add("llama_tied", f"shared_{i}", target_modules=ends, ensure_weight_tying=True)
    add(
        "llama_tied",
        "shared_saved",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    add("mixtral", "old_names", target_modules=["q_proj", "w1", "w2", "w3"])
    add("t5", "tokens", "TrainableTokens", token_indices=[5, 9])
    add("t5", "embedding", target_modules=["encoder.embed_tokens", "q"])
    for name in ("conv1", "conv2", "conv3", "emb"):
        add("plain", f"lora_{name}", target_modules=[name])
        add("plain", f"dora_{name}", target_modules=[name], use_dora=True)
        if name != "emb":
            add("plain", f"bias_{name}", target_modules=[name], lora_bias=True)
            add(
                "plain",
                f"rank_{name}",
                target_modules=[name],
                rank_pattern={name: 2},
                alpha_pattern={name: 7},
            )
    for name in ("conv2", "conv3"):
        add("plain", f"ia3_{name}", "IA3", target_modules=[name], feedforward_modules=[])
        add("plain", f"ia3_ff_{name}", "IA3", target_modules=[name], feedforward_modules=[name])
    add("plain", "adalora_conv2", "AdaLora", **ADALORA, target_modules=["conv2"])
    add("plain", "pissa_emb", target_modules=["emb"], init_lora_weights="pissa")
    add("plain", "saved", target_modules=["lin0"], modules_to_save=["norm", "head", "conv1"])
    add("vit", "patches", target_modules=["projection", "q_proj"])
    add("attention", "lora", target_modules=["mha"])
    add("attention", "bias", target_modules=["mha", "lin"], bias="all")
    add("mixtral", "experts", target_modules=["q_proj"], target_parameters=EXPERTS)
    add(
        "mixtral",
        "experts_ranks",
        target_modules=["q_proj"],
        target_parameters=EXPERTS,
        rank_pattern={"experts.gate_up_proj": 2, "q_proj": 3},
    )
    add("mixtral", "one_parameter", target_modules=[], target_parameters=EXPERTS[:1])
    add("mixtral", "router", target_modules=["q_proj"], target_parameters=["gate.weight", *EXPERTS])
    return cases  # fmt: skip


CASES = _cases()
every_case = pytest.mark.parametrize("model, case, kind, options", CASES, ids=[c[1] for c in CASES])


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move what is trained away from the start, by an amount that its size decides."""
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def layout(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def saved_by(library: Any, model: str, kind: str, options: dict[str, Any], folder: Path) -> Any:
    torch.manual_seed(0)
    config = getattr(library, kind)(**options)
    adapted = library.get_peft_model(build(model), config).eval()
    shake(adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return adapted


@every_case
def test_what_peft_writes_is_read(
    model: str, case: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = saved_by(peft, model, kind, options, tmp_path)
    ours = graftwork.PeftModel.from_pretrained(build(model), tmp_path)
    base = run(build(model), model)
    want, got = run(theirs, model), run(ours, model)
    assert not torch.allclose(want, base, atol=1e-4), "the adapter has no effect"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@every_case
def test_what_is_written_peft_reads(
    model: str, case: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    ours = saved_by(graftwork, model, kind, options, tmp_path / "ours")
    saved_by(peft, model, kind, options, tmp_path / "theirs")
    assert layout(tmp_path / "ours") == layout(tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(build(model), tmp_path / "ours").eval()
    want, got = run(ours, model), run(theirs, model)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
