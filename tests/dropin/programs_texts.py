"""Programs for PEFT that do something wrong, with the words that others match."""

from __future__ import annotations

from typing import Any

import torch
from harness import fill, folder, program
from programs_layers import IDS, LORA
from programs_models import lora
from safetensors.torch import load_file, save_file

from tiny import IDS as TOKENS
from tiny import build


@program("already exists")
def a_name_is_taken(peft: Any) -> Any:
    lora(peft).add_adapter("default", peft.LoraConfig(**LORA))


@program("Adapter nothing not found")
def an_unknown_adapter_is_set(peft: Any) -> Any:
    lora(peft).set_adapter("nothing")


@program("Adapter nothing does not exist")
def an_unknown_adapter_is_deleted(peft: Any) -> Any:
    lora(peft).delete_adapter("nothing")


@program("not found in the base model")
def no_target_is_found(peft: Any) -> Any:
    peft.get_peft_model(build("plain"), peft.LoraConfig(target_modules=["nothing"]))


@program("not found in the base model")
def no_target_is_found_by_a_pattern(peft: Any) -> Any:
    peft.get_peft_model(build("plain"), peft.LoraConfig(target_modules="no.*thing"))


@program("Please specify `target_modules`")
def an_unknown_architecture(peft: Any) -> Any:
    peft.get_peft_model(build("plain"), peft.LoraConfig())


@program("second time")
def a_model_is_wrapped_twice(peft: Any) -> Any:
    model = lora(peft)
    peft.get_peft_model(model.base_model.model, peft.LoraConfig(**LORA))


@program("Found missing adapter keys while loading the checkpoint")
def a_file_lacks_a_tensor(peft: Any) -> Any:
    path = folder()
    lora(peft).save_pretrained(path)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.lin0.lora_A.weight")
    save_file(tensors, file, {"format": "pt"})
    model = peft.PeftModel.from_pretrained(build("plain"), path)
    return [n for n in dict(model.named_parameters()) if "lin0.lora_A" in n]


@program("size mismatch")
def a_file_has_another_shape(peft: Any) -> Any:
    model = lora(peft)
    state = peft.get_peft_model_state_dict(model)
    state["base_model.model.lin0.lora_A.weight"] = torch.zeros(2, 16)
    peft.set_peft_model_state_dict(model, state)


@program()
def another_shape_is_ignored(peft: Any) -> Any:
    model = lora(peft)
    state = peft.get_peft_model_state_dict(model)
    state["base_model.model.lin0.lora_A.weight"] = torch.zeros(2, 16)
    peft.set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    return model.base_model.model.lin0.lora_A["default"].weight


@program("NaNs detected in the merged weights")
def merging_what_is_not_finite(peft: Any) -> Any:
    model = lora(peft)
    model.base_model.model.lin0.lora_A["default"].weight.data.fill_(float("nan"))
    model.merge_adapter(safe_merge=True)


