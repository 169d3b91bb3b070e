"""What ``from peft import *`` and its kin give: PEFT's modules and their ``__all__``."""

from __future__ import annotations

# module below peft -> its names; utils and utils.other also have the maps of target_modules
_EXPORTS = {
    "": "AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig "
    "AdaptionPromptModel ArrowConfig AutoPeftModel AutoPeftModelForCausalLM "
    "AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
    "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
    "AutoPeftModelForTokenClassification BOFTConfig BOFTModel BdLoraConfig BeftConfig "
    "BeftModel C3AConfig C3AModel CPTConfig CPTEmbedding CartridgeConfig CartridgeEncoder "
    "DeftConfig DeftModel DeloraConfig DeloraModel EvaConfig FourierFTConfig "
    "FourierFTModel FrodConfig FrodModel GloraConfig GloraModel GraloraConfig "
    "GraloraModel HRAConfig HRAModel HiraConfig HiraModel IA3Config IA3Model KasaConfig "
    "LNTuningConfig LNTuningModel LilyConfig LilyModel LoHaConfig LoHaModel LoKrConfig "
    "LoKrModel LoftQConfig LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig "
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING MissConfig MissModel MontecloraConfig "
    "MultitaskPromptTuningConfig MultitaskPromptTuningInit NoMatchingPeftModuleError "
    "OFTConfig OFTModel OSFConfig OSFModel PEFT_TYPE_TO_CONFIG_MAPPING "
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PeanutConfig PeanutModel "
    "PeftConfig PeftError PeftMixedModel PeftModel PeftModelForCausalLM "
    "PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
    "PeftModelForSequenceClassification PeftModelForTokenClassification PeftType "
    "PeftWarning PolyConfig PolyModel PrefixEncoder PrefixTuningConfig PromptEmbedding "
    "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType "
    "PromptLearningConfig PromptTuningConfig PromptTuningInit PsoftConfig PsoftModel "
    "PveraConfig PveraModel RandLoraConfig RandLoraModel RoadConfig RoadModel "
    "ShadowConfig ShadowModel ShiraConfig ShiraModel SupertuningConfig SupertuningModel "
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TaskType TinyLoraConfig "
    "TinyLoraModel TrainableTokensConfig TrainableTokensModel UniLoraConfig UniLoraModel "
    "VBLoRAConfig VBLoRAModel VeloraConfig VeraConfig VeraModel WaveFTConfig WaveFTModel "
    "XLoraConfig XLoraModel bloom_model_postprocess_past_key_value "
    "cast_mixed_precision_params compose_cartridge_adapters convert_to_lora "
    "create_arrow_model find_kappa_target_modules get_base_model_state_dict "
    "get_eva_state_dict get_layer_status get_model_status get_peft_config get_peft_model "
    "get_peft_model_state_dict initialize_kv_prefix_from_past_key_values "
    "initialize_kv_prefix_from_text initialize_lora_eva_weights inject_adapter_in_model "
    "load_peft_weights prepare_model_for_kbit_training preprocess_loraga "
    "prompt_embeddings_from_past_key_values replace_lora_weights_loftq save_as_lora "
    "set_base_model_state_dict set_peft_model_state_dict shift_tokens_right",
    "functional": "cast_adapter_dtype delete_adapter get_peft_model_state_dict "
    "inject_adapter_in_model "
    "set_adapter set_peft_model_state_dict set_requires_grad",
    "optimizers": "create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer",
    "tuners": "AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig "
    "AdaptionPromptModel ArrowConfig BOFTConfig BOFTModel BdLoraConfig BeftConfig "
    "BeftModel C3AConfig C3AModel CPTConfig CPTEmbedding CartridgeConfig CartridgeEncoder "
    "DeftConfig DeftModel DeloraConfig DeloraModel EvaConfig FourierFTConfig "
    "FourierFTModel FrodConfig FrodModel GloraConfig GloraModel GraloraConfig "
    "GraloraModel HRAConfig HRAModel HiraConfig HiraModel IA3Config IA3Model KasaConfig "
    "LNTuningConfig LNTuningModel LilyConfig LilyModel LoHaConfig LoHaModel LoKrConfig "
    "LoKrModel LoftQConfig LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig MissConfig "
    "MissModel MixedModel MontecloraConfig MultitaskPromptEmbedding "
    "MultitaskPromptTuningConfig MultitaskPromptTuningInit OFTConfig OFTModel OSFConfig "
    "OSFModel PeanutConfig PeanutModel PolyConfig PolyModel PrefixEncoder "
    "PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig "
    "PromptEncoderReparameterizationType PromptTuningConfig PromptTuningInit PsoftConfig "
    "PsoftModel PveraConfig PveraModel RandLoraConfig RandLoraModel RoadConfig RoadModel "
    "ShadowConfig ShadowModel ShiraConfig ShiraModel SupertuningConfig SupertuningModel "
    "TinyLoraConfig TinyLoraModel TrainableTokensConfig TrainableTokensModel "
    "UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel VeloraConfig VeraConfig "
    "VeraModel WaveFTConfig WaveFTModel XLoraConfig XLoraModel convert_to_lora "
    "create_arrow_model get_eva_state_dict initialize_lora_eva_weights preprocess_loraga "
    "save_as_lora",
    "tuners.adalora": "AdaLoraConfig AdaLoraLayer AdaLoraModel RankAllocator SVDConv2d SVDLinear "
    "SVDQuantLinear",
    "tuners.adamss": "AdamssConfig AdamssLayer AdamssModel Linear",
    "tuners.adaption_prompt": "AdaptedAttention AdaptionPromptConfig AdaptionPromptModel",
    "tuners.beft": "BeftConfig BeftLayer BeftModel Linear",
    "tuners.boft": "BOFTConfig BOFTLayer BOFTModel",
    "tuners.c3a": "C3AConfig C3ALayer C3ALinear C3AModel",
    "tuners.cartridge": "CartridgeConfig CartridgeEncoder",
    "tuners.cpt": "CPTConfig CPTEmbedding",
    "tuners.deft": "DeftConfig DeftLayer DeftLinear DeftModel",
    "tuners.delora": "DeloraConfig DeloraLayer DeloraLinear DeloraModel",
    "tuners.fourierft": "FourierFTConfig FourierFTLayer FourierFTLinear FourierFTModel",
    "tuners.frod": "FrodConfig FrodLayer FrodModel Linear",
    "tuners.glora": "GloraConfig GloraLayer GloraLinear GloraModel",
    "tuners.gralora": "GraloraConfig GraloraLayer GraloraModel",
    "tuners.hira": "Conv2d Conv3d Embedding HiraConfig HiraLayer HiraModel Linear",
    "tuners.hra": "HRAConfig HRAConv2d HRALayer HRALinear HRAModel",
    "tuners.ia3": "Conv2d Conv3d IA3Config IA3Layer IA3Model Linear",
    "tuners.lily": "LilyConfig LilyLayer LilyModel Linear",
    "tuners.ln_tuning": "LNTuningConfig LNTuningModel",
    "tuners.loha": "Conv2d Linear LoHaConfig LoHaLayer LoHaModel",
    "tuners.lokr": "Conv2d Linear LoKrConfig LoKrLayer LoKrModel",
    "tuners.lora": "ArrowConfig BdLoraConfig Conv2d Conv3d Embedding EvaConfig "
    "GPTQLoraLinear KasaConfig "
    "Linear LoftQConfig LoraConfig LoraGAConfig LoraLayer LoraModel LoraRuntimeConfig "
    "MontecloraConfig ParamWrapper VeloraConfig convert_to_lora create_arrow_model "
    "get_eva_state_dict initialize_lora_eva_weights preprocess_loraga save_as_lora",
    "tuners.miss": "MissConfig MissLayer MissLinear MissModel",
    "tuners.mixed": "COMPATIBLE_TUNER_TYPES MixedModel",
    "tuners.multitask_prompt_tuning": "MultitaskPromptEmbedding MultitaskPromptTuningConfig "
    "MultitaskPromptTuningInit",
    "tuners.oft": "Conv2d Embedding Linear OFTConfig OFTLayer OFTModel",
    "tuners.osf": "Linear OSFConfig OSFLayer OSFModel",
    "tuners.osf.utils": "decompose_weight_matrix project_gradient_to_orthogonal_space",
    "tuners.p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
    "tuners.peanut": "Linear PeanutConfig PeanutLayer PeanutModel",
    "tuners.poly": "Linear PolyConfig PolyLayer PolyModel",
    "tuners.prefix_tuning": "PrefixEncoder PrefixTuningConfig",
    "tuners.prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
    "tuners.psoft": "Linear PsoftConfig PsoftLayer PsoftModel",
    "tuners.pvera": "Linear PveraConfig PveraLayer PveraModel",
    "tuners.randlora": "Linear RandLoraConfig RandLoraLayer RandLoraModel",
    "tuners.road": "Linear RoadConfig RoadLayer RoadModel",
    "tuners.shadow": "DetachedShadowModel ShadowCache ShadowCarrier ShadowConfig ShadowLayer "
    "ShadowModel",
    "tuners.shira": "Linear ShiraConfig ShiraLayer ShiraModel",
    "tuners.supertuning": "Linear SupertuningConfig SupertuningLayer SupertuningModel",
    "tuners.tinylora": "Embedding Linear TinyLoraConfig TinyLoraLayer TinyLoraModel",
    "tuners.trainable_tokens": "TrainableTokensConfig TrainableTokensLayer TrainableTokensModel",
    "tuners.unilora": "Linear UniLoraConfig UniLoraLayer UniLoraModel",
    "tuners.vblora": "Linear VBLoRAConfig VBLoRALayer VBLoRAModel",
    "tuners.vera": "Linear VeraConfig VeraLayer VeraModel",
    "tuners.waveft": "WaveFTConfig WaveFTLayer WaveFTLinear WaveFTModel",
    "tuners.xlora": "XLoraConfig XLoraModel",
    "utils": "ALLOWED_COMPUTE_DTYPES AuxiliaryTrainingWrapper CONFIG_NAME "
    "INCLUDE_LINEAR_LAYERS_SHORTHAND ModulesToSaveWrapper NoMatchingPeftModuleError "
    "PeftError PeftType PeftWarning SAFETENSORS_WEIGHTS_NAME "
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING "
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TaskType "
    "TrainableTokensWrapper UPCAST_DTYPES WEIGHTS_NAME _freeze_adapter _get_batch_size "
    "_get_input_embeddings_name _get_submodules _is_valid_match "
    "_prepare_prompt_learning_config _set_adapter _set_trainable "
    "bloom_model_postprocess_past_key_value cast_mixed_precision_params "
    "get_base_model_state_dict get_gptqmodel_quant_linear get_peft_model_state_dict "
    "get_quantization_config get_quantization_kwargs id_tensor_storage infer_device "
    "load_peft_weights map_cache_to_layer_device_map prepare_model_for_kbit_training "
    "quantization_extra_repr register_peft_method replace_lora_weights_loftq "
    "resolve_quantization_backend set_additional_trainable_modules "
    "set_base_model_state_dict set_peft_model_state_dict shift_tokens_right transpose",
    "utils.other": "CONFIG_NAME EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND "
    "SAFETENSORS_WEIGHTS_NAME TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING "
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING WEIGHTS_NAME "
    "bloom_model_postprocess_past_key_value starcoder_model_postprocess_past_key_value",
}
_MAPS = (
    "ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HRA IA3 LILY "
    "LNTUNING LOHA LOKR LORA MISS OFT PEANUT POLY PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING "
    "TINYLORA UNILORA VBLORA VERA WAVEFT"
).split()
MAPS = [f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING" for name in _MAPS]
EXPORTS = {f"peft.{m}".rstrip("."): names.split() for m, names in _EXPORTS.items()}
for _module in ("peft.utils", "peft.utils.other"):
    EXPORTS[_module] = sorted([*EXPORTS[_module], *MAPS])
# package of peft.tuners -> its modules
_TUNERS = (
    "_buffer_dict adalora:bnb,config,gptq,layer,model "
    "adamss:asa_callback,config,layer,model,utils adaption_prompt:config,layer,model,utils "
    "beft:config,layer,model boft:config,fbd,layer,model c3a:config,layer,model,utils "
    "cartridge:config,model,utils cpt:config,model deft:config,layer,model "
    "delora:config,layer,model fourierft:config,layer,model frod:config,layer,model "
    "glora:config,layer,model gralora:config,layer,model hira:bnb,config,layer,model "
    "hra:config,layer,model ia3:bnb,config,layer,model lily:config,layer,model "
    "ln_tuning:config,layer,model loha:config,layer,model lokr:config,layer,model "
    "lora:aqlm,arrow,awq,bnb,config,conversion,corda,dora,eetq,eva,gptq,hqq,inc,intruders,layer,loraga,"
    "model,monteclora,te,torchao,tp_layer,variants,velora lycoris_utils "
    "miss:config,layer,model mixed:model multitask_prompt_tuning:config,model "
    "oft:config,layer,model osf:config,layer,model,utils p_tuning:config,model "
    "peanut:config,layer,model poly:config,layer,model,router prefix_tuning:config,model "
    "prompt_tuning:config,model psoft:config,layer,model pvera:bnb,config,layer,model "
    "randlora:bnb,config,layer,model road:bnb,config,layer,model "
    "shadow:config,diffusion_models,layers,model shira:config,layer,mask_functions,model "
    "supertuning:config,layer,model tinylora:config,layer,model "
    "trainable_tokens:config,layer,model tuners_utils unilora:config,layer,model "
    "vblora:config,layer,model vera:config,layer,model "
    "waveft:config,constants,layer,model,wavelet,waverec2d "
    "xlora:classifier,config,layer,model"
).split()
MODULES = {
    *"peft peft.auto peft.config peft.functional peft.helpers peft.import_utils".split(),
    "peft.mapping",
    *"peft.mapping_func peft.mixed_model peft.optimizers peft.optimizers.lorafa".split(),
    *"peft.optimizers.loraplus peft.optimizers.riemannian peft.peft_model peft.tuners".split(),
    *"peft.utils peft.utils.constants peft.utils.error peft.utils.hotswap".split(),
    *"peft.utils.incremental_pca peft.utils.integrations peft.utils.loftq_utils".split(),
    *"peft.utils.merge_utils peft.utils.other peft.utils.peft_types".split(),
    *"peft.utils.quantization_utils peft.utils.save_and_load".split(),
    *"peft.utils.transformers_weight_conversion peft.utils.warning".split(),
}
for _package in _TUNERS:
    _name, _, _modules = _package.partition(":")
    MODULES.add(f"peft.tuners.{_name}")
    MODULES |= {f"peft.tuners.{_name}.{m}" for m in _modules.split(",") if m}
