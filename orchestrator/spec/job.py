"""The job: one immutable object per section of the YAML. Rules inside a section stand here, rules across
sections in `rules.py`; loading and places in the file in `load.py`, other projects' names in `alias_table.py`.

Names are those that users of Axolotl, Hugging Face and LLaMA-Factory know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from .durations import parse_duration
from .names import check_adapter, check_alias, check_name
from .sweep import SweepSpec
from .workers import parse_workers


def _whole_rows(value: float | int) -> float | int:
    if value >= 1 and value != int(value):
        raise ValueError(f"{value} is neither a share below 1 nor a whole number of rows.")
    return int(value) if value >= 1 else float(value)


Name = Annotated[str, AfterValidator(check_name)]
AdapterName = Annotated[str, AfterValidator(check_adapter)]
Alias = Annotated[str, AfterValidator(check_alias)]
Duration = Annotated[
    float, BeforeValidator(parse_duration), WithJsonSchema({"type": ["number", "string"], "minimum": 0})
]
Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Times = NonNegativeInt | Literal["unlimited"]
Workers = Annotated[
    int | tuple[int, int],
    BeforeValidator(parse_workers),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2},
            ]
        }
    ),
]
Text = Annotated[str, Field(min_length=1)]
AboveZero = Annotated[FiniteFloat, Field(gt=0)]
NotNegative = Annotated[FiniteFloat, Field(ge=0)]
Rows = Annotated[NotNegative | NonNegativeInt, AfterValidator(_whole_rows)]


class Section(BaseModel):
    """A strict, immutable part of the spec: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class ModelSpec(Section):
    """`model`: the frozen base."""

    base_model: Text = Field(description="a directory, an fsspec URL or a hub id")
    revision: Text = Field(
        default="main", description="the hub's branch, tag or commit; pinned to a commit when submitted"
    )
    trust_remote_code: bool = Field(default=False, description="run code that the model's repository brings")
    load_in_8bit: bool = Field(
        default=False, description="keep the base's linear layers in 8 bits (LLM.int8)"
    )
    load_in_4bit: bool = Field(default=False, description="keep the base's linear layers in 4 bits (QLoRA)")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4", description="the levels of 4 bits: those of a normal distribution, or floats"
    )
    bnb_4bit_use_double_quant: bool = Field(
        default=True, description="4 bits: quantise the blocks' scales as well"
    )
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="4 bits: what a weight is multiplied in; auto: training.precision"
    )
    bnb_4bit_quant_storage: Literal["auto", "uint8", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="4 bits: the dtype that codes are packed into; auto: the base's own at ZeRO-3, else uint8",
    )


DatasetType = Literal[
    "chat",
    "prompt_completion",
    "alpaca",
    "text",
    "classification",
    "token-classification",
    "qa",
    "seq2seq",
    "embedding",
]

DATASET_FIELDS: dict[str, tuple[str, ...]] = {
    "chat": ("field_messages",),
    "prompt_completion": ("field_prompt", "field_completion"),
    "alpaca": ("field_instruction", "field_input", "field_output"),
    "text": ("field_text",),
    "classification": ("field_text", "field_text_pair", "field_label"),
    "token-classification": ("field_tokens", "field_tags"),
    "qa": ("field_question", "field_context", "field_answers"),
    "seq2seq": ("field_source", "field_target"),
    "embedding": ("field_anchor", "field_positive", "field_negative"),
}
"""The columns of each dataset type, by the key that renames them."""

Metric = Literal[
    "exact_match",
    "contains",
    "accuracy",
    "precision",
    "recall",
    "f1",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "recall_at_1",
    "recall_at_5",
    "recall_at_10",
    "mrr",
]


