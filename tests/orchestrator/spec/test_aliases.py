import pytest

from orchestrator.spec.alias_table import BY_NAME, DATASET_REFUSED, DATASET_TYPES, ROWS
from orchestrator.spec.canonical import resolved_values
from orchestrator.spec.load import load_job_text

from .jobs import MINIMAL, refused, refused_after_minimal, spec_of

MAPPED = {
    # name in the file: (value in the file, our key, our value)
    "base_model": ("b", "model.base_model", "b"),
    "model_name_or_path": ("b", "model.base_model", "b"),
    "model_id": ("b", "model.base_model", "b"),
    "revision_of_model": ("v1", "model.revision", "v1"),
    "model_revision": ("v1", "model.revision", "v1"),
    "trust_remote_code": ("true", "model.trust_remote_code", True),
    "load_in_8bit": ("true", "model.load_in_8bit", True),
    "load_in_4bit": ("true", "model.load_in_4bit", True),
    "quantization_bit": ("4", "model.load_in_4bit", True),
    "bnb_4bit_quant_type": ("fp4\nload_in_4bit: true", "model.bnb_4bit_quant_type", "fp4"),
    "quantization_type": ("fp4\nload_in_4bit: true", "model.bnb_4bit_quant_type", "fp4"),
    "bnb_4bit_use_double_quant": (
        "false\nload_in_4bit: true", "model.bnb_4bit_use_double_quant", False
    ),
    "double_quantization": ("false\nload_in_4bit: true", "model.bnb_4bit_use_double_quant", False),
    "bnb_4bit_compute_dtype": (
        "torch.bfloat16\nload_in_4bit: true", "model.bnb_4bit_compute_dtype", "bfloat16"
    ),
    "bnb_4bit_quant_storage": ("bf16\nload_in_4bit: true", "model.bnb_4bit_quant_storage", "bfloat16"),
    "bnb_config_kwargs": (
        "{load_in_4bit: true, bnb_4bit_compute_dtype: fp16}", "model.bnb_4bit_compute_dtype", "float16"
    ),
    "finetuning_type": ("lora", "adapter.type", "lora"),
    "peft_type": ("IA3", "adapter.type", "ia3"),
    "lora_r": ("4", "adapter.r", 4),
    "lora_rank": ("4", "adapter.r", 4),
    "lora_alpha": ("4", "adapter.lora_alpha", 4),
    "lora_dropout": ("0.5", "adapter.lora_dropout", 0.5),
    "lora_target_modules": ("[q_proj]", "adapter.target_modules", ["q_proj"]),
    "lora_target": ("q_proj,v_proj", "adapter.target_modules", ["q_proj", "v_proj"]),
    "lora_target_linear": ("true", "adapter.target_modules", "all-linear"),
    "lora_modules_to_save": ("[embed_tokens]", "adapter.modules_to_save", ["embed_tokens"]),
    "additional_target": ("embed_tokens,lm_head", "adapter.modules_to_save", ["embed_tokens", "lm_head"]),
    "lora_fan_in_fan_out": ("true", "adapter.fan_in_fan_out", True),
    "lora_bias": ("all", "adapter.bias", "all"),
    "use_rslora": ("true", "adapter.use_rslora", True),
    "peft_use_rslora": ("true", "adapter.use_rslora", True),
    "use_dora": ("true", "adapter.use_dora", True),
    "peft_use_dora": ("true", "adapter.use_dora", True),
    "pissa_init": ("true", "adapter.init_lora_weights", "pissa"),
    "peft_init_lora_weights": ("gaussian", "adapter.init_lora_weights", "gaussian"),
    "init_lora_weights": ("gaussian", "adapter.init_lora_weights", "gaussian"),
    "peft_layers_to_transform": ("[0, 1]\nlora_target: q_proj,v_proj", "adapter.layers_to_transform", [0, 1]),
    "peft_layers_pattern": (
        "layers\npeft_layers_to_transform: [0]\nlora_target: q_proj,v_proj", "adapter.layers_pattern", "layers"
    ),
    "lora_model_dir": ("./a", "adapter.init_from", "./a"),
    "adapter_name_or_path": ("./a", "adapter.init_from", "./a"),
    "datasets": ("[{path: z}]", "data.datasets.0.path", "z"),
    "val_set_size": ("0.2", "data.val_set_size", 0.2),
    "val_size": ("0.2", "data.val_set_size", 0.2),
    "sequence_len": ("64", "data.sequence_len", 64),
    "cutoff_len": ("64", "data.sequence_len", 64),
    "max_seq_length": ("64", "data.sequence_len", 64),
    "max_length": ("64", "data.sequence_len", 64),
    "excess_length_strategy": ("raise", "data.overlong", "error"),
    "test_datasets": ("[{path: z}]", "eval.datasets.0.path", "z"),
    "eval_max_new_tokens": ("9", "eval.max_new_tokens", 9),
    "num_epochs": ("3", "training.num_epochs", 3),
    "num_train_epochs": ("3.0", "training.num_epochs", 3),
    "max_steps": ("5", "training.max_steps", 5),
    "micro_batch_size": ("2", "training.micro_batch_size", 2),
    "per_device_train_batch_size": ("2", "training.micro_batch_size", 2),
    "global_batch_size": ("2", "training.global_batch_size", 2),
    "gradient_accumulation_steps": ("2", "training.gradient_accumulation_steps", 2),
    "learning_rate": ("1e-5", "training.learning_rate", 1e-5),
    "lr_scheduler": ("linear", "training.lr_scheduler", "linear"),
    "lr_scheduler_type": ("constant_with_warmup", "training.lr_scheduler", "constant"),
    "warmup_ratio": ("0.1", "training.warmup_ratio", 0.1),
    "warmup_steps": ("0", "training.warmup_ratio", 0.0),
    "optimizer": ("adamw_torch_fused", "training.optimizer", "adamw"),
    "optim": ("sgd", "training.optimizer", "sgd"),
    "weight_decay": ("0.1", "training.weight_decay", 0.1),
    "max_grad_norm": ("0.5", "training.max_grad_norm", 0.5),
    "gradient_clipping": ("0.5", "training.max_grad_norm", 0.5),
    "bf16": ("true", "training.precision", "bf16"),
    "fp16": ("true", "training.precision", "fp16"),
    "precision": ("fp32", "training.precision", "fp32"),
    "gradient_checkpointing": ("true", "training.gradient_checkpointing", True),
    "disable_gradient_checkpointing": ("true", "training.gradient_checkpointing", False),
    "seed": ("7", "training.seed", 7),
    "data_seed": ("7", "training.seed", 7),
    "save_steps": ("7", "training.save_steps", 7),
    "eval_steps": ("7", "training.eval_steps", 7),
    "saves_per_epoch": ("2", "training.saves_per_epoch", 2),
    "evals_per_epoch": ("2", "training.evals_per_epoch", 2),
    "save_strategy": ("epoch", "training.saves_per_epoch", 1),
    "eval_strategy": ("epoch", "training.evals_per_epoch", 1),
    "evaluation_strategy": ("epoch", "training.evals_per_epoch", 1),
    "save_total_limit": ("3", "storage.keep_latest", 3),
    "ray_num_workers": ("2", "resources.num_workers", 2),
    "placement_strategy": ("SPREAD", "resources.placement", "SPREAD"),
    "output_dir": ("./out", "storage.path", "./out"),
    "ray_storage_path": ("./out", "storage.path", "./out"),
    "run_name": ("r1", "name", "r1"),
    "ray_run_name": ("r1", "name", "r1"),
    "sample_packing": ("true", "data.sample_packing", True),
    "packing": ("true", "data.sample_packing", True),
    "neat_packing": ("true", "data.sample_packing", True),
    "report_to": ("[tensorboard]", "tracking.tensorboard.dir", None),
    "use_mlflow": ("false", "tracking.mlflow", None),
    "mlflow_tracking_uri": ("http://mlflow:5000", "tracking.mlflow.uri", "http://mlflow:5000"),
    "mlflow_experiment_name": ("e", "tracking.mlflow.experiment", "e"),
    "use_tensorboard": ("true", "tracking.tensorboard.dir", None),
    "use_wandb": ("true", "tracking.wandb.mode", "online"),
    "wandb_project": ("p", "tracking.wandb.project", "p"),
    "wandb_entity": ("us", "tracking.wandb.entity", "us"),
    "wandb_mode": ("offline", "tracking.wandb.mode", "offline"),
    "resources_per_worker": ("{GPU: 1, CPU: 4}", "resources.cpus_per_worker", 4),
}  # fmt: skip


