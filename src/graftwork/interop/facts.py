"""What PEFT's layers show, method by method: facts of its surface, which programs name.

Of each name: M a ModuleDict, P a ParameterDict, B a BufferDict, by adapter; without a letter a
dictionary of values by adapter.
"""

from __future__ import annotations

# method -> adapter_layer_names | other_param_names | further names
_LAYERS = {
    "ADALORA": "lora_A:P lora_B:P lora_E:P lora_embedding_A:P lora_embedding_B:P | "
    "r lora_alpha scaling lora_dropout:M ranknum:P | "
    "lora_magnitude_vector:M use_dora use_rslora lora_bias",
    "ADAMSS": "adamss_A:M adamss_B:M | num_subspaces train_subspace_index seg_result scatter_index "
    "exp_avg_ipt_A exp_avg_ipt_B exp_avg_unc_A exp_avg_unc_B adamss_newB:B |",
    "BEFT": "beft_bias:P | |",
    "BOFT": "boft_R:P boft_s:P | boft_block_size boft_block_num boft_dropout:M |",
    "C3A": "c3a_kernel:P | block_size |",
    "DEFT": "deft_P:P deft_R:P | deft_r deft_decomposition deft_init_scale deft_para deft_scaling "
    "deft_dropout:M _cached_merge_factor:B |",
    "DELORA": "delora_A:P delora_B:P delora_lambda:P | r delora_dropout:M delora_w_norm:B |",
    "FOURIERFT": "fourierft_spectrum:P | fourierft_n_frequency fourierft_scaling "
    "fourierft_random_loc_seed indices |",
    "FROD": "frod_lambda_l:P frod_lambda_s_values:P | r frod_V frod_U frod_s_indices frod_s_size "
    "runtime_offload_base_weight frod_dropout:M |",
    "GLORA": "glora_A:M glora_B:M glora_C:M glora_D:M glora_E:M | r |",
    "GRALORA": "gralora_A:P gralora_B:P gralora_A_general:M gralora_B_general:M | "
    "r hybrid_r alpha scaling gralora_dropout:M gralora_k |",
    "HIRA": "hira_A:P hira_B:P hira_embedding_A:P hira_embedding_B:P | r hira_dropout:M |",
    "HRA": "hra_u:P | hra_r hra_apply_GS |",
    "IA3": "ia3_l:P | |",
    "LILY": "lily_A:M lily_B:M lily_router:M | r scaling stride_A num_B |",
    "LN_TUNING": "ln_tuning_layers:M | |",
    "LOHA": "hada_w1_a:P hada_w1_b:P hada_w2_a:P hada_w2_b:P hada_t1:P hada_t2:P | "
    "r alpha scaling rank_dropout rank_dropout_scale module_dropout |",
    "LOKR": "lokr_w1:P lokr_w1_a:P lokr_w1_b:P lokr_w2:P lokr_w2_a:P lokr_w2_b:P lokr_t2:P | "
    "r alpha scaling rank_dropout rank_dropout_scale module_dropout |",
    "LORA": "lora_A:M lora_B:M lora_embedding_A:P lora_embedding_B:P lora_magnitude_vector:M | "
    "r lora_alpha scaling lora_dropout:M use_dora use_rslora lora_bias |",
    "MISS": "miss_block:P | miss_r miss_dropout:M miss_mini_r |",
    "OFT": "oft_R:M oft_embedding_R:M | r oft_block_size oft_dropout:M |",
    "OSF": "osf_svd_params:M | _osf_U_low_init _osf_S_low_init _osf_V_low_init _osf_U_high "
    "_osf_V_high effective_rank |",
    "PEANUT": "peanut_A:M peanut_B:M peanut_encoders:M peanut_decoders:M | "
    "r depth scaling act_fn res_num |",
    "POLY": "poly_lora_A:P poly_lora_B:P poly_router:M | r n_tasks n_skills n_splits poly_type |",
    "PSOFT": "psoft_R:M | r psoft_alpha scaling psoft_dropout:M psoft_svd psoft_svd_lowrank_niter "
    "random_seed ab_svd_init _psoft_A_cache _psoft_B_cache |",
    "PVERA": "pvera_lambda_b:P pvera_lambda_d:P | "
    "pvera_A:B pvera_B:B pvera_dropout:M r sample_at_inference pvera_generator |",
    "RANDLORA": "randlora_lambda:P randlora_gamma:P | "
    "randlora_A:B randlora_B:B randlora_dropout:M r scaling |",
    "ROAD": "road_theta:P road_alpha:P | variant group_size |",
    "SHADOW": "| |",
    "SHIRA": "shira_weight:P | r scaling shira_indices |",
    "SUPERTUNING": "supertuning_values:P supertuning_lora_A:M supertuning_lora_B:M | "
    "supertuning_indices:B supertuning_rank supertuning_lora_alpha supertuning_lora_dropout:M |",
    "TINYLORA": "tinylora_v:M | tinylora_A:B tinylora_B:B tinylora_P:B | tinylora_dropout:M r u",
    "TRAINABLE_TOKENS": "trainable_tokens_delta:P | token_indices trainable_tokens_original |",
    "UNILORA": "unilora_theta_d:P | r unilora_indices_A:B unilora_indices_B:B unilora_scales_A:B "
    "unilora_scales_B:B unilora_dropout:M |",
    "VBLORA": "vblora_logits_A:P vblora_logits_B:P vblora_vector_bank:P | "
    "r topk vblora_dropout:M |",
    "VERA": "vera_lambda_b:P vera_lambda_d:P | vera_A:B vera_B:B vera_dropout:M r |",
    "WAVEFT": "waveft_spectrum:P | waveft_n_frequency waveft_scaling waveft_random_loc_seed "
    "waveft_wavelet_family waveft_indices waveft_use_idwt |",
}


