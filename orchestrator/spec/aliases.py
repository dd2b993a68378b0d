"""Axolotl's, LLaMA-Factory's and Hugging Face's names for our keys, and what to write for those that have none.

One table, one row per name; a test walks it. Each row maps its key, accepts the one value that says what is always
done here, or refuses the key with what to write instead. None is dropped. An empty value (`lora_model_dir:`) asks
for nothing and is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .places import MISSING, Path, Place, Problem, Tree, dotted
from .words import show

Change = Callable[[Any], Any]
"""Turns the other project's value into ours; ValueError says why it cannot."""


@dataclass(frozen=True)
class Alias:
    """`name` at the top level. `target` None: refused with `instead`, unless the value is in `accepts`."""

    name: str
    target: str | None = None
    change: Change | None = None
    instead: str = ""
    accepts: tuple[Any, ...] = ()


def _one_of(table: dict[Any, Any], instead: str) -> Change:
    def change(value: Any) -> Any:
        try:
            return table[value.lower() if isinstance(value, str) else value]
        except (KeyError, TypeError):
            raise ValueError(f"{show(value)} has no counterpart. {instead}") from None

    return change


def _whole(value: Any) -> Any:
    """LLaMA-Factory writes epochs as 3.0."""
    return int(value) if isinstance(value, float) and value == int(value) else value


def _steps_or_none(value: Any) -> Any:
    """-1 is how Hugging Face says: not given."""
    return None if value == -1 else _whole(value)


def _no_warmup(value: Any) -> Any:
    if value == 0 and not isinstance(value, bool):
        return 0.0
    raise ValueError(f"{show(value)} steps are no share of them. Write training.warmup_ratio, such as 0.03.")


def _step_count(value: Any) -> Any:
    if isinstance(value, float) and 0 < value < 1:
        raise ValueError(
            f"{value} is a share of the run. Write a number of steps, or saves_per_epoch / evals_per_epoch."
        )
    return _whole(value)


def _names(value: Any) -> Any:
    """`q_proj,v_proj` as a list; `all` as our word for it."""
    if not isinstance(value, str):
        return value
    if value in ("all", "all-linear", "all_linear"):
        return "all-linear"
    names = [name.strip() for name in value.split(",")]
    return names if len(names) > 1 else value if set(value) & set("*^$|()[]\\") else names


def _list_of_names(value: Any) -> Any:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _pissa(value: Any) -> Any:
    """LLaMA-Factory says whether; we say which start."""
    return "pissa" if value is True else True if value is False else value


def _all_linear(value: Any) -> Any:
    if value is True:
        return "all-linear"
    raise ValueError(
        "false leaves nothing to adapt. Write lora_target_modules: [q_proj, v_proj], and remove this key."
    )


def _yes(word: str, instead: str) -> Change:
    """A switch whose `true` is `word`; `false` and `auto` leave the choice to us."""

    def change(value: Any) -> Any:
        if value is True:
            return word
        if value is False or value == "auto":
            return None
        raise ValueError(f"{show(value)} is not true, false or auto. {instead}")

    return change


def _section(value: Any) -> Any:
    """A switch of a section: with its defaults, or none."""
    if isinstance(value, bool):
        return {} if value else False
    raise ValueError(f"{show(value)} is not true or false.")


def _reported(value: Any) -> Any:
    """Hugging Face's list of trackers; what it does not name is told nothing."""
    names = [value] if isinstance(value, str) else value
    known = ("mlflow", "tensorboard", "wandb")
    if names in (["none"], []):
        return {"mlflow": False}
    if names == ["all"]:
        return dict.fromkeys(known, True)
    if not isinstance(names, list) or any(name not in known for name in names):
        raise ValueError(f"{show(value)} has no counterpart. Write any of {', '.join(known)}, or none.")
    return {"mlflow": False, **dict.fromkeys(names, True)}