def test_every_alias_has_a_case():
    assert {row.name for row in ROWS if row.target} == set(MAPPED)
    assert len(ROWS) == len(BY_NAME), "a name stands twice"


@pytest.mark.parametrize("name", MAPPED)
def test_alias_is_mapped(name):
    text, key, expected = MAPPED[name]
    rest = MINIMAL
    if key == "model.base_model":
        rest = MINIMAL.splitlines(keepends=True)[1]
    elif key.startswith("data.datasets"):
        rest = MINIMAL.splitlines(keepends=True)[0]
    value = resolved_values(load_job_text(f"{rest}{name}: {text}\n", "x.yaml").spec)
    for part in key.split("."):
        value = value[int(part)] if part.isdigit() else value[part]
    assert value == expected


REFUSED = {row.name: row for row in ROWS if not row.target}


@pytest.mark.parametrize("name", REFUSED)
def test_key_without_counterpart_is_refused_with_what_to_write(name):
    message = refused_after_minimal(f"{name}: 17\n")
    assert message.startswith(f"jobs/x.yaml:3 {name}: ") and message.endswith(REFUSED[name].instead)
    assert REFUSED[name].instead.split()[0] in ("Remove", "Write"), "says what to do"


@pytest.mark.parametrize("name", [name for name, row in REFUSED.items() if row.accepts])
def test_value_that_says_what_is_always_done_is_taken(name):
    value = {True: "true", False: "false"}.get(REFUSED[name].accepts[0], REFUSED[name].accepts[0])
    spec_of(f"{name}: {value}\n")