def _parted(text: str) -> tuple[dict[str, str], ...]:
    """The three groups of names, each with its letter or nothing."""
    groups = (group.split() for group in text.split("|"))
    return tuple({n: kind for n, _, kind in (w.partition(":") for w in g)} for g in groups)


# method -> what is trained, what is not, what else is there: name -> M, P, B or nothing
LAYERS = {method: _parted(text) for method, text in _LAYERS.items()}
# every name with its letter, where methods agree on it or one alone has it
SHOWN: dict[str, set[str]] = {}
for _method, _groups in LAYERS.items():
    for _group in _groups:
        for _name in _group:
            SHOWN.setdefault(_name, set()).add(_method)

# what the names of a method's tensors begin with, where it is not the method's own name
PREFIX = {
    "ADALORA": "lora_",
    "LOHA": "hada_",
    "VERA": "vera_lambda_",
    "PVERA": "pvera_lambda_",
}


def prefix_of(method: str) -> str:
    """What the names of a method's tensors begin with."""
    return PREFIX.get(method, f"{method.lower()}_")


def kinds_of(method: str) -> dict[str, str]:
    """The names that a method's layers show, with their letters."""
    return {n: kind for group in LAYERS.get(method, ()) for n, kind in group.items()}


QUANTISED = {  # PEFT's class -> the classes of the layers that it wraps
    "Linear8bitLt": "Linear8bitLt",
    "Linear4bit": "Linear4bit",
    "QuantLinear": "BaseQuantLinear",
    "GPTQLoraLinear": "BaseQuantLinear",
    "AqlmLoraLinear": "QuantizedLinear",
    "AwqLoraLinear": "AwqGEMMQuantLinear",
    "EetqLoraLinear": "EetqLinear",
    "HqqLoraLinear": "HQQLinear",
    "IncLoraLinear": "PatchedLinear",
    "LoraParallelLinear": "ColumnParallelLinear RowParallelLinear",
    "TorchaoLoraLinear": "TorchaoLinear",
    "TeLinear": "TeLinear",
}
AROUND = {
    "_ConvNd": "Conv1d Conv2d Conv3d",
    "Conv1d": "Conv1d",
    "Conv2d": "Conv2d",
    "Conv3d": "Conv3d",
    "Embedding": "Embedding",
    "MultiheadAttention": "MultiheadAttention",
    "ParamWrapper": "",
    **QUANTISED,
    "Linear": "Linear Conv1D",
}
# package of peft.tuners -> its base class and the others
LAYER_NAMES = {
    package: names.split()
    for package, names in {
        "adalora": "AdaLoraLayer SVDLinear SVDConv2d SVDQuantLinear SVDLinear8bitLt SVDLinear4bit",
        "adamss": "AdamssLayer Linear",
        "beft": "BeftLayer Linear",
        "boft": "BOFTLayer Linear Conv2d",
        "c3a": "C3ALayer C3ALinear",
        "deft": "DeftLayer DeftLinear",
        "delora": "DeloraLayer DeloraLinear",
        "fourierft": "FourierFTLayer FourierFTLinear",
        "frod": "FrodLayer Linear",
        "glora": "GloraLayer GloraLinear",
        "gralora": "GraloraLayer Linear",
        "hira": "HiraLayer Linear Embedding _ConvNd Conv1d Conv2d Conv3d Linear8bitLt Linear4bit",
        "hra": "HRALayer HRALinear HRAConv2d",
        "ia3": "IA3Layer Linear _ConvNd Conv2d Conv3d Linear8bitLt Linear4bit",
        "lily": "LilyLayer Linear",
        "ln_tuning": "LNTuningLayer",
        "loha": "LoHaLayer Linear Conv1d Conv2d",
        "lokr": "LoKrLayer Linear Conv1d Conv2d",
        "lora": "LoraLayer Linear Embedding _ConvNd Conv1d Conv2d Conv3d MultiheadAttention "
        "ParamWrapper Linear8bitLt Linear4bit GPTQLoraLinear AqlmLoraLinear AwqLoraLinear "
        "EetqLoraLinear HqqLoraLinear IncLoraLinear LoraParallelLinear TorchaoLoraLinear TeLinear",
        "miss": "MissLayer MissLinear",
        "oft": "OFTLayer Linear Conv2d Embedding",
        "osf": "OSFLayer Linear",
        "peanut": "PeanutLayer Linear",
        "poly": "PolyLayer Linear",
        "psoft": "PsoftLayer Linear",
        "pvera": "PveraLayer Linear Linear8bitLt Linear4bit",
        "randlora": "RandLoraLayer Linear Linear8bitLt Linear4bit",
        "road": "RoadLayer Linear Linear8bitLt Linear4bit",
        "shadow": "ShadowLayer",
        "shira": "ShiraLayer Linear",
        "supertuning": "SupertuningLayer Linear",
        "tinylora": "TinyLoraLayer Linear Embedding",
        "trainable_tokens": "TrainableTokensLayer",
        "unilora": "UniLoraLayer Linear",
        "vblora": "VBLoRALayer Linear",
        "vera": "VeraLayer Linear",
        "waveft": "WaveFTLayer WaveFTLinear",
        "xlora": "XLoraLayer XLoraLinearLayer XLoraEmbeddingLayer XLoraConv2dLayer",
    }.items()
}
