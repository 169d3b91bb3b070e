"""Programs for PEFT that use its models, configs and functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from harness import fill, folder, program
from programs_layers import IDS, LORA

from tiny import IDS as TOKENS
from tiny import build


def lora(peft: Any, kind: str = "plain", name: str = "default", **options: Any) -> Any:
    """A LoRA with numbers in it."""
    where = {} if kind == "plain" else {"target_modules": ["q_proj", "v_proj"]}
    config = peft.LoraConfig(**{**LORA, **where, **options})
    model = peft.get_peft_model(build(kind), config, name).eval()
    fill(model)
    return model


@program()
def what_a_model_is(peft: Any) -> Any:
    model = lora(peft, "llama", task_type="CAUSAL_LM")
    base = model.base_model
    return [
        type(model).__name__, type(base).__name__, isinstance(base, peft.LoraModel),
        isinstance(base, peft.IA3Model), isinstance(base, peft.tuners.tuners_utils.BaseTuner),
        isinstance(model, peft.PeftModel), type(base.model).__name__, base.prefix,
        base.tuner_layer_cls.__name__, sorted(base.targeted_module_names),
        base.targeted_parameter_names, list(base.peft_config), model.peft_type,
        model.peft_type.value,
        model.active_adapter, model.active_adapters, base.active_adapters, model.modules_to_save,
        model.peft_config["default"].r, model.active_peft_config.lora_alpha,
        model.config.model_type,
        type(model.get_base_model()).__name__, model.device.type, str(model.base_model_torch_dtype),
        model.has_active_enabled_adapter, str(model.dtype), model.name_or_path,
        hasattr(model, "nothing"), base.uses_shared_state,
        base.get_model_config(base.model)["model_type"],
        sorted(base.target_module_mapping)[:4],
    ]  # fmt: skip


@program()
def tuners_of_all_methods(peft: Any) -> Any:
    mapping = peft.PEFT_TYPE_TO_TUNER_MAPPING
    kinds = {k.value: v.__name__ for k, v in mapping.items() if v.__name__.endswith("Model")}
    prefixes = {k.value: v for k, v in peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.items()}
    return [sorted(kinds.items()), sorted(prefixes.items()), sorted(k.value for k in mapping)]


@program()
def a_tuner_is_made_by_itself(peft: Any) -> Any:
    tuner = peft.LoraModel(build("plain"), peft.LoraConfig(**LORA), "default")
    names = [n for n, p in tuner.named_parameters() if p.requires_grad]
    out = [type(tuner).__name__, names, tuner(IDS), sorted(tuner.state_dict())]
    return [*out, type(tuner.merge_and_unload()).__name__]


@program()
def counts_and_reports(peft: Any) -> Any:
    import dataclasses

    out = []
    for kind, options in (
        ("LoraConfig", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
        ("IA3Config", {}),
        ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 9}),
        ("VeraConfig", {"r": 4}),
        ("LoraConfig", {"r": 2, "modules_to_save": ["lm_head"]}),
        ("LoHaConfig", {"r": 2, "target_modules": ["q_proj"]}),
    ):
        model = peft.get_peft_model(build("llama"), getattr(peft, kind)(**options))
        model.add_adapter("other", getattr(peft, kind)(**options, inference_mode=True))
        out.append([
            model.get_nb_trainable_parameters(),
            [dataclasses.asdict(s) for s in model.get_layer_status()],
            dataclasses.asdict(model.get_model_status()),
        ])  # fmt: skip
    return out


@program()
def a_report_in_changing_states(peft: Any) -> Any:
    model = lora(peft)
    model.add_adapter("b", peft.LoraConfig(**LORA))
    out = []

    def note() -> None:
        s = model.get_model_status()
        out.append([s.enabled, s.active_adapters, s.merged_adapters, s.requires_grad,
                    s.available_adapters, s.num_adapter_layers, s.trainable_params])  # fmt: skip

    note()
    model.set_adapter("b")
    note()
    model.merge_adapter()
    note()
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    note()
    model.base_model.enable_adapter_layers()
    note()
    model.base_model.set_adapter(["default", "b"])
    note()
    model.base_model.model.lin0.lora_A["b"].weight.requires_grad = False
    note()
    model.delete_adapter("b")
    note()
    return out


@program()
def functions_for_reports(peft: Any) -> Any:
    model = lora(peft)
    one, two = peft.get_layer_status(model), peft.get_model_status(model)
    return [[s.name for s in one], two.adapter_model_type, two.base_model_type, two.peft_types]


@program()
def printed_counts(peft: Any) -> Any:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        lora(peft).print_trainable_parameters()
    return text.getvalue()


@program()
def adapters_come_and_go(peft: Any) -> Any:
    model = lora(peft)
    out = [model(IDS)]
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["lin1"]))
    out += [model.active_adapter, list(model.peft_config), model(IDS)]
    model.set_adapter("b")
    fill(model)
    out += [
        model.active_adapter,
        model(IDS),
        [n for n, p in model.named_parameters() if p.requires_grad],
    ]
    model.set_adapter("default", inference_mode=True)
    out += [[n for n, p in model.named_parameters() if p.requires_grad], model(IDS)]
    model.base_model.set_adapter(["default", "b"])
    out += [model.base_model.active_adapters, model(IDS)]
    model.set_adapter("b")
    model.delete_adapter("default")
    return [*out, list(model.peft_config), model.active_adapters, model(IDS)]


@program("is now deleted. Setting active adapter to b")
def the_active_adapter_is_deleted(peft: Any) -> Any:
    model = lora(peft)
    model.add_adapter("b", peft.LoraConfig(**LORA))
    model.add_adapter("c", peft.LoraConfig(**LORA))
    model.delete_adapter("default")
    return [model.active_adapter, model.active_adapters, list(model.peft_config), model(IDS)]


@program()
def disabled_for_a_while(peft: Any) -> Any:
    model, base = lora(peft), build("plain")
    out = [model(IDS)]
    with model.disable_adapter():
        out += [model(IDS), base(IDS)]
    out.append(model(IDS))
    model.base_model.disable_adapter_layers()
    out += [model(IDS), [n for n, p in model.named_parameters() if p.requires_grad]]
    with model.disable_adapter():
        pass
    out += [model(IDS)]
    model.base_model.enable_adapter_layers()
    return [*out, model(IDS), len([n for n, p in model.named_parameters() if p.requires_grad])]


@program()
def merging_and_back(peft: Any) -> Any:
    model = lora(peft)
    out = [model(IDS)]
    model.merge_adapter()
    out += [
        model(IDS),
        model.base_model.model.lin0.merged,
        model.get_model_status().merged_adapters,
    ]
    model.unmerge_adapter()
    out += [model(IDS), model.base_model.model.lin0.merged]
    model.merge_adapter(["default"], safe_merge=True)
    with model.disable_adapter():
        out.append(model(IDS))
    out.append(model(IDS))
    plain = model.merge_and_unload(progressbar=False, safe_merge=True)
    names = [n for n, _ in plain.named_parameters()]
    return [*out, plain(IDS), type(plain).__name__, names, hasattr(plain, "peft_config")]


@program()
def unloading(peft: Any) -> Any:
    model = lora(peft)
    plain = model.unload()
    return [plain(IDS), [n for n, _ in plain.named_parameters()], type(plain).__name__]


@program("Already following adapters were merged", "All adapters are already merged")
def merging_twice(peft: Any) -> Any:
    model = lora(peft)
    model.add_adapter("b", peft.LoraConfig(**LORA))
    model.set_adapter("b")
    fill(model)
    model.set_adapter("default")
    model.merge_adapter()
    model.merge_adapter()
    model.merge_adapter(["b"])
    return [list(model.base_model.model.lin0.merged_adapters), model(IDS)]


@program("Already unmerged. Nothing to do.")
def unmerging_what_is_not_merged(peft: Any) -> Any:
    model = lora(peft)
    model.unmerge_adapter()
    return model(IDS)


@program()
def adapters_by_row(peft: Any) -> Any:
    model = lora(peft)
    model.add_adapter("b", peft.LoraConfig(**LORA))
    model.set_adapter("b")
    fill(model)
    return [model(IDS, adapter_names=["default", "b"]), model(IDS, adapter_names=["__base__", "b"])]


@program()
def weighted_combinations(peft: Any) -> Any:
    model = lora(peft)
    model.add_adapter("b", peft.LoraConfig(**LORA))
    model.set_adapter("b")
    fill(model)
    out = []
    for how in ("linear", "cat", "svd"):
        model.add_weighted_adapter(["default", "b"], [0.7, 0.3], how, combination_type=how)
        config = model.peft_config[how]
        model.set_adapter(how)
        out.append([model(IDS), config.r, config.lora_alpha, sorted(model.peft_config)])
    before = model(IDS)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "svd", combination_type="svd")
    return [*out, torch.equal(model(IDS), before)]


@program()
def folders(peft: Any) -> Any:
    model, path = lora(peft, "llama", task_type="CAUSAL_LM"), folder()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    model.save_pretrained(path)
    files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    config = json.loads((path / "adapter_config.json").read_text())
    config.pop("peft_version")
    config["target_modules"] = sorted(config["target_modules"])
    loaded = peft.PeftModel.from_pretrained(build("llama"), path)
    out = [
        [f for f in files if f.startswith(("adapter", "README", "second/"))],
        type(loaded).__name__,
    ]
    out += [config, model.peft_config["default"].inference_mode, loaded.training]
    out += [[n for n, p in loaded.named_parameters() if p.requires_grad]]
    report = loaded.load_adapter(path / "second", "second", is_trainable=True)
    out += [report.missing_keys, report.unexpected_keys, loaded.active_adapter]
    loaded.set_adapter("second")
    out += [[n for n, p in loaded.named_parameters() if p.requires_grad][:2]]
    trained = peft.PeftModel.from_pretrained(build("llama"), path, is_trainable=True)
    out += [len([n for n, p in trained.named_parameters() if p.requires_grad])]
    model.save_pretrained(path / "some", selected_adapters=["second"])
    return [*out, sorted(p.name for p in (path / "some").iterdir())]


@program()
def configs(peft: Any) -> Any:
    path = folder()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["a", "b"], task_type="CAUSAL_LM")
    config.save_pretrained(path)
    again = peft.PeftConfig.from_pretrained(path)
    text = json.loads((path / "adapter_config.json").read_text())
    read = peft.PeftConfig.from_json_file(str(path / "adapter_config.json"))
    made = peft.PeftConfig.from_peft_type(peft_type="IA3", target_modules=["q"])
    mapped = peft.get_peft_config({"peft_type": "LORA", "r": 3})
    listed = peft.LoraConfig(target_modules=["x"])
    return [
        type(again).__name__, again.r, again.target_modules == {"a", "b"},
        again.task_type == "CAUSAL_LM",
        again.peft_type.value, str(again.peft_type), again.peft_type == "LORA", sorted(text),
        sorted(k for k in config.to_dict() if k != "runtime_config"), read["r"],
        type(made).__name__,
        type(mapped).__name__, mapped.r, listed.target_modules, config.is_prompt_learning,
        config.is_adaption_prompt, isinstance(config, peft.PeftConfig), config == again,
        peft.PeftType.LORA.value, peft.TaskType.CAUSAL_LM == "CAUSAL_LM",
        peft.TaskType("SEQ_CLS").value,
        peft.PeftType("IA3") is peft.PeftType.IA3, f"{peft.TaskType.CAUSAL_LM}",
        peft.utils.peft_types.PeftType is peft.PeftType,
        peft.PromptTuningConfig(num_virtual_tokens=3).is_prompt_learning,
    ]  # fmt: skip


@program()
def defaults_of_configs(peft: Any) -> Any:
    out = {}
    for kind in sorted(n for n in peft.__all__ if n.endswith("Config")):
        if kind in ("PeftConfig", "PromptLearningConfig", "XLoraConfig") or kind.startswith(
            ("Prompt", "OFT")
        ):
            continue
        try:
            config = getattr(peft, kind)()
        except (TypeError, ValueError):
            continue
        if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
            found = config.to_dict()
            out[kind] = {
                k: v for k, v in found.items() if k not in ("peft_version", "runtime_config")
            }
    return out


@program()
def state_dicts_of_adapters(peft: Any) -> Any:
    model = lora(peft, "bert", target_modules=["query"], modules_to_save=["classifier"])
    state = peft.get_peft_model_state_dict(model)
    other = peft.get_peft_model(build("bert"), peft.LoraConfig(
        **{**LORA, "target_modules": ["query"]}, modules_to_save=["classifier"]))  # fmt: skip
    report = peft.set_peft_model_state_dict(other, state)
    own = {k: v for k, v in peft.get_peft_model_state_dict(other).items()}
    base = peft.get_base_model_state_dict(model)
    same = all(torch.equal(own[k], v) for k, v in state.items())
    return [{k: list(v.shape) for k, v in state.items()}, same, report.unexpected_keys,
            sorted(base), sorted(base) == sorted(build("bert").state_dict())]  # fmt: skip


@program()
def injection(peft: Any) -> Any:
    model = peft.inject_adapter_in_model(peft.LoraConfig(**LORA), build("plain"))
    names = [n for n, p in model.named_parameters()]
    fill(model)
    out = [type(model).__name__, names, model(IDS), sorted(peft.get_peft_model_state_dict(model))]
    out += [sorted(model.state_dict())]
    from peft import functional

    functional.set_adapter(model, "default")
    functional.set_requires_grad(model, "default", False)
    out += [[n for n, p in model.named_parameters() if p.requires_grad]]
    functional.delete_adapter(model, "default", prefix="lora_")
    return [*out, model(IDS)]


@program()
def rules_of_targets(peft: Any) -> Any:
    out: dict[str, Any] = {}
    for name, options in {
        "regex": {"target_modules": r".*\.0\..*(q|v)_proj"},
        "linear": {"target_modules": "all-linear"},
        "suffix": {"target_modules": ["self_attn.q_proj", "down_proj"]},
        "exclude": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "up_proj"]},
        "exclude_regex": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"},
        "layers": {"target_modules": ["q_proj"], "layers_to_transform": 1},
        "pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0],
                    "layers_pattern": "layers"},
        "default": {},
        "ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2},
                  "alpha_pattern": {r".*0.*v_proj": 5}},
        "rs": {"target_modules": ["q_proj"], "use_rslora": True},
    }.items():  # fmt: skip
        model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, lora_alpha=6, **options))
        layers = dict(model.base_model.model.named_modules())
        found = sorted(model.base_model.targeted_module_names)
        values = [[dict(layers[n].r), dict(layers[n].scaling)] for n in found]
        out[name] = [found, values]
    return out


@program()
def helpers(peft: Any) -> Any:
    from peft.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale
    from peft.import_utils import is_bnb_available
    from peft.utils import _get_submodules, infer_device, transpose
    from peft.utils.other import str_to_bool

    model, path = lora(peft), folder()
    model.save_pretrained(path)
    with rescale_adapter_scale(model, 0.5):
        out = [model(IDS)]
    with disable_input_dtype_casting(model):
        out.append(model(IDS))
    parent, target, name = _get_submodules(model.base_model.model, "lin0")
    x = torch.arange(6.0).reshape(2, 3)
    labels = torch.tensor([[1, 2, -100]])
    return [
        *out, check_if_peft_model(str(path)), check_if_peft_model(str(path / "no")), infer_device(),
        type(parent).__name__, name, target is parent.lin0, transpose(x, True), is_bnb_available(),
        peft.utils.shift_tokens_right(labels, 0, 7).tolist(), str_to_bool("yes"), str_to_bool("0"),
        peft.utils.id_tensor_storage(x)[2], peft.utils._get_batch_size(x, None),
        peft.utils._get_input_embeddings_name(build("llama")),
        peft.utils._is_valid_match("a.b", "b"),
    ]  # fmt: skip


@program()
def merge_utilities(peft: Any) -> Any:
    from peft.utils import merge_utils as m

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 6, generator=g) for _ in range(2))
    w, both = torch.tensor([0.7, -0.2]), torch.stack([a, b])
    mask = m.calculate_majority_sign_mask(both, "frequency")
    return [
        m.task_arithmetic([a, b], w), m.magnitude_prune([a, b], w, 0.5), m.ties([a, b], w, 0.5),
        m.ties([a, b], w, 0.5, "frequency"), m.dare_linear([a, b], w, 1.0), mask.sum().item(),
        m.disjoint_merge(both, mask), m.prune(a, 0.3, "magnitude"), m.random_pruning(a, 1.0, True),
        m.reshape_weight_task_tensors(both, w).shape, m.dare_ties([a, b], w, 1.0),
    ]  # fmt: skip


@program()
def kbit_preparation(peft: Any) -> Any:
    model = peft.prepare_model_for_kbit_training(build("llama").to(torch.bfloat16))
    frozen = [p.requires_grad for p in model.parameters()]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    grads = [p.grad is not None for n, p in model.named_parameters() if "lora_B" in n]
    peft.cast_mixed_precision_params(model, torch.float16)
    kinds = sorted({f"{p.requires_grad} {p.dtype}" for p in model.parameters()})
    return [any(frozen), grads, kinds]


@program()
def auto_classes(peft: Any) -> Any:
    path = folder()
    build("llama").save_pretrained(path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(path / "lora")
    one = peft.AutoPeftModelForCausalLM.from_pretrained(path / "lora")
    read = peft.PeftConfig.from_pretrained(path / "lora")
    name = Path(read.base_model_name_or_path).name
    return [type(one).__name__, name, one.peft_config["default"].r]


@program()
def task_classes(peft: Any) -> Any:
    out = {}
    for task in ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"):
        config = peft.LoraConfig(r=2, target_modules=["query"], task_type=task)
        model = peft.get_peft_model(build("bert"), config)
        trained = [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
        out[task] = [type(model).__name__, trained, sorted(model.modules_to_save or ())]
    return out


@program()
def mixed_models(peft: Any) -> Any:
    model = peft.get_peft_model(build("plain"), peft.LoraConfig(**LORA), "a", mixed=True)
    model.add_adapter("b", peft.LoHaConfig(r=2, target_modules=["lin1"], init_weights=False))
    model.set_adapter(["a", "b"])
    out = [type(model).__name__, isinstance(model, peft.PeftMixedModel), sorted(model.peft_config)]
    out += [model.active_adapters, model.get_nb_trainable_parameters()]
    model.delete_adapter("b")
    return [*out, model.active_adapters, model(IDS).shape]


@program()
def adalora_and_its_calls(peft: Any) -> Any:
    config = peft.AdaLoraConfig(init_r=3, target_r=2, tinit=1, tfinal=1, total_step=5, deltaT=1,
                                target_modules=["q_proj", "v_proj"])  # fmt: skip
    model = peft.get_peft_model(build("llama"), config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return [type(model.base_model).__name__, isinstance(model.base_model, peft.LoraModel)]


@program()
def converted_to_lora(peft: Any) -> Any:
    model = peft.get_peft_model(build("plain"), peft.LoHaConfig(r=2, target_modules=["lin0"],
                                                                init_weights=False))  # fmt: skip
    fill(model, ("hada_",))
    config, state = peft.convert_to_lora(model, rank=3)
    supported = model.supports_lora_conversion()
    return [
        type(config).__name__,
        config.r,
        {k: list(v.shape) for k, v in state.items()},
        supported,
    ]


@program()
def prompts(peft: Any) -> Any:
    out = []
    for kind, options in (
        ("PromptTuningConfig", {"num_virtual_tokens": 3}),
        ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
        ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    ):
        config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(build("llama"), config).eval()
        logits = model(input_ids=TOKENS).logits
        state = peft.get_peft_model_state_dict(model)
        out.append([type(model).__name__, list(logits.shape), model.peft_type.value,
                    {k: list(v.shape) for k, v in state.items()},
                    model.get_nb_trainable_parameters()[0],
                    model.active_peft_config.num_virtual_tokens,
                    model.active_peft_config.is_prompt_learning])  # fmt: skip
    return out
