"""PEFT's modules, and PEFT's names with where they are here.

Every module of the alias offers every name: programs import the same class from several paths, and
it must be the same class.
"""

from __future__ import annotations

from .. import _WHERE
from ..table import CONFIGS
from ..types import PeftType

_TASKS = (
    "CausalLM FeatureExtraction QuestionAnswering Seq2SeqLM SequenceClassification "
    "TokenClassification"
).split()

# where -> names there; "theirs=ours" where they differ
_OFFERS = {
    "config": "PeftConfig PeftConfigMixin=PeftConfig PeftType TaskType",
    "errors": "PeftWarning PeftError=GraftworkError NoMatchingPeftModuleError=TargetError",
    "types": _WHERE["types"],
    "methods.adalora": "SVDLinear=AdaLoRA",
    "methods.lokr": "factorization=split",
    "prompts.config": "PromptLearningConfig=PromptConfig",
    "prompts.tokens": "PromptEmbedding=Tokens",
    "prompts.encoder": "PromptEncoder=Encoded",
    "prompts.tasks": "MultitaskPromptEmbedding=Tasks",
    "prompts.cpt": "CPTEmbedding=Context",
    "prompts.keys": "PrefixEncoder=Table",
    "prompts.compose": _WHERE["prompts.compose"],
    "prompts.cartridge": "CartridgeEncoder=Cartridge",
    "prompts.adaption": "AdaptedAttention=Gated",
    "prompts.kv": f"{_WHERE['prompts.kv']} prompt_embeddings_from_past_key_values",
    "model.peft_model": "PeftModel",
    "model.tasks": " ".join(
        ["get_peft_model", "PeftMixedModel", *(f"PeftModelFor{t}" for t in _TASKS)]
    )
    + " MODEL_TYPE_TO_PEFT_MODEL_MAPPING=TASK_CLASSES",
    "model.auto": " ".join(["AutoPeftModel", *(f"AutoPeftModelFor{t}" for t in _TASKS)]),
    "model.report": "TunerLayerStatus TunerModelStatus",
    "model.updating": "check_hotswap_configs_compatible convert_to_lora hotswap_adapter "
    "hotswap_adapter_from_state_dict "
    "prepare_model_for_compiled_hotswap save_as_lora",
    "model.functional": "get_peft_model_state_dict inject_adapter_in_model load_peft_weights "
    "set_peft_model_state_dict delete_adapter set_adapter set_requires_grad",
    "inits.batches": "forward_fn_dict prepare_layer_inputs_fn_language_modeling "
    "prepare_model_inputs_fn_language_modeling",
    "engine.root": "BaseTuner=Grafted",
    "interop.helpers": "DoraCaching KappaTuneSelector MontecloraTrainerMixin "
    "disable_input_dtype_casting find_kappa_target_modules rescale_adapter_scale "
    "update_forward_signature update_generate_signature update_signature",
    "interop.shims": "AuxiliaryTrainingWrapper BaseTunerLayer CONFIG_NAME LoraLayer "
    "INCLUDE_LINEAR_LAYERS_SHORTHAND ModulesToSaveWrapper PEFT_TYPE_TO_CONFIG_MAPPING "
    "PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING "
    "SAFETENSORS_WEIGHTS_NAME TOKENIZER_CONFIG_NAME TrainableTokensWrapper WEIGHTS_NAME "
    "cast_mixed_precision_params check_if_peft_model "
    "check_target_module_exists fsdp_auto_wrap_policy get_layer_status get_model_status "
    "get_peft_config infer_device prepare_model_for_kbit_training Conv1d Conv2d Conv3d "
    "Embedding Linear MultiheadAttention ParamWrapper Linear4bit Linear8bitLt GPTQLoraLinear "
    "EetqLoraLinear _get_submodules dequantize_module_weight transpose "
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
}
# the variants, starts and optimizers have PEFT's names in this library too
_OFFERS |= {
    where: f"{_OFFERS.get(where, '')} {names}"
    for where, names in _WHERE.items()
    if where.startswith(("methods.", "inits.", "optim."))
}
# PEFT's name -> (module here, name there)
NAMES = {
    theirs: (where, ours or theirs)
    for where, offers in _OFFERS.items()
    for theirs, _, ours in (offer.partition("=") for offer in offers.split())
}
NAMES |= {name: (row.module, name) for name, row in CONFIGS.items()}
_PEFTS = {name: row for name, row in CONFIGS.items() if row.name in PeftType.__members__}
for _name, _row in _PEFTS.items():
    _stem = _name.removesuffix("Config")
    NAMES[f"{_stem}Model"] = ("engine.root", "Grafted")
    NAMES.setdefault(f"{_stem}Layer", ("engine.host", "Host"))
    _kind = "LNTUNING" if _row.name == "LN_TUNING" else _row.name
    _name = f"TRANSFORMERS_MODELS_TO_{_kind}_TARGET_MODULES_MAPPING"
    NAMES[_name] = ("interop.shims", _name)
# PEFT's question whether a package is installed -> the package
INSTALLED = {
    f"is_{package}_available": package
    for package in "aqlm diffusers eetq gptqmodel hqq optimum torchao".split()
}
INSTALLED |= {"is_bnb_available": "bitsandbytes", "is_bnb_4bit_available": "bitsandbytes"}
NAMES |= {name: ("interop.shims", name) for name in INSTALLED}
MODULES = frozenset(
    f"peft.{name}".rstrip(".")
    for name in (
        " auto config functional helpers import_utils mapping mapping_func mixed_model peft_model "
        "optimizers optimizers.lorafa optimizers.loraplus optimizers.riemannian tuners.lora.arrow "
        "tuners.lora.bnb tuners.lora.conversion tuners.lora.eetq tuners.lora.gptq "
        "tuners tuners.tuners_utils tuners.cartridge.utils tuners.lora.variants tuners.lora.eva "
        "tuners.lora.corda "
        "tuners.lora.loraga tuners.mixed tuners.mixed.model utils utils.constants "
        "utils.error utils.hotswap utils.integrations utils.other utils.peft_types "
        "utils.loftq_utils utils.save_and_load utils.warning"
    ).split(" ")
)
MODULES |= {
    f"peft.tuners.{row.name.lower()}{part}"
    for row in _PEFTS.values()
    for part in ("", ".config", ".layer", ".model")
}
