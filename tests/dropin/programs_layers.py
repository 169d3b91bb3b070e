"""Programs for PEFT that use what its layers show."""

from __future__ import annotations

import copy
from typing import Any

import torch
from harness import fill, program
from torch import nn

from specs import PARITY
from tiny import build

LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["lin0", "lin1"]}
IDS = torch.arange(16).reshape(2, 8) % 10
SKIPPED = ("Prompt", "Prefix", "CPT", "Cartridge", "Shadow", "XLora", "AdaptionPrompt")


def cases() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """One or two configs of each method, for a small model."""
    found: dict[str, tuple[str, str, dict[str, Any]]] = {}
    counts: dict[str, int] = {}
    for p in PARITY:
        if not p.kind.startswith(SKIPPED) and p.model == "plain" and counts.get(p.kind, 0) < 2:
            counts[p.kind] = counts.get(p.kind, 0) + 1
            found[p.id] = (p.model, p.kind, p.options)
    lora = {"r": 2, "lora_alpha": 3}
    every = ["emb", "conv1", "conv2", "conv3", "lin0"]
    found |= {
        "lora": ("plain", "LoraConfig", {**lora, "target_modules": every}),
        "dora": ("plain", "LoraConfig", {**lora, "target_modules": every, "use_dora": True}),
        "all": ("plain", "LoraConfig", {**lora, "target_modules": ["lin0"], "bias": "all"}),
        "only": ("plain", "LoraConfig", {**lora, "target_modules": ["lin0"], "bias": "lora_only"}),
        "biased": ("plain", "LoraConfig", {**lora, "target_modules": ["lin0"], "lora_bias": True}),
        "attention": ("attention", "LoraConfig", {**lora, "target_modules": ["mha", "lin"]}),
        "experts": ("mixtral", "LoraConfig", {
            **lora, "target_modules": ["q_proj"],
            "target_parameters": ["gate_up_proj", "down_proj"],
        }),
        "rows": ("llama", "TrainableTokensConfig", {"token_indices": [5, 6]}),
        "lora_rows": ("llama", "LoraConfig", {**lora, "trainable_token_indices": [5, 6]}),
        "tied_rows": ("llama_tied", "LoraConfig", {**lora, "trainable_token_indices": [5]}),
        "tied_rows_head": ("llama_tied", "LoraConfig", {
            **lora, "target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [5],
        }),
        "saved": ("bert", "LoraConfig", {**lora, "task_type": "SEQ_CLS"}),
        "adalora": ("llama", "AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 9}),
        "ia3": ("llama", "IA3Config", {}),
        "norms": ("llama", "LNTuningConfig", {}),
        "poly": ("llama", "PolyConfig", {
            "task_type": "CAUSAL_LM", "r": 2, "n_tasks": 2, "target_modules": ["q_proj"],
        }),
        "lily": ("llama", "LilyConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    }  # fmt: skip
    return found


def made(peft: Any, case: tuple[str, str, dict[str, Any]]) -> Any:
    """The model of a case."""
    model, kind, options = case
    return peft.get_peft_model(build(model), getattr(peft, kind)(**options))


@program()
def names_of_parameters(peft: Any) -> Any:
    out = {}
    for name, case in cases().items():
        model = made(peft, case)
        out[name] = {n: [list(p.shape), p.requires_grad] for n, p in model.named_parameters()}
    return out


@program()
def names_in_state_dicts(peft: Any) -> Any:
    out = {}
    for name, case in cases().items():
        model = made(peft, case)
        state = model.state_dict()
        out[name] = {n: list(t.shape) for n, t in state.items()}
        model.load_state_dict(state)
    return out


@program()
def names_of_modules_in_lora(peft: Any) -> Any:
    model = made(peft, cases()["lora"])
    return sorted(n for n, _ in model.named_modules() if ".adapters" not in n)


@program()
def state_dicts_carry_values(peft: Any) -> Any:
    out = {}
    for name in ("lora", "dora", "all", "attention", "experts", "saved", "lora_rows", "lily"):
        one, two = made(peft, cases()[name]), made(peft, cases()[name])
        with torch.no_grad():
            for i, p in enumerate(one.parameters()):
                if p.requires_grad:
                    p.fill_(0.01 * (i + 1))
        two.load_state_dict(one.state_dict())
        pairs = zip(one.named_parameters(), two.named_parameters(), strict=True)
        out[name] = all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)
    return out


@program()
def layers_and_their_values(peft: Any) -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    out: dict[str, Any] = {}
    for name, case in cases().items():
        layers = out[name] = {}
        if name == "tied_rows_head":
            continue  # PEFT's base layer there is its wrapper of the rows; here it is the layer
        for path, m in made(peft, case).named_modules():
            if not isinstance(m, BaseTunerLayer) or path.endswith((".base_layer", "_adapter")):
                continue
            if path.endswith(("out_proj", "experts")):
                continue  # PEFT's layers inside of others are no layers here
            shown = {
                n: sorted(getattr(m, n).keys())
                for n in m.adapter_layer_names
                if hasattr(getattr(m, n), "keys")
            }
            values = {
                n: dict(getattr(m, n))
                for n in ("r", "lora_alpha", "alpha", "scaling", "use_dora", "use_rslora", "depth",
                          "lora_bias", "block_size", "variant", "group_size", "hra_r", "miss_r",
                          "rank_dropout", "module_dropout", "n_tasks", "topk", "hybrid_r",
                          "oft_block_size", "boft_block_size", "boft_block_num", "u",
                          "fourierft_n_frequency", "fourierft_scaling", "waveft_scaling",
                          "psoft_alpha", "deft_r", "deft_scaling", "effective_rank", "stride_A")
                if n in (*m.adapter_layer_names, *m.other_param_names)
            }  # fmt: skip
            layers[path] = [
                sorted(set(m.adapter_layer_names)), shown, values, m.in_features, m.out_features,
                m.active_adapters, m.merged, m.disable_adapters, m.merged_adapters == [],
                type(m.get_base_layer()).__name__, m.base_layer is m.get_base_layer(),
            ]  # fmt: skip
    return out


@program()
def classes_of_layers(peft: Any) -> Any:
    from peft.tuners import adalora, ia3, loha, lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper

    wanted = {
        "base": BaseTunerLayer, "lora": lora.LoraLayer, "linear": lora.Linear,
        "embedding": lora.Embedding, "conv2d": lora.Conv2d, "conv3d": lora.layer.Conv3d,
        "attention": lora.layer.MultiheadAttention, "parameters": lora.ParamWrapper,
        "svd": adalora.SVDLinear, "adalora": adalora.AdaLoraLayer, "ia3": ia3.IA3Layer,
        "ia3_linear": ia3.Linear, "loha": loha.LoHaLayer, "saved": ModulesToSaveWrapper,
        "rows": TrainableTokensWrapper, "extra": AuxiliaryTrainingWrapper,
    }  # fmt: skip
    out: dict[str, Any] = {}
    for name in ("lora", "attention", "experts", "saved", "adalora", "ia3", "norms", "lora_rows"):
        model = made(peft, cases()[name])
        for path, m in model.named_modules():
            kinds = [k for k, kind in wanted.items() if isinstance(m, kind)]
            # PEFT's layers inside of others are views here
            if kinds and ".base_layer" not in path and not path.endswith("token_adapter"):
                out[f"{name} {path}"] = kinds
    chain = issubclass(lora.Linear, lora.LoraLayer), issubclass(lora.LoraLayer, BaseTunerLayer)
    return [
        out,
        chain,
        isinstance(3, lora.LoraLayer),
        issubclass(adalora.SVDLinear, lora.LoraLayer),
    ]


def first(peft: Any, **options: Any) -> tuple[Any, Any]:
    """A LoRA with numbers in it, and its first layer."""
    model = peft.get_peft_model(build("plain"), peft.LoraConfig(**{**LORA, **options})).eval()
    fill(model)
    return model, model.base_model.model.lin0


@program()
def factors_are_the_parameters(peft: Any) -> Any:
    model, layer = first(peft)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    named = dict(model.named_parameters())
    return [
        a.weight is named["base_model.model.lin0.lora_A.default.weight"],
        isinstance(a, nn.Linear), isinstance(layer.lora_A, nn.ModuleDict),
        isinstance(layer.lora_embedding_A, nn.ParameterDict), len(layer.lora_embedding_A),
        a.weight, b.weight, a.bias, a.in_features, a.out_features, list(layer.lora_A.keys()),
        "default" in layer.lora_A, "other" in layer.lora_A, len(layer.lora_B),
        a(torch.ones(1, 16)), layer.lora_dropout["default"](torch.ones(2)), model(IDS),
    ]  # fmt: skip


@program()
def factors_are_written(peft: Any) -> Any:
    model, layer = first(peft)
    out = [model(IDS)]
    layer.lora_A["default"].weight.data = torch.full((4, 16), 0.03)
    out.append(model(IDS))
    layer.lora_B["default"].weight = nn.Parameter(torch.full((32, 4), 0.02))
    out.append(model(IDS))
    nn.init.ones_(layer.lora_A["default"].weight)
    out.append(model(IDS))
    layer.lora_A["default"].weight.data.mul_(0.5)
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(torch.full((32, 4), 0.01))
    return [*out, model(IDS), layer.lora_B["default"].weight]


@program()
def factors_of_other_methods_are_written(peft: Any) -> Any:
    out = []
    model = peft.get_peft_model(build("plain"), peft.IA3Config(
        target_modules=["lin0"], feedforward_modules=[])).eval()  # fmt: skip
    layer = model.base_model.model.lin0
    layer.ia3_l["default"].data.fill_(1.5)
    out.append(model(IDS))
    layer.ia3_l["default"] = nn.Parameter(torch.full((32, 1), 0.5))
    out += [model(IDS), layer.ia3_l["default"].shape, list(layer.ia3_l.keys())]
    model = peft.get_peft_model(
        build("plain"), peft.LoHaConfig(r=2, target_modules=["lin0"])
    ).eval()
    for n in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
        getattr(model.base_model.model.lin0, n)["default"].data.fill_(0.3)
    return [*out, model(IDS)]


@program()
def factors_are_frozen_by_hand(peft: Any) -> Any:
    model, layer = first(peft)
    layer.lora_A["default"].requires_grad_(False)
    layer.lora_B["default"].weight.requires_grad = False
    left = [n for n, p in model.named_parameters() if p.requires_grad]
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.requires_grad = True
    return [left, [n for n, p in model.named_parameters() if p.requires_grad]]


@program()
def scales_are_written(peft: Any) -> Any:
    model, layer = first(peft)
    out = [dict(layer.scaling), model(IDS)]
    layer.scaling["default"] = 3.0
    out += [model(IDS), dict(layer.scaling)]
    layer.scaling["default"] *= 0.5
    out += [dict(layer.scaling)]
    layer.set_scale("default", 2)
    out += [dict(layer.scaling)]
    layer.scale_layer(3)
    out += [dict(layer.scaling)]
    layer.unscale_layer(2)
    out += [dict(layer.scaling)]
    layer.unscale_layer()
    return [*out, dict(layer.scaling), dict(layer.r), dict(layer.lora_alpha), model(IDS)]


@program()
def scales_of_lycoris_are_written(peft: Any) -> Any:
    out = []
    for kind in (peft.LoHaConfig, peft.LoKrConfig):
        model = peft.get_peft_model(build("plain"), kind(r=2, alpha=3, target_modules=["lin0"]))
        layer = model.base_model.model.lin0
        layer.set_scale("default", 2)
        layer.scale_layer(3)
        out.append(dict(layer.scaling))
        layer.unscale_layer()
        out += [dict(layer.scaling), dict(layer.alpha), dict(layer.r)]
    return out


@program()
def deltas(peft: Any) -> Any:
    out: dict[str, Any] = {}
    for name, case in cases().items():
        model = made(peft, case).eval()
        if not name.startswith(("lora", "LoHa-plain", "LoKr-plain", "Hira", "biased", "only")):
            continue
        fill(model, ("lora_", "hada_", "lokr_"))
        for path in ("lin0", "emb", "conv1", "conv2", "lin1"):
            layer = getattr(model.base_model.model, path, None)
            if hasattr(layer, "get_delta_weight") and "Hira" not in name:
                out[f"{name} {path}"] = layer.get_delta_weight("default")
    return out


@program()
def a_layer_is_merged_by_itself(peft: Any) -> Any:
    model, layer = first(peft)
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    merged = layer.base_layer.weight.detach().clone()
    out = [layer.merged, list(layer.merged_adapters), merged - before, model(IDS)]
    layer.unmerge()
    return [*out, layer.merged, (layer.base_layer.weight - before).abs().max() < 1e-6]


@program()
def weight_and_bias_of_a_layer(peft: Any) -> Any:
    _, layer = first(peft)
    return [
        layer.weight is layer.base_layer.weight, layer.bias is layer.base_layer.bias,
        layer.weight, layer.bias, layer.in_features, layer.out_features,
        layer.fan_in_fan_out, layer.disable_adapters, layer.active_adapter,
    ]  # fmt: skip


@program()
def saved_modules(peft: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["head"])
    model = peft.get_peft_model(build("plain"), config).eval()
    head = model.base_model.model.head
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(2)
    out = [head.modules_to_save["default"].weight, head.original_module.weight, model(IDS)]
    out += [head.active_adapter, list(head.modules_to_save.keys()), head.weight, head.bias]
    state = head.adapter_state_dict("default", head.state_dict())
    out += [sorted(state), sorted(head.adapter_state_dict_load_map("default").items())]
    with model.disable_adapter():
        out.append(model(IDS))
    return [*out, [n for n, p in model.named_parameters() if p.requires_grad]]


@program()
def layers_are_switched_one_by_one(peft: Any) -> Any:
    from peft.tuners.lora import LoraLayer

    model, _ = first(peft)
    model.add_adapter("b", peft.LoraConfig(**LORA))
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer.set_adapter("b")
    out = [[n for n, p in model.named_parameters() if p.requires_grad], layers[0].active_adapters]
    for layer in layers:
        layer.set_requires_grad("default", True)
        layer.enable_adapters(False)
    out += [[n for n, p in model.named_parameters() if p.requires_grad], layers[0].disable_adapters]
    for layer in layers:
        layer.enable_adapters(True)
        layer.set_adapter(["default", "b"])
    return [*out, layers[1].active_adapters, layers[1].disable_adapters]


@program()
def copies_and_moves(peft: Any) -> Any:
    model, layer = first(peft)
    layer.lora_A  # noqa: B018 - what is shown must not be copied
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.base_model.model.lin0.lora_A["default"].weight.zero_()
    out = [model(IDS), twin(IDS), layer.lora_A["default"].weight]
    model.to(torch.float64)
    return [*out, str(layer.lora_A["default"].weight.dtype), model(IDS)]


@program()
def the_optimizer_of_every_tutorial(peft: Any) -> Any:
    model, _ = first(peft)
    model.train()
    groups = [
        {"params": [p for n, p in model.named_parameters() if "lora_A" in n], "lr": 0.01},
        {"params": [p for n, p in model.named_parameters() if "lora_B" in n], "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups)
    losses = []
    for _ in range(3):
        loss = model(IDS).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return [len(groups[0]["params"]), losses, norm]
