"""Graftwork: parameter-efficient fine-tuning with PEFT's names and files, imported lazily."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .table import CONFIGS

__version__ = "0.1.0"

_TASKS = (
    "CausalLM FeatureExtraction QuestionAnswering Seq2SeqLM SequenceClassification "
    "TokenClassification"
).split()
_WHERE = {  # module -> the public names that it holds
    "config": "PeftConfig PeftType TargetConfig TaskType",
    "types": "MultitaskPromptTuningInit PromptEncoderReparameterizationType PromptTuningInit",
    "errors": "FileError GraftworkError MergeError PeftWarning StateError TargetError "
    "TrainingError",
    "table": "METHODS register",
    "engine.adapter": "Adapter Additive LowRank Shared",
    "engine.site": "Site register_site",
    "engine.root": "Grafted",
    "fast.plain": "plain_path",
    "loss.fused": "fused_loss",
    "files.codec": "LoadReport",
    "model.peft_model": "PeftModel",
    "model.cache": "AdapterCache",
    "model.tasks": " ".join(
        ["get_peft_model", "PeftMixedModel", *(f"PeftModelFor{t}" for t in _TASKS)]
    ),
    "model.auto": " ".join(["AutoPeftModel", *(f"AutoPeftModelFor{t}" for t in _TASKS)]),
    "model.updating": "convert_to_lora extract hotswap_adapter hotswap_adapter_from_state_dict "
    "prepare_model_for_compiled_hotswap save_as_lora",
    "methods.lora_options": "ArrowConfig BdLoraConfig KasaConfig LoraRuntimeConfig "
    "MontecloraConfig VeloraConfig",
    "methods.arrow": "create_arrow_model",
    "inits.options": "CordaConfig EvaConfig LoftQConfig LoraGAConfig",
    "inits.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "inits.corda": "preprocess_corda",
    "inits.lora_ga": "preprocess_loraga",
    "inits.requantised": "replace_lora_weights_loftq",
    "optim.lorafa": "LoraFAOptimizer create_lorafa_optimizer",
    "optim.loraplus": "create_loraplus_optimizer",
    "optim.riemannian": "create_riemannian_optimizer",
    "together.runs": "EarlyStop Run RunResult RunResults",
    "together.train": "train_together",
    "prompts.kv": "initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text",
    "prompts.compose": "compose_cartridge_adapters",
    "prompts.nearest": "nearest_tokens",
    "prompts.norms": "prompt_norms",
    "model.functional": "get_peft_model_state_dict inject_adapter_in_model load_peft_weights "
    "set_peft_model_state_dict using",
}
_HOME = {name: module for module, names in _WHERE.items() for name in names.split()}
_HOME |= {name: row.module for name, row in CONFIGS.items()}

__all__ = sorted([*_HOME, "as_peft"])


def __getattr__(name: str) -> Any:
    if name == "as_peft":
        return import_module(".as_peft", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
