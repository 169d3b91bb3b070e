"""Files whose layers have other names here, in more than their front, or are fused otherwise: read
where just one reading fits, and else refused with both sides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graftwork as g
from graftwork import FileError, LoraConfig, PeftModel, PeftWarning, TargetError, get_peft_model
from graftwork.files import align, fuse
from graftwork.testing.bench import shake
from tiny import build, run

IDS = torch.arange(3, 11).view(2, 4)
WEIGHTS = "adapter_model.safetensors"
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def llava(layers: int = 3, width: int = 32) -> Any:
    """With the text model of ``llama``, and a vision tower whose layers have the same names."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    text = LlamaConfig(**SIZES)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    return with_text(LlavaForConditionalGeneration(config), llama())


def with_text(model: Any, text: Any) -> Any:
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    return model.eval()


def gemma_text() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8)).eval()


def gemma() -> Any:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    torch.manual_seed(1)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**SIZES, head_dim=8), vision_config=vision,
        mm_tokens_per_image=4, image_token_index=60, boi_token_index=61, eoi_token_index=62,
    )  # fmt: skip
    return with_text(Gemma3ForConditionalGeneration(config), gemma_text())


def qwen_text() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


def qwen() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(1)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    config = Qwen2VLConfig(
        text_config={**SIZES, "rope_parameters": rope}, vision_config=vision,
        image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    return with_text(Qwen2VLForConditionalGeneration(config), qwen_text())


def phi() -> Any:
    """Phi-3, whose layers are fused, with the weights of ``llama``."""
    from transformers import Phi3Config, Phi3ForCausalLM

    model = Phi3ForCausalLM(Phi3Config(**SIZES)).eval()
    own, theirs = model.state_dict(), llama().state_dict()
    for name in own:
        leaf = name.split(".")[-2]
        parts = [name.replace(leaf, part) for part in fuse.FUSED.get(leaf, (leaf,))]
        own[name] = torch.cat([theirs[part] for part in parts])
    model.load_state_dict(own)
    return model


PAIRS = {"llava": (llama, llava), "gemma3": (gemma_text, gemma), "qwen2_vl": (qwen_text, qwen)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def saved(model: Any, config: Any, folder: Path) -> Tensor:
    """The logits of the model with a shaken adapter, which is in the folder."""
    adapted = get_peft_model(model, config).eval()
    shake(adapted, seed=2)
    adapted.save_pretrained(folder)
    return logits(adapted)


def read(model: Any, folder: Path, text: str = "layers have other names", **options: Any) -> Any:
    """The model with that adapter, which was read otherwise."""
    with pytest.warns(PeftWarning) as told:
        loaded = PeftModel.from_pretrained(model, folder, **options)
    assert any(text in str(one.message) for one in told), [str(one.message) for one in told]
    return loaded


def refused(model: Any, folder: Path, *words: str) -> str:
    """Why a folder is refused; the model is as it was."""
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises((FileError, TargetError)) as error:
        PeftModel.from_pretrained(model, folder)
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags
    for word in words:
        assert word in str(error.value), str(error.value)
    return str(error.value)


def rewrite(folder: Path, change: Callable[[str], str], drop: str = "") -> None:
    tensors = load_file(folder / WEIGHTS)
    kept = {change(n): t for n, t in tensors.items() if not (drop and drop in n)}
    save_file(kept, folder / WEIGHTS, {"format": "pt"})


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora, head": lambda: LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]
    ),
    "lora, ranks": lambda: LoraConfig(
        r=2, target_modules="all-linear", alpha_pattern={"up_proj": 7},
        rank_pattern={"model.layers.1.self_attn.q_proj": 3},
    ),
    "dora": lambda: LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "tokens": lambda: LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]}
    ),
    "vera": lambda: g.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "ia3": lambda: g.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": lambda: g.LoHaConfig(r=2, target_modules=["v_proj"], layers_to_transform=[1]),
    "oft": lambda: g.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
}  # fmt: skip


