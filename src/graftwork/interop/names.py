"""PEFT's modules, and PEFT's names with where they are here.

Every module of the alias offers every name: programs import the same class from several paths, and
it must be the same class.
"""

from __future__ import annotations

from .. import _WHERE
from ..table import CONFIGS
from ..types import PeftType
from .exports import EXPORTS, MAPS
from .exports import MODULES as MODULES
from .facts import AROUND, LAYER_NAMES, QUANTISED

_TASKS = (
    "CausalLM FeatureExtraction QuestionAnswering Seq2SeqLM SequenceClassification "
    "TokenClassification"
).split()

# where -> names there; "theirs=ours" where they differ
_OFFERS = {
    "config": "PeftConfig PeftConfigMixin=PeftConfig PeftType TaskType LycorisConfig=TargetConfig",
    "errors": "PeftWarning PeftError=GraftworkError NoMatchingPeftModuleError=TargetError",
    "types": _WHERE["types"],
    "methods.adalora": "SVDLinear=AdaLoRA",
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
    "model.updating": "convert_to_lora hotswap_adapter "
    "hotswap_adapter_from_state_dict "
    "prepare_model_for_compiled_hotswap save_as_lora",
    "model.functional": "get_peft_model_state_dict inject_adapter_in_model load_peft_weights "
    "set_peft_model_state_dict delete_adapter set_adapter set_requires_grad",
    "inits.batches": "forward_fn_dict prepare_layer_inputs_fn_language_modeling "
    "prepare_model_inputs_fn_language_modeling",
    "interop.tuners": "BaseTuner LycorisTuner MixedModel",
    "interop.classes": "BaseTunerLayer LycorisLayer AuxiliaryTrainingWrapper "
    "ModulesToSaveWrapper TrainableTokensWrapper",
    "interop.combining": "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge "
    "magnitude_based_pruning magnitude_prune prune random_pruning reshape_weight_task_tensors "
    "task_arithmetic ties",
    "interop.devices": "get_quantization_config get_quantization_kwargs quantization_extra_repr "
    "resolve_quantization_backend get_bnb_param_type dequantize_bnb_weight "
    "check_deepspeed_zero3_enabled gather_params_ctx init_empty_weights skip_init_on_device "
    "onload_layer get_device_map get_layer_device_map map_cache_to_layer_device_map",
    "interop.status": "get_layer_status get_model_status",
    "interop.views": "BufferDict=Buffers",
    "interop.functions": "ALLOWED_COMPUTE_DTYPES ALL_LAYERNORM_LAYERS AdamssAsaCallback "
    "COMPATIBLE_TUNER_TYPES "
    "CONFIG_KEYS_TO_CHECK DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES "
    "ENABLE_DORA_CACHING EPS GKS_ADAPTER_PREFIX MIN_EXPECTED_CONFIG_KEYS "
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION PREFIXES RoadVariant SEQ_CLS_HEAD_NAMES "
    "TASK_ADAPTER_PREFIX UPCAST_DTYPES VARIANT_KWARG_KEYS _freeze_adapter _get_batch_size "
    "_get_input_embeddings_name _is_valid_match _prepare_prompt_learning_config "
    "_set_adapter _set_trainable bloom_model_postprocess_past_key_value cast_adapter_dtype "
    "check_adapters_to_merge check_file_exists_on_hf_hub check_hotswap_configs_compatible "
    "clone_module convert_peft_config_for_transformers factorization get_base_model_state_dict "
    "get_embedding_layer_name get_pattern_key has_valid_embedding_base_layer "
    "id_tensor_storage inspect_matched_modules match_target_against_key random_mask "
    "register_peft_method set_additional_trainable_modules set_base_model_state_dict "
    "shift_tokens_right starcoder_model_postprocess_past_key_value str_to_bool",
    "interop.helpers": "DoraCaching KappaTuneSelector MontecloraTrainerMixin "
    "disable_input_dtype_casting find_kappa_target_modules rescale_adapter_scale "
    "update_forward_signature update_generate_signature update_signature",
    "interop.shims": "CONFIG_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND PEFT_TYPE_TO_CONFIG_MAPPING "
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING "
    "SAFETENSORS_WEIGHTS_NAME TOKENIZER_CONFIG_NAME WEIGHTS_NAME cast_mixed_precision_params "
    "check_if_peft_model check_target_module_exists fsdp_auto_wrap_policy "
    "get_peft_config infer_device prepare_model_for_kbit_training "
    "_get_submodules dequantize_module_weight transpose "
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING "
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING is_transformers_dtensor_tp "
    "is_transformers_ge_v5 is_transformers_ge_v5_13_0 is_transformers_ge_v5_17_0 "
    "is_transformers_ge_v5_1_0 is_transformers_ge_v5_4_0 is_transformers_ge_v5_6_0 "
    "is_transformers_le_4_53 is_xpu_available is_torch_tpu_available is_torchao_ge_v0_18_0 "
    "is_mlu_available is_npu_available mlu_available",
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
    if f"{_stem}Model" in EXPORTS["peft"]:
        NAMES[f"{_stem}Model"] = ("interop.tuners", f"{_stem}Model")
_ALSO = ("HIRA", "OSF")  # in the modules of these methods alone
NAMES |= {name: ("interop.shims", name) for name in MAPS}
NAMES |= {n: ("interop.shims", n) for m in _ALSO for n in [MAPS[0].replace("ADALORA", m)]}
# a layer's own class has one name wherever it is imported from; "Linear" has one a package
NAMES |= {
    name: ("interop.classes", f"{package}.{name}")
    for package, names in LAYER_NAMES.items()
    for name in names
    if name not in AROUND or (package == "lora" and name in QUANTISED)
}
# PEFT's question whether a package is installed -> the package
INSTALLED = {
    f"is_{package}_available": package
    for package in "aqlm diffusers eetq gptqmodel hqq optimum torchao".split()
}
INSTALLED |= {
    "is_inc_available": "neural_compressor",
    "is_te_available": "transformer_engine",
    "is_te_pytorch_available": "transformer_engine",
}
INSTALLED |= {"is_bnb_available": "bitsandbytes", "is_bnb_4bit_available": "bitsandbytes"}
NAMES |= {name: ("interop.shims", name) for name in INSTALLED}

# names of PEFT's inner works that have no counterpart, by what a program does instead
_REFUSED = {
    "graftwork has one host for all layers and chooses it itself: get_peft_model(model, config)": (
        "dispatch_aqlm dispatch_awq dispatch_default dispatch_eetq dispatch_gptq dispatch_hqq "
        "dispatch_inc dispatch_megatron dispatch_torchao dispatch_transformer_engine "
        "is_gptqmodel_awq_layer is_gptqmodel_quant_linear get_gptqmodel_quant_linear "
        "Bnb4bitBackend Bnb8bitBackend ForwardOnlyQuantizationBackend HqqBackend "
        "QuantizationBackend TorchaoBackend LayerType Configs Layers convert_layers_to_xlora "
        "replicate_layers DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer DoraEmbeddingLayer "
        "DoraLinearLayer cache_decorator ArrowLoraLinearLayer LoraEmbeddingATPHolder "
        "find_parameter_name_by_module"
    ),
    "the mathematics of a method is one class of graftwork.methods, with fold and forward; see "
    "docs/custom-methods.md": (
        "LoraVariant ALoraLinearVariant ArrowLinearVariant BdLoraLinearVariant "
        "BlockDiagonalLinear DoraConv1dVariant DoraConv2dVariant DoraConv3dVariant "
        "DoraEmbeddingVariant DoraLinearVariant KasaLinearVariant MiCAEmbeddingVariant "
        "MiCALinearVariant MontecloraLinearVariant QALoraLinearVariant VeloraLinearVariant "
        "VeloraFunction BufferedMontecloraSampler MontecloraSampler calculate_alora_offsets "
        "is_alora_relevant_in_batch get_alora_offsets_for_forward get_alora_offsets_for_generate "
        "FastBlockDiag MultiplicativeDropoutLayer get_fbd_cuda patch_environment "
        "BlockCircularConvolution get_circulant_fast fft ifft GloraEmptyPath GloraLoraPath "
        "GloraPath GloraScalarPath GloraVectorPath HadaWeight HadaWeightCP make_weight "
        "make_weight_cp factorization make_kron OFTRotationModule OrthLayer UniqueBaseGrad "
        "clustering_Z seg_locations slice_pca get_trainable_subspaces RankAllocator "
        "get_router PolyRouter Router decompose_weight_matrix "
        "project_gradient_to_orthogonal_space Wavelet wavelist waverec2d minimal_wavelet "
        "WAVELET_REDUCTIONS WaveletCoeff2d WaveletCoeffNd WaveletDetailDict WaveletDetailTuple2d "
        "WaveletTensorTuple Number TemperatureScaledSoftmax XLoraClassifier ACT2FN "
        "DetachedShadowModel ShadowCache ShadowCarrier DetachedFluxShadowModel "
        "DiffusionShadowBackend Flux2ShadowBackend freeze_flux_stem_embeddings "
        "get_diffusion_shadow_backend validate_pretrained_flux_shadow AdaptedAttentionGPT "
        "ModelTypeConfig TRANSFORMERS_MODEL_CONFIG gpt2_compute_query_states "
        "llama_compute_query_states llama_apply_rotary_pos_emb llama_rotate_half prepare_config "
        "is_adaption_prompt_trainable BasePromptEncoder create_attention_mask"
    ),
    "initialize_lora_eva_weights, preprocess_corda, preprocess_loraga and init_lora_weights do it "
    "as a whole": (
        "HashHook SVDHook IncrementalPCA UNSUPPORTED_LORA_MODULES find_equal_values "
        "get_device_with_meta_params move_inputs_to_device estimate_gradients get_model_device "
        "get_target_modules loftq_init"
    ),
    "model.load_adapter and load_peft_weights align a file's names with the model's themselves": (
        "FlattenDims PeftConcatenate PermuteDims build_peft_weight_mapping "
        "convert_peft_adapter_state_dict_for_transformers file_exists"
    ),
    "saving gathers what is sharded": (
        "TpInfo add_lora_tp_hooks_dtensor get_tp_plan_and_mesh dtensor_from_local_like"
    ),
    "no code from config files is imported": (
        "check_import_allowlist get_default_import_allowlist get_default_module_allowlist"
    ),
    "model.adapters() shows the update of each layer, resize_adapter makes it smaller": (
        "reduce_intruder_dimension"
    ),
    "add_weighted_adapter checks it": (
        "check_loaded_lora_compatibility_arrow ensure_adapters_target_linear_layers_only"
    ),
    "it is a text of a warning": "warn_msg_weight_tying",
    "torch.load(path, weights_only=True) does it": "torch_load",
}
REFUSED = {name: why for why, names in _REFUSED.items() for name in names.split()}