@program("Unexpected keyword arguments ['of_the_future'] for class LoraConfig")
def a_file_of_a_newer_version(peft: Any) -> Any:
    import json

    path = folder()
    peft.LoraConfig(**LORA).save_pretrained(path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_the_future": 1}))
    return peft.PeftConfig.from_pretrained(path).r


@program("Can't find 'adapter_config.json'")
def a_folder_without_a_config(peft: Any) -> Any:
    peft.PeftConfig.from_pretrained(str(folder()))


@program()
def an_unknown_method(peft: Any) -> Any:
    peft.get_peft_config({"peft_type": "NOTHING"})


@program("layers_to_transform")
def a_pattern_with_layers(peft: Any) -> Any:
    peft.LoraConfig(target_modules="a.*", layers_to_transform=[0])


@program("layers_pattern")
def layers_pattern_alone(peft: Any) -> Any:
    peft.LoraConfig(target_modules=["a"], layers_pattern="h")


@program("r` should be a positive integer")
def a_rank_of_zero(peft: Any) -> Any:
    peft.get_peft_model(build("plain"), peft.LoraConfig(r=0, target_modules=["lin0"]))


@program("Length of `adapter_names` should be the same as the number of inputs")
def names_for_too_few_rows(peft: Any) -> Any:
    lora(peft)(IDS, adapter_names=["default"] * 3)


@program("adapter")
def an_unknown_name_for_a_row(peft: Any) -> Any:
    lora(peft)(IDS, adapter_names=["default", "nothing"])


@program("All adapters must have the same r value when using combination_type linear")
def linear_of_different_ranks(peft: Any) -> Any:
    model = lora(peft)
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c", combination_type="linear")


@program("nothing")
def weights_of_unknown_adapters(peft: Any) -> Any:
    lora(peft).add_weighted_adapter(["default", "nothing"], [1.0, 1.0], "c")


@program("Invalid combination_type")
def an_unknown_combination(peft: Any) -> Any:
    model = lora(peft)
    model.add_adapter("b", peft.LoraConfig(**LORA))
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c", combination_type="nothing")


@program("You passed an invalid `selected_adapters` arguments")
def unknown_adapters_are_saved(peft: Any) -> Any:
    lora(peft).save_pretrained(folder(), selected_adapters=["nothing"])


@program("should be a directory, not a file")
def saving_to_a_file(peft: Any) -> Any:
    path = folder() / "file"
    path.write_text("")
    lora(peft).save_pretrained(path)


@program("No modules were targeted")
def everything_is_excluded(peft: Any) -> Any:
    config = peft.LoraConfig(target_modules=["lin0"], exclude_modules=["lin0"])
    peft.get_peft_model(build("plain"), config)


@program("rank_pattern")
def a_pattern_that_matches_nothing(peft: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["lin0"], rank_pattern={"nothing": 3})
    return type(peft.get_peft_model(build("plain"), config)).__name__


@program("not supported")
def a_target_of_another_type(peft: Any) -> Any:
    peft.get_peft_model(build("plain"), peft.LoraConfig(target_modules=["norm"]))


@program("init_lora_weights")
def an_unknown_start(peft: Any) -> Any:
    config = peft.LoraConfig(target_modules=["lin0"], init_lora_weights="nothing")
    peft.get_peft_model(build("plain"), config)


@program("merged")
def a_merged_adapter_is_deleted(peft: Any) -> Any:
    model = lora(peft)
    model.add_adapter("b", peft.LoraConfig(**LORA))
    model.merge_adapter()
    model.delete_adapter("default")


@program()
def another_is_set_while_one_is_merged(peft: Any) -> Any:
    model = lora(peft)
    model.add_adapter("b", peft.LoraConfig(**LORA))
    model.merge_adapter()
    model.set_adapter("b")
    fill(model)
    return [model(IDS), model.active_adapter]


@program("Incompatible PEFT types found")
def hot_swapping_another_method(peft: Any) -> Any:
    from peft.utils.hotswap import hotswap_adapter

    path = folder()
    peft.get_peft_model(
        build("plain"), peft.LoHaConfig(r=2, target_modules=["lin0"])
    ).save_pretrained(path)
    hotswap_adapter(lora(peft), path, adapter_name="default")


@program()
def hot_swapping(peft: Any) -> Any:
    from peft.utils.hotswap import hotswap_adapter

    path = folder()
    lora(peft).save_pretrained(path)
    model = peft.get_peft_model(build("plain"), peft.LoraConfig(**LORA)).eval()
    before = model(IDS)
    hotswap_adapter(model, path, adapter_name="default")
    return [before, model(IDS)]


@program("No adapter layers found in the model")
def a_status_of_a_plain_model(peft: Any) -> Any:
    peft.get_layer_status(build("plain"))


@program("multiplier")
def a_scale_that_is_no_number(peft: Any) -> Any:
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(lora(peft), "2"):
        pass


@program()
def generating(peft: Any) -> Any:
    model = lora(peft, "llama", task_type="CAUSAL_LM")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    one = model.generate(input_ids=TOKENS, **options)
    two = model.generate(TOKENS, adapter_names=["default", "__base__"], **options)
    return [one.tolist(), two.tolist()]


@program()
def an_odd_name(peft: Any) -> Any:
    model = lora(peft, name="lora_A")
    return [model(IDS), sorted(n for n, p in model.named_parameters() if p.requires_grad)]


@program()
def a_name_with_a_dot(peft: Any) -> Any:
    lora(peft, name="a.b")


@program()
def a_head_that_is_no_module(peft: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers"])
    peft.get_peft_model(build("llama"), config)


@program()
def methods_exist(peft: Any) -> Any:
    out = {}
    for owner in (peft.PeftModel, peft.PeftMixedModel, peft.PeftConfig, peft.LoraModel,
                  peft.tuners.tuners_utils.BaseTuner, peft.PeftModelForCausalLM):  # fmt: skip
        names = [n for n in dir(owner) if not n.startswith("_")]
        own = set(dir(torch.nn.Module))
        out[owner.__name__] = [n for n in names if n not in own and callable(getattr(owner, n))]
    return {f"{k}.{n}": True for k, v in out.items() for n in v}