@pytest.mark.parametrize("text", ["adapter: qlora", "adapter: {type: qlora, r: 4}", "quantization_bit: 4"])
def test_what_others_call_a_base_in_4_bits(text):
    model = spec_of(text).model
    assert model.load_in_4bit and not model.load_in_8bit
    assert spec_of(text).adapter.type == "lora"
    assert spec_of("quantization_bit: 8").model.load_in_8bit


@pytest.mark.parametrize("name", [*(name for name in MAPPED if "base_model" not in name), *REFUSED])
def test_an_empty_value_asks_for_nothing(name):
    spec_of(f"{name}:\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantization_bit: 3",
         "jobs/x.yaml:3 quantization_bit: 3 bits have no counterpart. Write model.load_in_4bit or load_in_8bit: true."),
        ("adapter: qlora\nload_in_4bit: false",
         "jobs/x.yaml:4 load_in_4bit: false contradicts adapter (line 3): true; both mean model.load_in_4bit. "
         "Keep one of them, best model.load_in_4bit."),
        ("finetuning_type: qlora",
         "jobs/x.yaml:3 finetuning_type: 'qlora' is LoRA on a 4-bit base. Write lora, and model.load_in_4bit: true."),
        ("bnb_config_kwargs: {llm_int8_threshold: 6.0}",
         "jobs/x.yaml:3 bnb_config_kwargs: 'llm_int8_threshold' is not a key of a job. Of bitsandbytes' there are: "
         "load_in_8bit, load_in_4bit, bnb_4bit_quant_type, bnb_4bit_use_double_quant, bnb_4bit_compute_dtype, "
         "bnb_4bit_quant_storage."),
        ("bnb_config_kwargs: 4", "jobs/x.yaml:3 bnb_config_kwargs: 4 is not a mapping. Write model keys."),
        ("lora_r: 8\nadapter: {r: 4}",
         "jobs/x.yaml:3 lora_r: 8 contradicts adapter.r (line 4): 4; both mean adapter.r. "
         "Keep one of them, best adapter.r."),
        ("lora_r: 8\nlora_rank: 4",
         "jobs/x.yaml:4 lora_rank: 4 contradicts lora_r (line 3): 8; both mean adapter.r. "
         "Keep one of them, best adapter.r."),
        ("bf16: true\nfp16: true",
         "jobs/x.yaml:4 fp16: 'fp16' contradicts bf16 (line 3): 'bf16'; both mean training.precision. "
         "Keep one of them, best training.precision."),
        ("adapter: {alpha: 8, lora_alpha: 4}",
         "jobs/x.yaml:3 adapter.alpha: 8 contradicts adapter.lora_alpha (line 3): 4; both mean adapter.lora_alpha. "
         "Keep one of them."),
        ("training: {bf16: true, precision: fp32}",
         "jobs/x.yaml:3 training.bf16: 'bf16' contradicts training.precision (line 3): 'fp32'; both mean "
         "training.precision. Keep one of them, best training.precision."),
        ("optim: adamw_bnb_8bit",
         "jobs/x.yaml:3 optim: 'adamw_bnb_8bit' has no counterpart. Write training.optimizer: adamw or sgd."),
        ("finetuning_type: full",
         "jobs/x.yaml:3 finetuning_type: 'full' trains the base itself; this trains adapters. "
         "List them: raypeft methods"),
        ("save_steps: 0.2",
         "jobs/x.yaml:3 save_steps: 0.2 is a share of the run. Write a number of steps, or saves_per_epoch / "
         "evals_per_epoch."),
        ("cutoff_len: abc", "jobs/x.yaml:3 cutoff_len: 'abc' is not a whole number above 0."),
    ],
)  # fmt: skip
def test_errors_name_what_was_written(text, message):
    assert refused_after_minimal(text + "\n") == message