@pytest.mark.fault("A1")
@pytest.mark.fault("A2")
@pytest.mark.parametrize(
    ("pair", "config"),
    [("llava", config) for config in CONFIGS]
    + [(pair, config) for pair in ("gemma3", "qwen2_vl") for config in ("lora, head", "dora")],
)
def test_a_text_models_adapter_in_a_model_that_also_sees(
    pair: str, config: str, tmp_path: Path
) -> None:
    text, full = PAIRS[pair]
    want = saved(text(), CONFIGS[config](), tmp_path / "text")
    loaded = read(full(), tmp_path / "text")
    assert torch.equal(logits(loaded), want)
    sites = {row.site for row in loaded.adapters()}
    assert not any("vision" in site or "visual" in site for site in sites)
    loaded.save_pretrained(tmp_path / "full")
    again = PeftModel.from_pretrained(full(), tmp_path / "full")  # as it is
    assert torch.equal(logits(again), want)
    back = read(text(), tmp_path / "full")
    assert torch.equal(logits(back), want)


@pytest.mark.fault("A2")
def test_what_is_loaded_beside_others_is_told_in_the_report(tmp_path: Path) -> None:
    want = saved(llama(), CONFIGS["lora, head"](), tmp_path)
    model = get_peft_model(llava(), LoraConfig(r=2, target_modules=["fc1"]))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.warns(PeftWarning):
        report = model.load_adapter(tmp_path, "text")
    assert report.ok and len(report.renamed) == 8
    assert all("language_model" in new for new in report.renamed.values())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    with model.using("text"):
        assert torch.equal(logits(model.eval()), want)
    alone = read(llava(), tmp_path, is_trainable=True)
    plain = alone.unload()
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.fault("A2")
def test_two_readings_are_refused_and_a_mapping_chooses(tmp_path: Path) -> None:
    want = saved(llama(), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    alike = llava(layers=2)  # of as many layers, and of the same size
    text = refused(alike, tmp_path, "fits this model in 2 ways", "vision_tower", "language_model")
    assert "Pass the key_mapping of the right one" in text
    every = re.findall(r"key_mapping=(\{.*?\}):", text)
    mapping = next(one for one in every if "language_model" in one)
    loaded = read(alike, tmp_path, key_mapping=eval(mapping))
    assert torch.equal(logits(loaded), want)


@pytest.mark.fault("A1")
def test_a_file_of_which_a_layer_is_missing_is_no_other_reading(tmp_path: Path) -> None:
    saved(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), tmp_path / "a")
    for drop in ("layers.1.", "v_proj", "layers.0.self_attn.q_proj.lora_A"):
        folder = tmp_path / drop
        folder.mkdir()
        for name in ("adapter_config.json", WEIGHTS):
            (folder / name).write_bytes((tmp_path / "a" / name).read_bytes())
        rewrite(folder, str, drop=drop)
        refused(llava(), folder, "missing in the file")
        refused(llama(), folder, "missing in the file")
        refused(phi(), folder, "it has no" if "lora_A" in drop else "which the config means")


@pytest.mark.fault("A2")
def test_what_cannot_be_read_is_shown_side_by_side(tmp_path: Path) -> None:
    saved(llama(), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    rewrite(tmp_path, lambda name: name.replace("self_attn.q_proj", "attention.query"))
    text = refused(llama(), tmp_path, "The names that differ, numbers as *:")
    rows = [line.split("|") for line in text.splitlines() if "|" in line]
    assert [cell.strip() for cell in rows[0]] == ["in the file", "in the model"]
    assert [cell.strip() for cell in rows[1]] == [
        "model.layers.*.attention.query.lora_A.weight  x2",
        "model.layers.*.self_attn.q_proj.lora_A.weight  x2",
    ]
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["query"]})
    )
    text = refused(llama(), tmp_path, "'query' matches no module", "attention.query.lora_A.weight")
    assert "not there under other names either" in text