class DatasetSpec(Section):
    """`data.datasets[]` and `eval.datasets[]`: where rows come from and what their columns hold."""

    path: Text = Field(description="JSONL, CSV, Parquet, a directory, a glob, an fsspec URL or a hub id")
    type: DatasetType = Field(default="chat", description="what the columns hold")
    split: Text = Field(default="train", description="the split of a hub dataset or of a directory")
    weight: AboveZero = Field(default=1.0, description="rows are repeated or left out by this factor")
    field_messages: str | None = Field(default=None, description="chat: the column of the messages")
    field_prompt: str | None = Field(default=None, description="prompt_completion: the column of the prompt")
    field_completion: str | None = Field(
        default=None, description="prompt_completion: the column of the completion"
    )
    field_instruction: str | None = Field(default=None, description="alpaca: the column of the instruction")
    field_input: str | None = Field(default=None, description="alpaca: the column of the input")
    field_output: str | None = Field(default=None, description="alpaca: the column of the output")
    field_text: str | None = Field(
        default=None, description="text and classification: the column of the text"
    )
    field_text_pair: str | None = Field(
        default=None, description="classification: the column of a second text, where rows have one"
    )
    field_label: str | None = Field(default=None, description="classification: the column of the label")
    field_tokens: str | None = Field(
        default=None, description="token-classification: the column of the list of words"
    )
    field_tags: str | None = Field(
        default=None, description="token-classification: the column of the list of their tags"
    )
    field_question: str | None = Field(default=None, description="qa: the column of the question")
    field_context: str | None = Field(
        default=None, description="qa: the column of the text that holds the answer"
    )
    field_answers: str | None = Field(
        default=None, description="qa: the column of the answers, as SQuAD writes them"
    )
    field_source: str | None = Field(default=None, description="seq2seq: the column of what is read")
    field_target: str | None = Field(default=None, description="seq2seq: the column of what is to be written")
    field_anchor: str | None = Field(default=None, description="embedding: the column of the query")
    field_positive: str | None = Field(
        default=None, description="embedding: the column of the text that belongs to it"
    )
    field_negative: str | None = Field(
        default=None, description="embedding: the column of one that does not, where rows have one"
    )

    @field_validator(*dict.fromkeys(name for names in DATASET_FIELDS.values() for name in names))
    @classmethod
    def _belongs_to_the_type(cls, value: str | None, info: ValidationInfo) -> str | None:
        kind = info.data.get("type")
        own = DATASET_FIELDS.get(str(kind), ())
        if value is not None and kind is not None and info.field_name not in own:
            raise ValueError(f"a dataset of type {kind} has no such column. It has: {', '.join(own)}.")
        return value


class DataSpec(Section):
    """`data`: the rows, those held out, and how long they may be."""

    datasets: Annotated[tuple[DatasetSpec, ...], Field(min_length=1)] = Field(
        description="where the rows come from"
    )
    val_set_size: Rows = Field(
        default=0.05, description="rows held out: a share below 1, else a number of rows"
    )
    sequence_len: PositiveInt | None = Field(
        default=None, description="tokens a row; what the base allows, at most 2048"
    )
    overlong: Literal["truncate", "drop", "error"] = Field(
        default="truncate", description="what happens to longer rows"
    )
    sample_packing: bool = Field(
        default=False, description="several rows in one sequence without attention between them"
    )