def _not(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    raise ValueError(f"{show(value)} is not true or false.")


def _adapter_type(value: Any) -> Any:
    if value == "qlora":
        raise ValueError("'qlora' is LoRA on a 4-bit base. Write lora, and model.load_in_4bit: true.")
    if isinstance(value, str):
        return value.lower().replace("-", "_")
    raise ValueError(f"{show(value)} is not a method. List them: raypeft methods")


def _finetuning_type(value: Any) -> Any:
    if value in ("full", "freeze"):
        raise ValueError(
            f"'{value}' trains the base itself; this trains adapters. List them: raypeft methods"
        )
    return _adapter_type(value)


def _strategy(steps_key: str) -> Change:
    def change(value: Any) -> Any:
        if value == "epoch":
            return 1
        if value == "steps":
            return None
        raise ValueError(f"{show(value)} has no counterpart. Write {steps_key} with a number of steps.")

    return change


def _dtype(value: Any) -> Any:
    """`torch.bfloat16` and `bf16` as torch names it."""
    if isinstance(value, str):
        word = value.removeprefix("torch.")
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(word, word)
    return value


_OPTIMIZERS = _one_of(
    {
        "adamw": "adamw",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "sgd": "sgd",
    },
    "Write training.optimizer: adamw or sgd.",
)
_SCHEDULERS = _one_of(
    {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"},
    "Write training.lr_scheduler: constant, linear or cosine.",
)
_OVERLONG = _one_of(
    {"drop": "drop", "truncate": "truncate", "raise": "error"},
    "Write data.overlong: truncate, drop or error.",
)
_CHECKPOINTING = _one_of(
    {True: True, False: False, "auto": "auto", "true": True, "false": False},
    "Write training.gradient_checkpointing: true, false or auto.",
)


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
    *_maps("model.bnb_4bit_compute_dtype", "bnb_4bit_compute_dtype", change=_dtype),
    *_maps("model.bnb_4bit_quant_storage", "bnb_4bit_quant_storage", change=_dtype),
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
    *_maps("adapter.type", "finetuning_type", change=_finetuning_type),
    *_maps("adapter.type", "peft_type", change=_adapter_type),
    *_maps("adapter.r", "lora_r", "lora_rank"),
    *_maps("adapter.lora_alpha", "lora_alpha"),
    *_maps("adapter.lora_dropout", "lora_dropout"),
    *_maps("adapter.target_modules", "lora_target_modules", "lora_target", change=_names),
    *_maps("adapter.target_modules", "lora_target_linear", change=_all_linear),
    *_maps("adapter.modules_to_save", "lora_modules_to_save", "additional_target", change=_list_of_names),
    *_maps("adapter.fan_in_fan_out", "lora_fan_in_fan_out"),
    *_maps("adapter.bias", "lora_bias"),
    *_maps("adapter.use_rslora", "use_rslora", "peft_use_rslora"),
    *_maps("adapter.use_dora", "use_dora", "peft_use_dora"),
    *_maps("adapter.init_lora_weights", "pissa_init", change=_pissa),
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
    *_maps("data.overlong", "excess_length_strategy", change=_OVERLONG),
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
    *_maps("training.num_epochs", "num_epochs", "num_train_epochs", change=_whole),
    *_maps("training.max_steps", "max_steps", change=_steps_or_none),
    *_maps("training.micro_batch_size", "micro_batch_size", "per_device_train_batch_size"),
    *_maps("training.global_batch_size", "global_batch_size"),
    *_maps("training.gradient_accumulation_steps", "gradient_accumulation_steps"),
    *_maps("training.learning_rate", "learning_rate"),
    *_maps("training.lr_scheduler", "lr_scheduler", "lr_scheduler_type", change=_SCHEDULERS),
    *_maps("training.warmup_ratio", "warmup_ratio"),
    *_maps("training.optimizer", "optimizer", "optim", change=_OPTIMIZERS),
    *_maps("training.weight_decay", "weight_decay"),
    *_maps("training.max_grad_norm", "max_grad_norm", "gradient_clipping"),
    *_maps("training.precision", "bf16", change=_yes("bf16", "Write training.precision: bf16.")),
    *_maps("training.precision", "fp16", change=_yes("fp16", "Write training.precision: fp16.")),
    *_maps("training.precision", "precision"),
    *_maps("training.gradient_checkpointing", "gradient_checkpointing", change=_CHECKPOINTING),
    *_maps("training.gradient_checkpointing", "disable_gradient_checkpointing", change=_not),
    *_maps("training.seed", "seed", "data_seed"),
    *_maps("training.save_steps", "save_steps", change=_step_count),
    *_maps("training.eval_steps", "eval_steps", change=_step_count),
    *_maps("training.saves_per_epoch", "saves_per_epoch"),
    *_maps("training.evals_per_epoch", "evals_per_epoch"),
    *_maps("training.saves_per_epoch", "save_strategy", change=_strategy("training.save_steps")),
    *_maps(
        "training.evals_per_epoch",
        "eval_strategy",
        "evaluation_strategy",
        change=_strategy("training.eval_steps"),
    ),
    *_maps("storage.keep_latest", "save_total_limit"),
    *_maps("training.warmup_ratio", "warmup_steps", change=_no_warmup),
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
    Alias("report_to", "tracking", _reported),
    *_maps("tracking.mlflow", "use_mlflow", change=_section),
    *_maps("tracking.mlflow.uri", "mlflow_tracking_uri"),
    *_maps("tracking.mlflow.experiment", "mlflow_experiment_name"),
    *_maps("tracking.tensorboard", "use_tensorboard", change=_section),
    *_maps("tracking.wandb", "use_wandb", change=_section),
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
    "training.bf16": ("training.precision", _yes("bf16", "Write training.precision: bf16.")),
    "training.fp16": ("training.precision", _yes("fp16", "Write training.precision: fp16.")),
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


def resolve_aliases(tree: Tree) -> list[Problem]:
    """Moves every alias to its key, in place; returns what breaks a rule."""
    problems: list[Problem] = []
    _adapter_in_one_word(tree, problems)
    for name in [name for name in tree.values if name in BY_NAME]:
        _resolve(tree, BY_NAME[name], problems)
    for key, (target, change) in SECTION_ALIASES.items():
        path = tuple(key.split("."))
        if tree.get(path) is not MISSING:
            _move(tree, path, tuple(target.split(".")), change, problems)
    for section in ("data", "eval"):
        datasets = tree.get((section, "datasets"))
        for index in range(len(datasets) if isinstance(datasets, list) else 0):
            _resolve_dataset(tree, (section, "datasets", index), problems)
    return problems


def _adapter_in_one_word(tree: Tree, problems: list[Problem]) -> None:
    """`adapter: lora` is `adapter: {type: lora}`."""
    value = tree.get(("adapter",))
    if isinstance(value, dict) and value.get("type") == "qlora":
        _qlora(tree, tree.places[("adapter", "type")], problems)
        value["type"] = "lora"
        return
    if value is MISSING or isinstance(value, dict) or value is None:
        return
    place = tree.places[("adapter",)]
    if value == "qlora":
        _qlora(tree, place, problems)
        value = "lora"
    try:
        kind = _adapter_type(value)
    except ValueError as error:
        _drop(tree, ("adapter",), Problem(("adapter",), str(error)), problems)
        return
    tree.put(("adapter",), {"type": kind}, {(): place, ("type",): place})


def _qlora(tree: Tree, place: Place, problems: list[Problem]) -> None:
    """Axolotl's word for LoRA on a 4-bit base."""
    tree.put(("adapter: qlora",), True, {(): place})
    _move(tree, ("adapter: qlora",), ("model", "load_in_4bit"), None, problems)


def _drop(tree: Tree, path: Path, problem: Problem | None, problems: list[Problem]) -> None:
    """Takes a key out, keeping its place where a problem points to it."""
    place = tree.places[path]
    tree.take(path)
    if problem:
        tree.places[path] = place
        problems.append(problem)


def _resolve(tree: Tree, row: Alias, problems: list[Problem]) -> None:
    path, value = (row.name,), tree.values[row.name]
    if value is None:
        _drop(tree, path, None, problems)
    elif row.target is None:
        accepted = any(value == one and type(value) is type(one) for one in row.accepts)
        refusal = Problem(
            path, f"{show(value)}: not a key of a job." if row.accepts else "not a key of a job.", row.instead
        )
        _drop(tree, path, None if accepted else refusal, problems)
    elif row.name in _SEVERAL:
        _SEVERAL[row.name](tree, problems)
    else:
        _move(tree, path, tuple(row.target.split(".")), row.change, problems)


def _resources_per_worker(tree: Tree, problems: list[Problem]) -> None:
    """Ray's own words: `{GPU: 1, CPU: 4}`."""
    path: Path = ("resources_per_worker",)
    value = tree.get(path)
    names = {"GPU": "gpus_per_worker", "CPU": "cpus_per_worker"}
    if not isinstance(value, dict) or set(value) - set(names):
        problem = Problem(path, "holds GPU and CPU, nothing else.", "Write resources: {gpus_per_worker: 1}.")
        _drop(tree, path, problem, problems)
        return
    for name in list(value):
        _move(tree, (*path, name), ("resources", names[name]), None, problems)
    _drop(tree, path, None, problems)


def _quantization_bit(tree: Tree, problems: list[Problem]) -> None:
    """LLaMA-Factory's 8 or 4."""
    path: Path = ("quantization_bit",)
    keys = {8: "load_in_8bit", 4: "load_in_4bit"}
    key = keys.get(value) if isinstance(value := tree.get(path), int) else None
    if key is None:
        problem = Problem(
            path,
            f"{show(value)} bits have no counterpart.",
            "Write model.load_in_4bit or load_in_8bit: true.",
        )
        _drop(tree, path, problem, problems)
    else:
        _move(tree, path, ("model", key), lambda _: True, problems)


_BNB_KEYS = {
    "load_in_8bit": None,
    "load_in_4bit": None,
    "bnb_4bit_quant_type": None,
    "bnb_4bit_use_double_quant": None,
    "bnb_4bit_compute_dtype": _dtype,
    "bnb_4bit_quant_storage": _dtype,
}
"""Those of bitsandbytes' config that are ours too."""


def _bnb_config_kwargs(tree: Tree, problems: list[Problem]) -> None:
    """Axolotl's mapping of bitsandbytes' own keys."""
    path: Path = ("bnb_config_kwargs",)
    value = tree.get(path)
    if not isinstance(value, dict):
        _drop(tree, path, Problem(path, f"{show(value)} is not a mapping.", "Write model keys."), problems)
        return
    others = [str(name) for name in value if name not in _BNB_KEYS]
    if others:
        hint = f"Of bitsandbytes' there are: {', '.join(_BNB_KEYS)}."
        _drop(tree, path, Problem(path, f"'{others[0]}' is not a key of a job.", hint), problems)
        return
    for name in list(value):
        _move(tree, (*path, name), ("model", name), _BNB_KEYS[name], problems)
    _drop(tree, path, None, problems)


_SEVERAL: dict[str, Callable[[Tree, list[Problem]], None]] = {
    "resources_per_worker": _resources_per_worker,
    "quantization_bit": _quantization_bit,
    "bnb_config_kwargs": _bnb_config_kwargs,
}
"""Keys whose value says which of ours is meant."""


def _move(tree: Tree, path: Path, target: Path, change: Change | None, problems: list[Problem]) -> None:
    value, places = tree.take(path)
    place = places[()]
    try:
        value = change(value) if change else value
    except ValueError as error:
        tree.places[path] = place
        problems.append(Problem(path, str(error)))
        return
    if value is None:
        return
    parent = tree.get(target[:-1]) if len(target) > 1 else tree.values
    if parent is not MISSING and parent is not None and not isinstance(parent, dict):
        tree.places[path] = place
        problems.append(
            Problem(
                path,
                f"is {dotted(target)}, but {dotted(target[:-1])} is {show(parent)}.",
                "Write one mapping.",
            )
        )
        return
    present = tree.get(target)
    if present is MISSING or present is None:
        tree.put(target, value, places if not change else {(): place})
    elif present != value:
        problems.append(_conflict(tree, path, place, target, value, present))


def _conflict(tree: Tree, path: Path, place: Place, target: Path, value: Any, present: Any) -> Problem:
    other = tree.places[target]
    tree.places[path] = place
    beside = f"{other.key} (line {other.line})" if other.line else f"{other.source} {other.key}"
    return Problem(
        path,
        f"{show(value)} contradicts {beside}: {show(present)}; both mean {dotted(target)}.",
        f"Keep one of them, best {dotted(target)}.",
    )


def _resolve_dataset(tree: Tree, path: Path, problems: list[Problem]) -> None:
    dataset = tree.get(path)
    if not isinstance(dataset, dict):
        return
    kind = dataset.get("type")
    if isinstance(kind, str) and kind in DATASET_TYPES:
        is_pair = kind == "completion" and {"field_prompt", "field_completion"} & set(dataset)
        dataset["type"] = "prompt_completion" if is_pair else DATASET_TYPES[kind]
    if "field" in dataset and dataset.get("type") == "text":
        _move(tree, (*path, "field"), (*path, "field_text"), None, problems)
    for name in [name for name in dataset if name in DATASET_REFUSED]:
        where: Path = (*path, name)
        hint = DATASET_REFUSED[name]
        _drop(
            tree,
            where,
            None if dataset[name] is None else Problem(where, "not a key of a dataset.", hint),
            problems,
        )