@pytest.mark.fault("A1")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.", "base_model.model.module."),
        ("base_model.model.", "module.base_model.model."),
        ("base_model.model.", "_fsdp_wrapped_module.base_model.model."),
        ("base_model.model.", "transformer."),
        ("base_model.model.", "text_encoder."),
        (".self_attn.", "._fsdp_wrapped_module.self_attn."),
        (".self_attn.", "._checkpoint_wrapped_module._orig_mod.self_attn."),
    ],
)
def test_names_of_wrappers_that_are_not_here(old: str, new: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
    want = saved(llama(), config, tmp_path)
    rewrite(tmp_path, lambda name: name.replace(old, new))
    assert torch.equal(logits(read(llama(), tmp_path)), want)


SPLIT: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "as most are": {"target_modules": ["q_proj", "v_proj"]},
    "one of three": {"target_modules": ["k_proj"]},
    "one of two": {"target_modules": ["up_proj"], "use_rslora": True},
    "ranks": {
        "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj"],
        "rank_pattern": {"layers.0.mlp.up_proj": 3, "v_proj": 1},
        "alpha_pattern": {"gate_proj": 7},
    },
    "dora": {"target_modules": ["q_proj", "k_proj", "v_proj"], "use_dora": True},
    "bias, head": {
        "target_modules": ["gate_proj", "up_proj"], "lora_bias": True,
        "modules_to_save": ["lm_head"],
    },
    "a block": {"target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [1]},
}  # fmt: skip