class AdapterSpec(BaseModel):
    """`adapter`: `type` and `init_from` are ours; every other key is a field of the method's config (`adapter.py`)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Text = Field(default="lora", description="a method of `raypeft methods`")
    init_from: Text | None = Field(
        default=None, description="NAME@V, a directory or a hub id: train on from there"
    )

    @property
    def fields(self) -> dict[str, Any]:
        """The keys that belong to the method's config, as written; aliases under the config's own names."""
        return dict(self.model_extra or {})


class TrainingSpec(Section):
    """`training`: how long, how large a batch, how fast."""

    num_epochs: PositiveInt = Field(default=1, description="passes over the training rows")
    max_steps: PositiveInt | None = Field(default=None, description="stop after so many optimizer steps")
    micro_batch_size: PositiveInt = Field(default=1, description="rows per worker and forward")
    global_batch_size: PositiveInt | None = Field(
        default=None, description="rows per optimizer step over all workers"
    )
    gradient_accumulation_steps: PositiveInt | None = Field(
        default=None, description="forwards per optimizer step"
    )
    learning_rate: AboveZero = Field(default=2e-4, description="the peak rate")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="the rate after the warmup"
    )
    warmup_ratio: Share = Field(
        default=0.03, description="share of the steps over which the rate rises from zero"
    )
    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw", description="how the adapter's tensors are updated"
    )
    weight_decay: NotNegative = Field(default=0.0, description="decoupled decay of the adapter's tensors")
    max_grad_norm: NotNegative = Field(
        default=1.0, description="the global norm is clipped to this; 0 turns clipping off"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="auto: bf16 on hardware that has it, fp32 on CPU; fp16 scales the loss"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default="auto", description="recompute activations in the backward; auto: with GPUs"
    )
    seed: NonNegativeInt = Field(
        default=42, description="of the order of rows, the adapter's start and its dropout"
    )
    base_dropout: bool = Field(
        default=False, description="keep the base's own dropout on while the adapter trains"
    )
    save_steps: PositiveInt | None = Field(default=None, description="checkpoint every so many steps")
    saves_per_epoch: PositiveInt | None = Field(
        default=None, description="checkpoints per epoch; 1 where neither is given"
    )
    eval_steps: PositiveInt | None = Field(default=None, description="evaluate every so many steps")
    evals_per_epoch: PositiveInt | None = Field(
        default=None, description="evaluations per epoch; 1 where neither is given"
    )

    @field_validator("saves_per_epoch", "evals_per_epoch")
    @classmethod
    def _one_cadence(cls, value: int | None, info: ValidationInfo) -> int | None:
        other = {"saves_per_epoch": "save_steps", "evals_per_epoch": "eval_steps"}[str(info.field_name)]
        if value is not None and info.data.get(other) is not None:
            raise ValueError(f"given beside training.{other}. Keep one of the two.")
        return value


class ResourcesSpec(Section):
    """`resources`: how many workers, and what each needs."""

    num_workers: Workers = Field(
        default=1, description="processes that train together; [min, max]: as many as there is room for"
    )
    growth_interval: Duration = Field(
        default="5m", description="least time between two growths of an elastic run"
    )  # type: ignore[assignment]
    gpus_per_worker: NotNegative | Literal["auto"] = Field(
        default="auto", description="1 where the cluster has GPUs for all workers, else 0"
    )
    cpus_per_worker: AboveZero = Field(default=1, description="CPUs that Ray reserves for a worker")
    labels: dict[str, str] = Field(default_factory=dict, description="Ray node labels that the workers need")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        default="PACK",
        description="together on few nodes, or spread over many; STRICT_ refuses anything else",
    )

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run steps with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that it takes."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_gpus(cls, value: float | str) -> float | str:
        if isinstance(value, (int, float)) and value > 1 and value != int(value):
            raise ValueError(f"{value} GPUs cannot be given. Write a share up to 1, or a whole number.")
        return value


class StorageSpec(Section):
    """`storage`: where runs live and which checkpoints stay."""

    path: Text | None = Field(default=None, description="runs and checkpoints; the cluster's where not given")
    keep_best: PositiveInt = Field(default=1, description="checkpoints kept for their evaluation loss")
    keep_latest: PositiveInt = Field(default=1, description="checkpoints kept for being the newest")


class RetrySpec(Section):
    """`retry`: how often a run is started again, and how long it may take."""

    worker_failure: Times = Field(
        default=2, description="new starts after a worker or its node was lost; or unlimited"
    )
    preemption: Times = Field(
        default="unlimited", description="new starts after workers were told to leave; or a number"
    )
    oom: Times = Field(
        default=0,
        description="new starts after memory ran out, each with half the rows per forward; or unlimited",
    )
    start_timeout: Duration = Field(default="10m", description="how long to wait for a place on the cluster")  # type: ignore[assignment]
    max_duration: Duration | None = Field(
        default=None, description="after so long the run saves a checkpoint and ends; waiting counts"
    )


class EvalSpec(Section):
    """`eval`: what is measured, on which rows."""

    datasets: tuple[DatasetSpec, ...] = Field(default=(), description="the held-out rows where none is given")
    metrics: tuple[Metric, ...] = Field(
        default=(),
        description="beside eval_loss; the task's own where none is given, for causal tasks none",
    )
    max_rows: PositiveInt | None = Field(default=None, description="evaluate at most so many rows")
    max_new_tokens: PositiveInt = Field(default=64, description="length of a generated answer")


class RegisterSpec(Section):
    """`register`: the adapter's name in the registry."""

    name: AdapterName | None = Field(
        default=None, description="the adapter's name; the job's where not given"
    )
    alias: Alias | None = Field(default=None, description="an alias that the new version takes")