def test_both_spellings_with_one_value_are_no_error():
    assert spec_of("lora_r: 8\nadapter: {r: 8}\n").adapter.fields == {"r": 8}


def test_adapter_in_one_word():
    assert spec_of("adapter: ia3\n").adapter.type == "ia3"
    assert spec_of("adapter: lora\nlora_r: 3\n").adapter.fields == {"r": 3}
    assert spec_of("adapter: {type: LoRA}\n").adapter.type == "lora"


@pytest.mark.parametrize("name", DATASET_TYPES)
def test_dataset_types(name):
    text = f"model: {{base_model: b}}\ndata: {{datasets: [{{path: a, type: {name}}}]}}\n"
    assert load_job_text(text, "x.yaml").spec.data.datasets[0].type == DATASET_TYPES[name]


def test_completion_with_a_prompt_column_is_a_pair():
    text = "base_model: b\ndatasets: [{path: a, type: completion, field_prompt: q}]\n"
    assert load_job_text(text, "x.yaml").spec.data.datasets[0].type == "prompt_completion"
    text = "base_model: b\ndatasets: [{path: a, type: completion, field: body}]\n"
    assert load_job_text(text, "x.yaml").spec.data.datasets[0].field_text == "body"


@pytest.mark.parametrize("name", DATASET_REFUSED)
def test_dataset_keys_without_counterpart(name):
    message = refused(f"base_model: b\ndatasets: [{{path: a, {name}: x}}]\n")
    assert message == f"jobs/x.yaml:2 datasets.0.{name}: not a key of a dataset. {DATASET_REFUSED[name]}"


def test_a_file_of_axolotl_and_one_of_llama_factory():
    axolotl = load_job_text(
        "base_model: NousResearch/Llama-3.2-1B\ndatasets:\n  - {path: teknium/GPT4, type: alpaca}\n"
        "val_set_size: 0.1\noutput_dir: ./out\nadapter: lora\nlora_model_dir:\nsequence_len: 2048\nlora_r: 16\n"
        "lora_alpha: 32\nlora_dropout: 0.05\nlora_target_modules: [gate_proj, down_proj]\nwandb_project:\n"
        "gradient_accumulation_steps: 2\nmicro_batch_size: 2\nnum_epochs: 1\noptimizer: adamw_torch\n"
        "lr_scheduler: cosine\nlearning_rate: 0.0002\nbf16: auto\ntf32: false\ngradient_checkpointing: true\n"
        "warmup_ratio: 0.1\nevals_per_epoch: 4\nsaves_per_epoch: 1\nweight_decay: 0.0\ndeepspeed: zero1\n",
        "lora-1b.yml",
    ).spec
    assert (
        axolotl.name == "lora-1b"
        and axolotl.adapter.fields["r"] == 16
        and axolotl.training.precision == "auto"
    )
    factory = load_job_text(
        "model_name_or_path: meta-llama/Llama-3-8B\nstage: sft\ndo_train: true\nfinetuning_type: lora\nlora_rank: 8\n"
        "lora_target: all\ndatasets: [{path: d.json, type: alpaca}]\ncutoff_len: 2048\noutput_dir: saves\n"
        "save_steps: 500\nper_device_train_batch_size: 1\ngradient_accumulation_steps: 8\nlearning_rate: 1.0e-4\n"
        "num_train_epochs: 3.0\nlr_scheduler_type: cosine\nwarmup_ratio: 0.1\nbf16: true\nval_size: 0.1\n",
        "factory.yaml",
    ).spec
    assert factory.training.num_epochs == 3 and factory.adapter.fields["target_modules"] == "all-linear"