@pytest.mark.fault("A2")
@pytest.mark.parametrize("name", SPLIT)
def test_layers_that_are_one_layer_here(name: str, tmp_path: Path) -> None:
    want = saved(llama(), LoraConfig(r=2, lora_alpha=3, **SPLIT[name]), tmp_path / "split")
    loaded = read(phi(), tmp_path / "split", "layers were made of those in the file, exactly")
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-6)
    assert (want - logits(llama())).abs().max() > 1e-3
    loaded.save_pretrained(tmp_path / "fused")
    again = PeftModel.from_pretrained(phi(), tmp_path / "fused")
    assert torch.equal(logits(again), logits(loaded))
    back = read(llama(), tmp_path / "fused", "layers were made of those in the file, exactly")
    torch.testing.assert_close(logits(back), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "is not in the file, so that"),
        (
            {"target_modules": ["gate_proj", "up_proj"], "init_lora_weights": "pissa"},
            "follows from the whole weight",
        ),
    ],
)
def test_what_cannot_be_fused_is_refused(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    saved(llama(), LoraConfig(r=2, **options), tmp_path)
    refused(phi(), tmp_path, why)
    saved(llama(), g.LoHaConfig(r=2, target_modules=["gate_proj", "up_proj"]), tmp_path / "loha")
    refused(phi(), tmp_path / "loha", "'gate_proj' matches no module")


def mixtral_file(folder: Path, names: list[str], experts: int = 4) -> dict[str, Tensor]:
    """A LoRA as it was trained on a Mixtral of transformers 4."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"w2": (24, 32), "gate": (32, 4), "q_proj": (32, 32)}
    tensors = {}
    for layer in range(2):
        for name in names:
            fronts = [f"block_sparse_moe.experts.{e}" for e in range(experts)]
            fronts = {"gate": ["block_sparse_moe"], "q_proj": ["self_attn"]}.get(name, fronts)
            for front in fronts:
                path = f"base_model.model.model.layers.{layer}.{front}.{name}"
                in_, out = sizes.get(name, (32, 24))
                shapes = {"A": (2, in_), "B": (out, 2)}
                for key, shape in shapes.items():
                    value = torch.randn(*shape, generator=generator) * 0.1
                    tensors[f"{path}.lora_{key}.weight"] = value
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": names}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return tensors


@torch.no_grad()
def by_hand(tensors: dict[str, Tensor]) -> nn.Module:
    """The model with the updates of such a file in its weights."""
    model: Any = build("mixtral")

    def update(layer: int, name: str) -> Any:
        path = f"base_model.model.model.layers.{layer}.{name}"
        if f"{path}.lora_B.weight" not in tensors:
            return torch.zeros(24, 32)
        return 3 * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.weight += update(i, "self_attn.q_proj")
        if "base_model.model.model.layers.0.block_sparse_moe.gate.lora_A.weight" in tensors:
            layer.mlp.gate.weight += update(i, "block_sparse_moe.gate")
        for e in range(4):
            front = f"block_sparse_moe.experts.{e}"
            both = [update(i, f"{front}.w1"), update(i, f"{front}.w3")]
            layer.mlp.experts.gate_up_proj[e] += torch.cat(both)
            if f"base_model.model.model.layers.0.{front}.w2.lora_A.weight" in tensors:
                layer.mlp.experts.down_proj[e] += update(i, f"{front}.w2")
    return model


@pytest.mark.fault("A2")
@pytest.mark.parametrize(
    "names", [["q_proj", "gate", "w1", "w2", "w3"], ["q_proj", "w1", "w2"], ["q_proj", "w3"]]
)
def test_experts_that_were_layers(names: list[str], tmp_path: Path) -> None:
    tensors = mixtral_file(tmp_path, names)
    loaded = read(build("mixtral"), tmp_path, "layers were made of those in the file, exactly")
    want = run(by_hand(tensors), "mixtral")
    torch.testing.assert_close(run(loaded, "mixtral"), want, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "new")
    again = PeftModel.from_pretrained(build("mixtral"), tmp_path / "new")
    assert torch.equal(run(again, "mixtral"), run(loaded, "mixtral"))
    mixtral_file(tmp_path, names, experts=3)
    refused(build("mixtral"), tmp_path, "the model has 4 experts at")


# -- the readings by themselves


def test_the_ways() -> None:
    def ways(names: list[str], paths: list[str]) -> list[dict[str, str]]:
        return list(align.ways(names, paths))

    here = [f"model.language_model.layers.{i}.q" for i in (0, 1)]
    names = [f"model.layers.{i}.q.lora_A.weight" for i in (0, 1)]
    (edits,) = ways(names, here)
    known = set(here)
    assert [align.owner(align.edited(n, edits, known), known) for n in names] == here
    assert ways([f"{p}.lora_A.weight" for p in here], here) == [{}]
    tower = [f"model.tower.layers.{i}.q" for i in (0, 1)]
    assert len(ways(names, here + tower)) == 2
    assert ways(["model.layers.0.q.A"], ["model.layers.1.q"]) == []  # another layer
    assert ways(["model.layers.0.k.A"], here) == []
    odd = ["a+b.(c).0.q.A"]
    assert ways(odd, ["x\\d.0.q"]) and ways(["a.q.A"], ["a.\\1.q"])[0]
    assert align.edited("a.q.A", ways(["a.q.A"], ["a.\\1.q"])[0], {"a.\\1.q"}) == "a.\\1.q.A"
    assert align.beside([], ["x"]) == align.beside(["x"], []) == ""
    many = align.beside([f"a.{c}" for c in "bcdefghijklmnop"], ["x.0", "x.1"])
    assert "... and 3 more" in many and "x.*  x2" in many


SIZE = st.integers(1, 5)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    outs=st.lists(SIZE, min_size=3, max_size=3),
    ranks=st.lists(SIZE, min_size=3, max_size=3),
    scales=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=3, max_size=3),
    there=st.sets(st.integers(0, 2), min_size=1),
)
def test_a_fused_update_is_that_of_its_parts(
    outs: list[int], ranks: list[int], scales: list[float], there: set[int]
) -> None:
    outs[2] = outs[1]  # as keys and values have it
    parts = fuse.FUSED["qkv_proj"]
    generator = torch.Generator().manual_seed(sum(outs) + 7 * sum(ranks))
    each = {
        part: fuse.Factors(
            torch.randn(ranks[i], 4, generator=generator),
            torch.randn(outs[i], ranks[i], generator=generator),
            scales[i],
        )
        for i, part in enumerate(parts)
        if i in there
    }
    one = fuse.made(fuse.Piece("qkv_proj", parts), each, [sum(outs)], 0)
    blocks = [
        each[p].scale * each[p].b @ each[p].a if p in each else torch.zeros(outs[i], 4)
        for i, p in enumerate(parts)
    ]
    torch.testing.assert_close(one.scale * one.b @ one.a, torch.cat(blocks))
    assert one.rank == sum(part.rank for part in each.values())
    for i, part in enumerate(parts):
        piece = fuse.Piece(part, ("qkv_proj",), i)
        back = fuse.made(piece, {"qkv_proj": one}, outs, 0)
        torch.testing.assert_close(back.scale * back.b @ back.a, blocks[i])
    with pytest.raises(FileError):
        fuse.made(fuse.Piece("v", ("qkv_proj",), 2), {"qkv_proj": one}, [*outs[:2], 99], 0)