class GateSpec(Section):
    """Exactly one of `all` and `any`: comparisons such as `eval_loss < base.eval_loss`."""

    all: tuple[Text, ...] | None = Field(default=None, description="every comparison must hold")
    any: tuple[Text, ...] | None = Field(default=None, description="one comparison must hold")


class RolloutSpec(Section):
    """`deploy.rollout`: how a version takes the place of the one before it."""

    canary_percent: Percent = Field(
        default=100,
        description="share of the alias's requests that the new version answers while it is watched",
    )
    sticky_key: Text = Field(
        default="user",
        description="a field of the request, or a header: requests of one value get one version",
    )
    shadow_percent: Percent = Field(
        default=0,
        description="share of the alias's requests that the new version answers too, seen by nobody",
    )
    bake: Duration = Field(
        default=0, description="how long it is watched before it takes the alias; 0: until raypeft promote"
    )
    rollback: GateSpec | None = Field(
        default=None, description="conditions over live metrics by which it is taken back; none: only by hand"
    )

    @property
    def is_watched(self) -> bool:
        """Whether the version is watched at all before it takes the alias."""
        return bool(self.canary_percent < 100 or self.shadow_percent or self.bake)


class ScaleSpec(Section):
    """`deploy.scale`: how many replicas there are, by how much is asked."""

    min_replicas: NonNegativeInt | None = Field(
        default=None, description="at least so many, 0 for none while nobody asks; deploy.num_replicas"
    )
    max_replicas: PositiveInt | None = Field(
        default=None, description="at most so many; the larger of the two others where not given"
    )
    idle_timeout: Duration = Field(default="5m", description="how long replicas that are not needed stay")  # type: ignore[assignment]


class EngineSpec(Section):
    """`deploy.engine`: what a replica's engine is told; `auto` leaves it to the engine."""

    max_context: PositiveInt | Literal["auto"] = Field(
        default="auto", description="tokens of prompt and answer together; auto: what the base allows"
    )
    max_batch_tokens: PositiveInt | Literal["auto"] = Field(
        default="auto", description="tokens of one forward over all requests"
    )
    max_adapters: PositiveInt | Literal["auto"] = Field(
        default="auto", description="adapters loaded at once; others wait on disk. auto: all that are served"
    )
    deterministic: bool = Field(
        default=False,
        description="the same log-probabilities to the bit, alone or in any batch (fp32 on CPU)",
    )
    quantization: Literal["auto", "none", "int8", "nf4"] = Field(
        default="auto", description="how the base's linear layers are kept; auto: as its files have them"
    )


class DeploySpec(Section):
    """`deploy`: present: the version that passes the gate is served."""

    gate: GateSpec | None = Field(
        default=None, description="conditions over the metrics; none: deploy always"
    )
    alias: Alias = Field(default="production", description="the alias that the deployed version takes")
    endpoint: Name | None = Field(
        default=None, description="the endpoint's name; from the base where not given"
    )
    num_replicas: PositiveInt = Field(default=1, description="processes that answer")
    gpus_per_replica: NotNegative | Literal["auto"] = Field(
        default="auto", description="1 where the cluster has GPUs, else 0"
    )
    cpus_per_replica: AboveZero = Field(default=1, description="CPUs and threads of a replica")
    rollout: RolloutSpec = Field(
        default=RolloutSpec(), description="how it takes the place of the version before"
    )
    scale: ScaleSpec | None = Field(
        default=None, description="replicas by demand; absent: num_replicas, always"
    )
    engine: EngineSpec = Field(default=EngineSpec(), description="what the engine is told")

    @property
    def bounds(self) -> tuple[int, int]:
        """The fewest and the most replicas."""
        if self.scale is None:
            return self.num_replicas, self.num_replicas
        low = self.num_replicas if self.scale.min_replicas is None else self.scale.min_replicas
        most = max(low, self.num_replicas) if self.scale.max_replicas is None else self.scale.max_replicas
        return low, most


