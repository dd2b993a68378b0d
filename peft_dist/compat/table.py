"""HF PEFT 0.21's layout for the methods that are here: its modules, and where each public name is at home."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


_TUNERS = {
    "adalora": "bnb config gptq layer model",
    "adaption_prompt": "config layer model utils",
    "boft": "config fbd layer model",
    "c3a": "config layer model utils",
    "cpt": "config model",
    "delora": "config layer model",
    "fourierft": "config layer model",
    "gralora": "config layer model",
    "hra": "config layer model",
    "ia3": "bnb config layer model",
    "ln_tuning": "config layer model",
    "loha": "config layer model",
    "lokr": "config layer model",
    "lora": (
        "aqlm arrow awq bnb config conversion corda dora eetq eva gptq hqq inc intruders layer loraga model "
        "monteclora te torchao tp_layer variants velora"
    ),
    "miss": "config layer model",
    "mixed": "model",
    "multitask_prompt_tuning": "config model",
    "oft": "config layer model",
    "osf": "config layer model utils",
    "p_tuning": "config model",
    "poly": "config layer model router",
    "prefix_tuning": "config model",
    "prompt_tuning": "config model",
    "randlora": "bnb config layer model",
    "road": "bnb config layer model",
    "shira": "config layer mask_functions model",
    "trainable_tokens": "config layer model",
    "vblora": "config layer model",
    "vera": "config layer model",
    "waveft": "config constants layer model wavelet waverec2d",
    "xlora": "classifier config layer model",
}
_UTILS = (
    "constants error hotswap incremental_pca integrations loftq_utils merge_utils other peft_types "
    "quantization_utils save_and_load transformers_weight_conversion warning"
)
# Every module but the ones that are files of this package too (`auto`, `config`, `functional`).
PATHS = frozenset(
    [
        "auto",
        "config",
        "functional",
        "helpers",
        "import_utils",
        "mapping",
        "mapping_func",
        "mixed_model",
        "optimizers",
        "optimizers.lorafa",
        "optimizers.loraplus",
        "optimizers.riemannian",
        "peft_model",
        "tuners",
        "tuners._buffer_dict",
        "tuners.lycoris_utils",
        "tuners.tuners_utils",
        "utils",
        *(f"utils.{name}" for name in _UTILS.split()),
        *(f"tuners.{folder}" for folder in _TUNERS),
        *(f"tuners.{folder}.{name}" for folder, names in _TUNERS.items() for name in names.split()),
    ]
)
# Folders whose classes of layers stand for a method.
LAYERS_IN = frozenset(folder for folder, names in _TUNERS.items() if "layer" in names.split()) - {
    "adaption_prompt",
    "xlora",
}

_TARGETS = {
    f"TRANSFORMERS_MODELS_TO_{name.replace('_', '')}_TARGET_MODULES_MAPPING": f"peft_dist.compat.targets:{name}"
    for name in _words(
        "ADALORA BOFT C3A DELORA FOURIERFT GRALORA HRA IA3 LN_TUNING LOHA LOKR LORA MISS OFT OSF POLY RANDLORA ROAD "
        "SHIRA VBLORA VERA WAVEFT"
    )
}
_MODELS = {
    name: f"peft_dist.tuner:{name}"
    for name in _words(
        "AdaLoraModel AdaptionPromptModel BOFTModel BoneModel C3AModel DeloraModel FourierFTModel GraloraModel "
        "HRAModel IA3Model LNTuningModel LoHaModel LoKrModel LoraModel MissModel OFTModel OSFModel PolyModel "
        "RandLoraModel RoadModel ShiraModel TrainableTokensModel VBLoRAModel VeraModel WaveFTModel XLoraModel"
    )
}


def _at(home: str, names: str) -> dict[str, str]:
    return {name: f"{home}:{name}" for name in names.split()}


# name -> `module:name` of its home; what is not here is a name of `peft_dist` itself.
PUBLIC: dict[str, str] = {
    **_TARGETS,
    **_MODELS,
    **_at("peft_dist.config", "CONFIG_NAME"),
    "__version__": "peft_dist.config:PEFT_VERSION",
    "PeftError": "peft_dist.errors:PeftDistError",
    "NoMatchingPeftModuleError": "peft_dist.errors:TargetError",
    "PeftWarning": "peft_dist.errors:AdapterWarning",
    **_at("peft_dist.tuner_layer", "BaseTunerLayer"),
    "LycorisLayer": "peft_dist.compat.classes:LycorisLayer",
    "LycorisConfig": "peft_dist.config:TargetedConfig",
    "LycorisTuner": "peft_dist.tuner:BaseTuner",
    "MixedModel": "peft_dist.tuner:BaseTuner",
    **_at(
        "peft_dist.compat.classes",
        "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper AdaptedAttention BufferDict "
        "MultiplicativeDropoutLayer RankAllocator SVDQuantLinear GPTQLoraLinear AqlmLoraLinear "
        "AwqLoraLinear TorchaoLoraLinear LoraParallelLinear XLoraLayer XLoraLinearLayer XLoraEmbeddingLayer "
        "XLoraConv2dLayer",
    ),
    **_at("peft_dist.prompt_encoders", "BasePromptEncoder"),
    **_at(
        "peft_dist.arithmetic.combine",
        "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_based_pruning magnitude_prune "
        "prune random_pruning reshape_weight_task_tensors task_arithmetic ties",
    ),
    **_at("peft_dist.calibration.incremental_pca", "IncrementalPCA"),
    **_at("peft_dist.arithmetic.intruders", "reduce_intruder_dimension"),
    **_at("peft_dist.lora_optimizers.lorafa", "create_lorafa_optimizer"),
    **_at("peft_dist.replicate", "replicate_layers"),
    **_at("peft_dist.methods.lora.loftq", "loftq_init"),
    **_at("peft_dist.calibration.eva", "forward_fn_dict prepare_layer_inputs_fn_language_modeling"),
    "prepare_model_inputs_fn_language_modeling": "peft_dist.calibration.eva:prepare_model_inputs_fn_language_modeling",
    **_at("peft_dist.functional", "cast_adapter_dtype delete_adapter set_adapter set_requires_grad"),
    **_at("peft_dist.status", "TunerLayerStatus TunerModelStatus get_layer_status get_model_status"),
    **_at("peft_dist.auto", "check_import_allowlist get_default_import_allowlist TOKENIZER_CONFIG_NAME"),
    **_at(
        "peft_dist.signatures",
        "check_if_peft_model update_forward_signature update_generate_signature update_signature",
    ),
    **_at(
        "peft_dist.scaling", "cast_mixed_precision_params disable_input_dtype_casting rescale_adapter_scale"
    ),
    **_at(
        "peft_dist.hotswap",
        "CONFIG_KEYS_TO_CHECK check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict "
        "prepare_model_for_compiled_hotswap",
    ),
    **_at(
        "peft_dist.compat.values",
        "ALLOWED_COMPUTE_DTYPES COMPATIBLE_TUNER_TYPES DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES "
        "INCLUDE_LINEAR_LAYERS_SHORTHAND MIN_TARGET_MODULES_FOR_OPTIMIZATION SAFETENSORS_WEIGHTS_NAME "
        "SEQ_CLS_HEAD_NAMES TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING UPCAST_DTYPES WEIGHTS_NAME "
        "bloom_model_postprocess_past_key_value starcoder_model_postprocess_past_key_value "
        "is_transformers_ge_v5 is_transformers_ge_v5_1_0 is_transformers_ge_v5_4_0 is_transformers_ge_v5_6_0 "
        "is_transformers_ge_v5_13_0 is_transformers_ge_v5_17_0 is_transformers_le_4_53",
    ),
    **_at(
        "peft_dist.compat.targets",
        "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING TRANSFORMERS_MODEL_CONFIG",
    ),
    **_at(
        "peft_dist.compat.functions",
        "DoraCaching check_target_module_exists create_attention_mask fsdp_auto_wrap_policy gather_params_ctx "
        "get_base_model_state_dict get_pattern_key get_quantization_config infer_device init_empty_weights "
        "is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available is_eetq_available "
        "is_gptqmodel_available is_hqq_available is_inc_available is_optimum_available is_te_available "
        "is_te_pytorch_available is_torch_tpu_available is_torchao_available is_xpu_available load_peft_weights "
        "match_target_against_key set_additional_trainable_modules set_base_model_state_dict shift_tokens_right "
        "torch_load transpose decompose_weight_matrix project_gradient_to_orthogonal_space replicate_layers "
        "build_peft_weight_mapping dequantize_module_weight prepare_config skip_init_on_device",
    ),
    **_at("peft_dist.compat.condition", "KappaTuneSelector find_kappa_target_modules"),
    **_at(
        "peft_dist.compat.submodules",
        "_freeze_adapter _get_batch_size _get_input_embeddings_name _get_submodules "
        "_get_submodules_with_grandparent _is_valid_match _prepare_prompt_learning_config _set_adapter "
        "_set_trainable check_adapters_to_merge get_embedding_layer_name has_valid_embedding_base_layer "
        "id_tensor_storage map_cache_to_layer_device_map",
    ),
}
_LATER = "this package does not have it. Leave it out, or train with HF PEFT and convert the adapter to LoRA there."
_LATER_ABOVE = _words(
    "ArrowConfig BdLoraConfig KasaConfig LoraGAConfig MontecloraConfig VeloraConfig create_arrow_model "
    "preprocess_loraga"
)
_LATER_BELOW = _words("MontecloraTrainerMixin MontecloraSampler create_riemannian_optimizer")
# Names that programs import and that say so when they are used.
REFUSED = {
    **dict.fromkeys([*_LATER_ABOVE, *_LATER_BELOW], _LATER),
    **dict.fromkeys(
        _words(
            "get_gptqmodel_quant_linear get_quantization_kwargs quantization_extra_repr resolve_quantization_backend"
        ),
        "quantised layers are bitsandbytes' here. Load the base in 8 or 4 bits.",
    ),
}
# Of those, the names that `import peft` has itself.
TOP = frozenset(
    [
        *_words(
            "NoMatchingPeftModuleError PeftError PeftWarning __version__ bloom_model_postprocess_past_key_value "
            "cast_mixed_precision_params find_kappa_target_modules get_base_model_state_dict load_peft_weights "
            "set_base_model_state_dict shift_tokens_right TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING"
        ),
        *_MODELS,
        *_LATER_ABOVE,
    ]
)
