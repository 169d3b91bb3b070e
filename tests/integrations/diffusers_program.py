"""diffusers' adapter loading, on a tiny pipeline and a tiny Flux, for test_libraries.py."""

from __future__ import annotations

from typing import Any

from sides import FOLDER, FOUND, check, drawn, fill, numbers, page, raised, report, tensors_of

import diffusers  # isort: skip
import peft
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from train import toys

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "proj_in"]
EMBEDS = drawn((1, 7, 16), "embeds")
LATENTS = drawn((1, 4, 8, 8), "latents")
IDS = torch.tensor([[1, 2, 3, 4]])


def seeded(build: Any) -> Any:
    torch.manual_seed(0)
    return build().eval()


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4,
        in_channels=4, out_channels=4, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def text_encoder() -> Any:
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=32,
                       num_hidden_layers=2, max_position_embeddings=16, bos_token_id=0,
                       eos_token_id=1, pad_token_id=1)
    )  # fmt: skip


def vae() -> Any:
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def pipeline() -> Any:
    pipe = StableDiffusionPipeline(
        unet=seeded(unet), text_encoder=seeded(text_encoder), vae=seeded(vae),
        tokenizer=toys.tokenizer("bert"), scheduler=diffusers.DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux() -> Any:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip


@torch.no_grad()
def noise(model: Any, scale: float | None = None) -> Any:
    options: Any = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
    return model(LATENTS, 3, EMBEDS, **options).sample


@torch.no_grad()
def words(model: Any) -> Any:
    return model(IDS).last_hidden_state


@torch.no_grad()
def velocity(model: Any, scale: float | None = None) -> Any:
    return model(
        hidden_states=drawn((1, 4, 4), "h"), encoder_hidden_states=drawn((1, 3, 16), "e"),
        pooled_projections=drawn((1, 16), "p"), timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3),
        **({} if scale is None else {"joint_attention_kwargs": {"scale": scale}}),
    ).sample  # fmt: skip


@torch.no_grad()
def picture(pipe: Any, **options: Any) -> Any:
    return pipe(
        prompt_embeds=EMBEDS, latents=LATENTS, num_inference_steps=2, guidance_scale=1.0,
        output_type="latent", **options,
    ).images  # fmt: skip


def load(folder: Any) -> dict[str, Any]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


def trained(name: str, rank: int, alpha: int, **options: Any) -> Any:
    """Write an adapter of the pipeline's unet and text encoder, as training scripts do."""
    model, encoder = seeded(unet), seeded(text_encoder)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, **options)
    model.add_adapter(config, "default")
    encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    fill(model, salt=name), fill(encoder, salt=name)
    StableDiffusionPipeline.save_lora_weights(
        FOLDER / name,
        unet_lora_layers=peft.get_peft_model_state_dict(model),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(encoder),
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=encoder.peft_config["default"].to_dict(),
    )
    return model