def _switch(value: Any) -> Any:
    """`true` asks for a section with its defaults, `false` for none."""
    return {} if value is True else None if value is False else value


class MlflowSpec(Section):
    """`tracking.mlflow`: runs in MLflow, from a database file without a server to a server."""

    uri: Text | None = Field(
        default=None, description="sqlite:////abs/file.db or a server's URL; a database file beside the runs"
    )
    experiment: Text | None = Field(
        default=None, description="the experiment's name; the job's where not given"
    )


class TensorboardSpec(Section):
    """`tracking.tensorboard`: event files."""

    dir: Text | None = Field(default=None, description="their folder; tensorboard/ beside the runs")


class WandbSpec(Section):
    """`tracking.wandb`: runs in Weights & Biases (pip install "raypeft[wandb]")."""

    project: Text | None = Field(default=None, description="the project's name; the job's where not given")
    entity: Text | None = Field(default=None, description="the user or team; the key's own where not given")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: into files, which `wandb sync` uploads"
    )
    dir: Text | None = Field(default=None, description="the folder of its files; wandb/ beside the runs")


Mlflow = Annotated[MlflowSpec | None, BeforeValidator(_switch)]
Tensorboard = Annotated[TensorboardSpec | None, BeforeValidator(_switch)]
Wandb = Annotated[WandbSpec | None, BeforeValidator(_switch)]


class TrackingSpec(Section):
    """`tracking`: who is told of parameters, metrics and versions. Only the driver tells; none can stop a run."""

    mlflow: Mlflow = Field(default=MlflowSpec(), description="a database file; false: none")
    tensorboard: Tensorboard = Field(default=None, description="true, or a folder; absent: none")
    wandb: Wandb = Field(default=None, description="true, or a project; absent: none")


DeepSpeed = Literal["zero0", "zero1", "zero2", "zero3", "zero3-offload"] | str | dict[str, Any]


class JobSpec(Section):
    """One YAML file, every default filled in."""

    name: Name = Field(
        description="with the hash of spec and data, the run's identity; the file's stem if absent"
    )
    cluster: Text = Field(default="local", description="a cluster file or its name")
    model: ModelSpec = Field(description="the frozen base")
    data: DataSpec = Field(description="what it is trained on")
    adapter: AdapterSpec = Field(default=AdapterSpec(), description="what is trained")
    training: TrainingSpec = Field(default=TrainingSpec(), description="how it is trained")
    deepspeed: DeepSpeed = Field(
        default="zero2", description="a stage, a path to a DeepSpeed JSON, or its content"
    )
    resources: ResourcesSpec = Field(default=ResourcesSpec(), description="the workers")
    storage: StorageSpec = Field(default=StorageSpec(), description="runs and checkpoints")
    retry: RetrySpec = Field(default=RetrySpec(), description="how often and how long to try")
    secrets: dict[str, str] = Field(
        default_factory=dict, description="NAME: env, or file:/path; never a literal"
    )
    eval: EvalSpec = Field(default=EvalSpec(), description="what is measured")
    register_: RegisterSpec = Field(
        default=RegisterSpec(), alias="register", description="the name in the registry"
    )
    deploy: DeploySpec | None = Field(default=None, description="absent: registered, not deployed")
    sweep: SweepSpec | None = Field(
        default=None,
        description="many trials with other values of some keys; the best is what the job comes to",
    )
    tracking: TrackingSpec = Field(default=TrackingSpec(), description="who is told of the run")
