"""Axolotl's, LLaMA-Factory's and Hugging Face's names for our keys, and what to write for those that have none.

One table, one row per name; a test walks it. Each row maps its key, accepts the one value that says what is always
done here, or refuses the key with what to write instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import alias_changes as to
from .alias_changes import Change


@dataclass(frozen=True)
class Alias:
    """`name` at the top level. `target` None: refused with `instead`, unless the value is in `accepts`."""

    name: str
    target: str | None = None
    change: Change | None = None
    instead: str = ""
    accepts: tuple[Any, ...] = ()


def _maps(target: str, *names: str, change: Change | None = None) -> list[Alias]:
    return [Alias(name, target, change) for name in names]


def _refused(instead: str, *names: str, accepts: tuple[Any, ...] = ()) -> list[Alias]:
    return [Alias(name, instead=instead, accepts=accepts) for name in names]


_ALWAYS = "Remove it: it is so by itself."
_KERNELS = "Remove it: the attention kernel is chosen by torch."
_DATASET_FILES = "Write data.datasets: [{path: FILE.jsonl, type: chat}]; path is the file itself."
_LOGS = "Remove it: progress is printed as it comes, and kept in the run's folder."
_TOKENIZER = "Remove it: the base's own tokenizer and chat template are used."
_LOADER = "Remove it: rows are prepared once, by the worker that reads them."
_RESUME = "Remove it: the same job run again goes on from its last good checkpoint."
_SHARDING = "Write deepspeed: zero2 or zero3."
_HUB = "Remove it: the adapter is registered as register.name; raypeft pull brings it as a PEFT directory."
_METHODS = "Remove it: only the adapter's loss on the answers is trained here."
_OWN_LOOP = "Remove it: this has no counterpart here."

ROWS: tuple[Alias, ...] = (
    # the base
    *_maps("model.base_model", "base_model", "model_name_or_path", "model_id"),
    *_maps("model.revision", "revision_of_model", "model_revision"),
    *_maps("model.trust_remote_code", "trust_remote_code"),
    *_maps("model.load_in_8bit", "load_in_8bit"),
    *_maps("model.load_in_4bit", "load_in_4bit", "quantization_bit"),
    *_maps("model.bnb_4bit_quant_type", "bnb_4bit_quant_type", "quantization_type"),
    *_maps("model.bnb_4bit_use_double_quant", "bnb_4bit_use_double_quant", "double_quantization"),
    *_maps("model.bnb_4bit_compute_dtype", "bnb_4bit_compute_dtype", change=to.dtype),
    *_maps("model.bnb_4bit_quant_storage", "bnb_4bit_quant_storage", change=to.dtype),
    Alias("bnb_config_kwargs", "model"),
    *_refused(
        "Remove it: bits are those of bitsandbytes.",
        "quantization_method",
        accepts=("bnb", "bitsandbytes", "BNB"),
    ),
    *_refused("Remove it: each worker's part of the base is on its own device.", "quantization_device_map"),
    *_refused(
        "Write model.load_in_4bit or load_in_8bit; a base saved by GPTQ is not read.",
        "gptq",
        accepts=(False,),
    ),
    *_refused(_TOKENIZER, "model_type", "tokenizer_type", "tokenizer_config", "tokenizer_use_fast"),
    *_refused(_TOKENIZER, "use_fast_tokenizer", "special_tokens", "tokens", "resize_vocab", "add_tokens"),
    *_refused(_TOKENIZER, "template", "chat_template_jinja", "default_system_message", "base_model_config"),
    *_refused(_TOKENIZER, "chat_template", accepts=("tokenizer_default",)),
    *_refused("Remove it: set HF_HOME where the hub's cache should be elsewhere.", "cache_dir"),
    *_refused("Write secrets: {HF_TOKEN: env}.", "hf_hub_token", "hub_token", "hf_use_auth_token"),
    # the adapter
    *_maps("adapter.type", "finetuning_type", change=to.finetuning_type),
    *_maps("adapter.type", "peft_type", change=to.adapter_type),
    *_maps("adapter.r", "lora_r", "lora_rank"),
    *_maps("adapter.lora_alpha", "lora_alpha"),
    *_maps("adapter.lora_dropout", "lora_dropout"),
    *_maps("adapter.target_modules", "lora_target_modules", "lora_target", change=to.names),
    *_maps("adapter.target_modules", "lora_target_linear", change=to.all_linear),
    *_maps("adapter.modules_to_save", "lora_modules_to_save", "additional_target", change=to.list_of_names),
    *_maps("adapter.fan_in_fan_out", "lora_fan_in_fan_out"),
    *_maps("adapter.bias", "lora_bias"),
    *_maps("adapter.use_rslora", "use_rslora", "peft_use_rslora"),
    *_maps("adapter.use_dora", "use_dora", "peft_use_dora"),
    *_maps("adapter.init_lora_weights", "pissa_init", change=to.pissa),
    *_maps("adapter.init_lora_weights", "peft_init_lora_weights", "init_lora_weights"),
    *_maps("adapter.layers_to_transform", "peft_layers_to_transform"),
    *_maps("adapter.layers_pattern", "peft_layers_pattern"),
    *_maps("adapter.init_from", "lora_model_dir", "adapter_name_or_path"),
    *_refused(_OWN_LOOP, "loraplus_lr_ratio", "loraplus_lr_embedding", "create_new_adapter", "lora_on_cpu"),
    *_refused(
        _OWN_LOOP, "relora", "relora_steps", "peft", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"
    ),
    *_refused("Write adapter.modules_to_save for layers that train in full.", "unfrozen_parameters"),
    # the data
    *_maps("data.datasets", "datasets"),
    *_maps("data.val_set_size", "val_set_size", "val_size"),
    *_maps("data.sequence_len", "sequence_len", "cutoff_len", "max_seq_length", "max_length"),
    *_maps("data.overlong", "excess_length_strategy", change=to.OVERLONG),
    *_maps("eval.datasets", "test_datasets"),
    *_maps("eval.max_new_tokens", "eval_max_new_tokens"),
    *_refused(_DATASET_FILES, "dataset", "dataset_dir", "train_file", "dataset_name", "pretraining_dataset"),
    *_refused("Write eval.datasets: [{path: FILE.jsonl, type: chat}].", "eval_dataset", "validation_file"),
    *_refused("Write eval.max_rows for the evaluation; cut the training file itself.", "max_samples"),
    *_refused("Remove it: only the answers' tokens are trained.", "train_on_inputs", accepts=(False,)),
    *_refused("Remove it: only the answers' tokens are trained.", "train_on_prompt", accepts=(False,)),
    *_refused("Remove it: every answer of a conversation is trained.", "mask_history", accepts=(False,)),
    *_refused(
        "Remove it: the order of rows follows from training.seed.", "group_by_length", accepts=(False,)
    ),
    *_refused("Remove it: rows of all datasets are mixed.", "shuffle_merged_datasets", accepts=(True,)),
    *_refused(_LOADER, "dataset_prepared_path", "preprocessing_num_workers", "dataloader_num_workers"),
    *_refused(
        _LOADER, "dataset_processes", "dataset_num_proc", "overwrite_cache", "streaming", "tokenized_path"
    ),
    *_refused(_LOADER, "dataloader_pin_memory", "dataloader_prefetch_factor", "skip_prepare_dataset"),
    *_refused(
        _OWN_LOOP, "dataset_exact_deduplication", "push_dataset_to_hub", "shuffle_before_merging_datasets"
    ),
    # the training
    *_maps("training.num_epochs", "num_epochs", "num_train_epochs", change=to.whole),
    *_maps("training.max_steps", "max_steps", change=to.steps_or_none),
    *_maps("training.micro_batch_size", "micro_batch_size", "per_device_train_batch_size"),
    *_maps("training.global_batch_size", "global_batch_size"),
    *_maps("training.gradient_accumulation_steps", "gradient_accumulation_steps"),
    *_maps("training.learning_rate", "learning_rate"),
    *_maps("training.lr_scheduler", "lr_scheduler", "lr_scheduler_type", change=to.SCHEDULERS),
    *_maps("training.warmup_ratio", "warmup_ratio"),
    *_maps("training.optimizer", "optimizer", "optim", change=to.OPTIMIZERS),
    *_maps("training.weight_decay", "weight_decay"),
    *_maps("training.max_grad_norm", "max_grad_norm", "gradient_clipping"),
    *_maps("training.precision", "bf16", change=to.switch("bf16", "Write training.precision: bf16.")),
    *_maps("training.precision", "fp16", change=to.switch("fp16", "Write training.precision: fp16.")),
    *_maps("training.precision", "precision"),
    *_maps("training.gradient_checkpointing", "gradient_checkpointing", change=to.CHECKPOINTING),
    *_maps("training.gradient_checkpointing", "disable_gradient_checkpointing", change=to.opposite),
    *_maps("training.seed", "seed", "data_seed"),
    *_maps("training.save_steps", "save_steps", change=to.step_count),
    *_maps("training.eval_steps", "eval_steps", change=to.step_count),
    *_maps("training.saves_per_epoch", "saves_per_epoch"),
    *_maps("training.evals_per_epoch", "evals_per_epoch"),
    *_maps("training.saves_per_epoch", "save_strategy", change=to.strategy("training.save_steps")),
    *_maps(
        "training.evals_per_epoch",
        "eval_strategy",
        "evaluation_strategy",
        change=to.strategy("training.eval_steps"),
    ),
    *_maps("storage.keep_latest", "save_total_limit"),
    *_maps("training.warmup_ratio", "warmup_steps", change=to.no_warmup),
    *_refused("Write training.global_batch_size, the rows per step over all workers.", "batch_size"),
    *_refused("Remove it: evaluation uses training.micro_batch_size.", "eval_batch_size"),
    *_refused("Remove it: evaluation uses training.micro_batch_size.", "per_device_eval_batch_size"),
    *_refused("Write training.micro_batch_size; raypeft plan says what fits.", "auto_find_batch_size"),
    *_refused("Write training.precision: bf16.", "pure_bf16", "bfloat16", "fp8"),
    *_refused("Write training.precision: fp16.", "float16"),
    *_refused("Write training.precision: fp32.", "float32"),
    *_refused("Remove it: products of fp32 are left exact.", "tf32", accepts=(False,)),
    *_refused("Remove it: activations are recomputed without options.", "gradient_checkpointing_kwargs"),
    *_refused(_OWN_LOOP, "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs"),
    *_refused(_OWN_LOOP, "cosine_min_lr_ratio", "neftune_noise_alpha", "torch_compile", "embedding_lr"),
    *_refused(_OWN_LOOP, "early_stopping_patience", "loss_watchdog_threshold", "loss_watchdog_patience"),
    *_refused("Remove it: storage.keep_best keeps the best checkpoint.", "load_best_model_at_end"),
    *_refused("Remove it: the best checkpoint is that of the lowest eval_loss.", "metric_for_best_model"),
    *_refused("Remove it: the best checkpoint is that of the lowest eval_loss.", "greater_is_better"),
    *_refused(_RESUME, "resume_from_checkpoint", "auto_resume_from_checkpoints"),
    *_refused("Remove it: adapters are always saved as safetensors.", "save_safetensors", accepts=(True,)),
    *_refused(
        "Remove it: checkpoints hold the optimizer's state as well.", "save_only_model", accepts=(False,)
    ),
    *_refused("Remove it: unknown keys are always refused.", "strict"),
    *_refused("Remove it: this trains on examples (SFT).", "stage", accepts=("sft",)),
    *_refused(_METHODS, "rl", "trl", "rl_beta", "pref_beta", "pref_loss", "reward_model"),
    *_refused(_ALWAYS, "do_train", accepts=(True,)),
    *_refused("Write data.val_set_size: 0 to hold no rows out.", "do_eval", accepts=(True,)),
    *_refused("Remove it: evaluation generates where eval.metrics asks for it.", "do_predict"),
    *_refused("Write eval.metrics: [exact_match].", "predict_with_generate", "eval_causal_lm_metrics"),
    *_refused(
        _KERNELS, "flash_attention", "sdp_attention", "xformers_attention", "flex_attention", "flash_attn"
    ),
    *_refused(_KERNELS, "eager_attention", "s2_attention", "attn_implementation", "enable_liger_kernel"),
    *_refused(_KERNELS, "use_unsloth", "use_unsloth_gc", "plugins"),
    # the workers and the storage
    *_maps("resources.num_workers", "ray_num_workers"),
    *_maps("resources.placement", "placement_strategy"),
    *_maps("storage.path", "output_dir", "ray_storage_path"),
    *_maps("name", "run_name", "ray_run_name"),
    Alias("resources_per_worker", "resources"),
    *_refused(
        _SHARDING, "fsdp", "fsdp_config", "fsdp_version", "tensor_parallel_size", "context_parallel_size"
    ),
    *_refused("Remove it: `raypeft run` always trains on Ray.", "use_ray", accepts=(True,)),
    *_refused("Write a cluster file and name it: cluster: FILE.", "ray_init_kwargs", "accelerator_config"),
    *_refused("Remove it: workers find each other through Ray.", "local_rank", "world_size", "ddp"),
    *_refused("Remove it: workers find each other through Ray.", "ddp_timeout", "ddp_find_unused_parameters"),
    *_refused("Write resources.gpus_per_worker.", "device_map", "max_memory", "gpu_memory_limit"),
    *_refused(_LOGS, "logging_steps", "logging_dir", "logging_strategy", "plot_loss", "log_level", "debug"),
    *_refused(_LOGS, "include_tokens_per_second", "include_num_input_tokens_seen"),
    *_refused("Remove it: each run has a folder of its own.", "overwrite_output_dir"),
    *_refused(_HUB, "hub_model_id", "hub_strategy", "push_to_hub", "hub_repo", "hub_private_repo"),
    *_maps("data.sample_packing", "sample_packing", "packing", "neat_packing"),
    *_refused(
        "Remove it: evaluation rows share sequences as data.sample_packing says.", "eval_sample_packing"
    ),
    *_refused("Remove it: a sequence is as long as its rows.", "pad_to_sequence_len", accepts=(False,)),
    # who is told of the run
    Alias("report_to", "tracking", to.reported),
    *_maps("tracking.mlflow", "use_mlflow", change=to.switched_section),
    *_maps("tracking.mlflow.uri", "mlflow_tracking_uri"),
    *_maps("tracking.mlflow.experiment", "mlflow_experiment_name"),
    *_maps("tracking.tensorboard", "use_tensorboard", change=to.switched_section),
    *_maps("tracking.wandb", "use_wandb", change=to.switched_section),
    *_maps("tracking.wandb.project", "wandb_project"),
    *_maps("tracking.wandb.entity", "wandb_entity"),
    *_maps("tracking.wandb.mode", "wandb_mode"),
    *_refused("Remove it: a tracked run has the run's own name.", "wandb_name", "wandb_run_id"),
    *_refused(
        "Remove it: adapters live in the registry.", "wandb_log_model", "wandb_watch", accepts=(False,)
    ),
    *_refused("Write tracking: {mlflow: {uri: URL}}, tensorboard or wandb.", "use_swanlab", accepts=(False,)),
)

BY_NAME: dict[str, Alias] = {row.name: row for row in ROWS}

SECTION_ALIASES: dict[str, tuple[str, Change]] = {
    "training.bf16": ("training.precision", to.switch("bf16", "Write training.precision: bf16.")),
    "training.fp16": ("training.precision", to.switch("fp16", "Write training.precision: fp16.")),
}
"""Other spellings inside a section. Those of `adapter` depend on the method: see `adapter.py`."""

DATASET_TYPES: dict[str, str] = {
    "chat_template": "chat",
    "sharegpt": "chat",
    "messages": "chat",
    "completion": "text",
}
"""Other names of dataset types. `completion` is Axolotl's, where it has a text column; with `field_prompt` or
`field_completion` beside it, it is `prompt_completion`."""

DATASET_REFUSED: dict[str, str] = {
    "data_files": "Write path: FILE.jsonl itself, or a glob.",
    "ds_type": "Remove it: the ending of the path says what it is.",
    "name": "Write path: REPO/DIRECTORY for one configuration of a hub dataset.",
    "conversation": "Remove it: the base's own chat template is used.",
    "chat_template": "Remove it: the base's own chat template is used.",
    "message_property_mappings": "Remove it: role/content and from/value are both read.",
    "message_field_role": "Remove it: role/content and from/value are both read.",
    "message_field_content": "Remove it: role/content and from/value are both read.",
    "roles": "Remove it: user, human, assistant, gpt, system and tool are all read.",
    "roles_to_train": "Remove it: the assistant's turns are trained.",
    "train_on_eos": "Remove it: the end of each answer is trained.",
    "shards": "Remove it: write weight for a part of the rows.",
    "train_on_split": "Write split.",
}