@check
def saved_by_a_training_script() -> Any:
    model = trained("one", 4, 8, rank_pattern={"mid_block.attentions.0.proj_in": 2},
                    alpha_pattern={"to_q": 3})  # fmt: skip
    trained("two", 3, 3)
    metadata = diffusers.loaders.lora_base._load_sft_state_dict_metadata(
        str(FOLDER / "one" / "pytorch_lora_weights.safetensors")
    )
    asked = ("unet.r", "unet.lora_alpha", "unet.rank_pattern", "unet.alpha_pattern",
             "unet.peft_type", "text_encoder.r")  # fmt: skip
    return {
        "tensors": tensors_of(FOLDER / "one" / "pytorch_lora_weights.safetensors"),
        "noise": numbers(noise(model)),
        "metadata": {key: metadata[key] for key in asked},
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


@check
def loaded_and_weighted() -> Any:
    pipe, found = pipeline(), {}
    found["base"] = numbers(picture(pipe))
    pipe.load_lora_weights(FOLDER / "one", adapter_name="one")
    found["one"] = numbers(picture(pipe)), numbers(words(pipe.text_encoder))
    found["active"] = pipe.get_active_adapters()
    pipe.load_lora_weights(FOLDER / "two", adapter_name="two")
    found["list"] = pipe.get_list_adapters()
    pipe.set_adapters(["one", "two"], [0.7, 0.5])
    found["both"] = numbers(picture(pipe)), numbers(words(pipe.text_encoder))
    found["both_active"] = pipe.get_active_adapters(), pipe.unet.active_adapters()
    found["scaled"] = numbers(picture(pipe, cross_attention_kwargs={"scale": 0.4}))
    found["again"] = numbers(picture(pipe))
    pipe.set_adapters("two", {"unet": {"down": 0.3, "mid": 0.0, "up": 2.0}})
    found["blocks"] = numbers(picture(pipe))
    pipe.set_adapters(["two"], [1.0])
    found["two"] = numbers(picture(pipe))
    pipe.disable_lora()
    found["off"] = numbers(picture(pipe)), numbers(words(pipe.text_encoder))
    pipe.enable_lora()
    found["on"] = numbers(picture(pipe))
    pipe.set_lora_device(["one"], "cpu")
    pipe.delete_adapters("two")
    found["fallback"] = numbers(picture(pipe)), pipe.get_active_adapters()
    found["deleted"] = pipe.get_list_adapters()
    pipe.set_adapters("one")
    found["one_again"] = numbers(picture(pipe))
    found["unknown"] = raised(lambda: pipe.set_adapters("three"))
    unet_alone = {k: v for k, v in load(FOLDER / "two").items() if k.startswith("unet.")}
    pipe.load_lora_weights(unet_alone, adapter_name="unet alone")
    pipe.set_adapters(["one", "unet alone"], [0.5, 2.0])
    found["not in both"] = numbers(picture(pipe)), numbers(words(pipe.text_encoder))
    pipe.set_adapters("unet alone")
    found["not in text"] = numbers(picture(pipe)), numbers(words(pipe.text_encoder))
    pipe.unload_lora_weights()
    found["unloaded"] = numbers(picture(pipe)), numbers(words(pipe.text_encoder))
    found["layers"] = len(layers(pipe.unet)), len(layers(pipe.text_encoder))
    pipe.load_lora_weights(FOLDER / "two", adapter_name="one")
    found["loaded_again"] = numbers(picture(pipe)), pipe.get_list_adapters()
    return found


@check
def fused() -> Any:
    pipe, found = pipeline(), {}
    pipe.load_lora_weights(FOLDER / "one", adapter_name="one")
    pipe.load_lora_weights(FOLDER / "two", adapter_name="two")
    pipe.set_adapters(["one", "two"], [1.0, 0.5])
    both = ["unet", "text_encoder"]
    pipe.fuse_lora(components=both, adapter_names=["one"], safe_fusing=True)
    found["one"] = sorted(pipe.fused_loras), pipe.num_fused_loras
    pipe.set_adapters("one")
    found["picture"] = numbers(picture(pipe)), numbers(words(pipe.text_encoder))
    pipe.unfuse_lora(components=both)
    pipe.set_adapters(["one", "two"])
    found["unfused"] = numbers(picture(pipe)), pipe.num_fused_loras
    pipe.fuse_lora(components=both, lora_scale=0.5)
    found["half"] = numbers(picture(pipe)), sorted(pipe.fused_loras)
    pipe.unload_lora_weights()
    found["kept"] = numbers(picture(pipe)), numbers(words(pipe.text_encoder))
    found["layers"] = len(layers(pipe.unet)), len(layers(pipe.text_encoder))
    return found


@check
def model_level() -> Any:
    model, found = seeded(flux), {}
    found["base"] = numbers(velocity(model))
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_k", "add_q_proj", "proj_mlp"]
    )
    model.add_adapter(config, "a")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_v"], use_dora=True), "b")
    found["active"] = model.active_adapters()
    found["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fill(model, "a"), fill(model, "b")
    found["b"] = numbers(velocity(model))
    model.set_adapter(["a", "b"])
    found["both"] = numbers(velocity(model)), numbers(velocity(model, 0.5))
    model.save_lora_adapter(FOLDER / "flux", adapter_name="a")
    found["files"] = tensors_of(FOLDER / "flux" / "pytorch_lora_weights.safetensors")
    model.set_adapters(["a"], [0.6])
    found["weighted"] = numbers(velocity(model))
    model.fuse_lora(lora_scale=0.5, safe_fusing=True)
    found["fused"] = numbers(velocity(model)), model.active_adapters()
    model.unfuse_lora()
    found["unfused"] = numbers(velocity(model))
    model.disable_adapters()
    found["off"] = numbers(velocity(model))
    model.enable_adapters()
    model.delete_adapters("b")
    found["configs"] = sorted(model.peft_config), numbers(velocity(model))
    model.delete_adapters("a")
    found["deleted"] = numbers(velocity(model)), hasattr(model, "peft_config")
    model.unload_lora()
    found["unloaded"] = numbers(velocity(model)), hasattr(model, "peft_config"), len(layers(model))
    model.load_lora_adapter(FOLDER / "flux", prefix=None, use_safetensors=True)
    found["loaded"] = numbers(velocity(model)), sorted(model.peft_config)
    found["twice"] = raised(
        lambda: model.load_lora_adapter(
            FOLDER / "flux", prefix=None, use_safetensors=True, adapter_name="default_0"
        )
    )
    model.load_lora_adapter(FOLDER / "flux", prefix=None, use_safetensors=True)
    found["third"] = sorted(model.peft_config), model.active_adapters()
    wrong = {"nowhere.lora_A.weight": torch.ones(2, 4), "nowhere.lora_B.weight": torch.ones(4, 2)}
    found["nowhere"] = "" != raised(
        lambda: model.load_lora_adapter(wrong, prefix=None, adapter_name="wrong")
    )
    found["after"] = numbers(velocity(model)), sorted(model.peft_config)
    return found


@check
def hotswapped() -> Any:
    found: dict[str, Any] = {}
    fresh: dict[str, Any] = {}
    for name, rank, alpha, pattern in (
        ("small", 2, 4, {}), ("large", 6, 3, {}), ("uneven", 6, 3, {"proj_mlp": 4}),
    ):  # fmt: skip
        model = seeded(flux)
        targets = ["to_q", "proj_mlp"]
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, rank_pattern=pattern)
        )
        fill(model, salt=name).save_lora_adapter(FOLDER / name)
        fresh[name] = velocity(model)
        found[name] = numbers(fresh[name])
    model = seeded(flux)
    model.enable_lora_hotswap(target_rank=8)
    options: Any = {"prefix": None, "use_safetensors": True, "adapter_name": "swap"}
    model.load_lora_adapter(FOLDER / "small", **options)
    found["first"] = numbers(velocity(model))
    run = torch.compile(model, backend="eager", fullgraph=False)
    velocity(run)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name in ("large", "small"):
        model.load_lora_adapter(FOLDER / name, hotswap=True, **options)
        found[f"swapped {name}"] = numbers(velocity(run)), numbers(velocity(model))
    model.load_lora_adapter(FOLDER / "uneven", hotswap=True, **options)  # in peft with other scales
    FOUND["uneven"] = float((velocity(run) - fresh["uneven"]).abs().max())
    found["compilations"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    late = {**options, "adapter_name": "unknown"}
    found["unknown"] = raised(
        lambda: model.load_lora_adapter(FOLDER / "small", hotswap=True, **late)
    )
    found["late"] = raised(lambda: model.enable_lora_hotswap(target_rank=8))
    return found


@check
def other_files() -> Any:
    """Files of other trainers: kohya's names with alphas, LoKr."""
    found, pipe = {}, pipeline()
    tensors = {}
    for path, module in seeded(unet).named_modules():
        if path.endswith(("attn1.to_q", "attn2.to_k")):
            name = "lora_unet_" + path.replace(".", "_")
            out, inside = module.weight.shape
            tensors |= {
                f"{name}.lora_down.weight": drawn((3, inside), f"{name}.down", 0.1),
                f"{name}.lora_up.weight": drawn((out, 3), f"{name}.up", 0.1),
                f"{name}.alpha": torch.tensor(2.0 if "to_q" in path else 1.0),
            }
    pipe.load_lora_weights(dict(tensors), adapter_name="kohya")
    found["kohya"] = numbers(picture(pipe))
    model = seeded(flux)
    path = "transformer_blocks.0.attn.to_q"
    lokr = {
        f"{path}.lokr_w1": drawn((4, 4), "w1", 0.3),
        f"{path}.lokr_w2": drawn((8, 8), "w2", 0.3),
    }
    model.load_lora_adapter(lokr, prefix=None, adapter_name="kron")
    found["lokr"] = numbers(velocity(model)), type(model.peft_config["kron"]).__name__
    return found


@check
def trained_with_checkpointing() -> Any:
    """A few steps as diffusers' own training scripts do them, and their resuming."""
    from diffusers.training_utils import cast_training_params, compute_snr  # noqa: F401

    model = seeded(unet).requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    fill(model)
    model.enable_gradient_checkpointing()
    model.train()
    cast_training_params(model, dtype=torch.float32)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=1e-2), []
    for step in range(3):
        loss = (model(LATENTS, step, EMBEDS).sample - LATENTS).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.save_lora_adapter(FOLDER / "steps")
    resumed = seeded(unet)
    resumed.load_lora_adapter(FOLDER / "steps", prefix=None, use_safetensors=True)
    return losses, numbers(noise(model.eval())), numbers(noise(resumed)), len(weights)


@check
def folders_of_peft() -> Any:
    """A PeftModel around a unet, its folder, and the merged pipeline's own saving."""
    model = peft.get_peft_model(seeded(unet), LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    fill(model)
    want = numbers(noise(model))
    model.save_pretrained(FOLDER / "wrapped")
    again = peft.PeftModel.from_pretrained(seeded(unet), FOLDER / "wrapped")
    merged = again.merge_and_unload()
    merged.save_pretrained(FOLDER / "merged")
    plain = diffusers.UNet2DConditionModel.from_pretrained(FOLDER / "merged")
    return want, numbers(noise(merged)), numbers(noise(plain))


pipeline().save_pretrained(FOLDER / "pipe")
page("diffusers", {"stable-diffusion-v1-5/stable-diffusion-v1-5": str(FOLDER / "pipe"),
                   "pixel-art": str(FOLDER / "one"), "toys": str(FOLDER / "two")})  # fmt: skip
report()
