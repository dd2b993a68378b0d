"""The job: one immutable object per section of the YAML. Rules inside a section stand here, rules across
sections in `rules.py`; loading, aliases and places in the file in `load.py`.

Names are those that users of Axolotl, Hugging Face and LLaMA-Factory know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt

from .durations import parse_duration

Duration = Annotated[float, BeforeValidator(parse_duration)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A strict, immutable part of the spec: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class ModelSpec(Section):
    base_model: str = Field(description="a directory, an fsspec URL or a hub id")
    revision: str = Field("main", description="the hub's branch, tag or commit; pinned to a commit when submitted")
    trust_remote_code: bool = Field(False, description="run code that the model's repository brings")


DatasetType = Literal["chat", "prompt_completion", "alpaca", "text"]


class DatasetSpec(Section):
    path: str = Field(description="JSONL, CSV, Parquet, a directory, a glob, an fsspec URL or a hub id")
    type: DatasetType = Field("chat", description="what the columns hold")
    split: str = Field("train", description="the split of a hub dataset or of a directory")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="rows are repeated or left out by this factor")
    field_messages: str | None = Field(None, description="chat: the column of the messages")
    field_prompt: str | None = Field(None, description="prompt_completion: the column of the prompt")
    field_completion: str | None = Field(None, description="prompt_completion: the column of the completion")
    field_instruction: str | None = Field(None, description="alpaca: the column of the instruction")
    field_input: str | None = Field(None, description="alpaca: the column of the input")
    field_output: str | None = Field(None, description="alpaca: the column of the output")
    field_text: str | None = Field(None, description="text: the column of the text")


class DataSpec(Section):
    datasets: Annotated[tuple[DatasetSpec, ...], Field(min_length=1)]
    val_set_size: Annotated[float, Field(ge=0)] | NonNegativeInt = Field(
        0.05, description="rows held out: a share below 1, else a number of rows"
    )
    sequence_len: PositiveInt | None = Field(None, description="tokens a row; what the base allows, at most 2048")
    overlong: Literal["truncate", "drop", "error"] = Field("truncate", description="what happens to longer rows")


class AdapterSpec(BaseModel):
    """`type` and `init_from` are ours; every other key is a field of the method's config (see `adapter.py`)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = Field("lora", description="a method of `raypeft methods`")
    init_from: str | None = Field(None, description="NAME@V, a directory or a hub id: train on from there")

    @property
    def fields(self) -> dict[str, Any]:
        """The keys that belong to the method's config, as written or resolved."""
        return dict(self.model_extra or {})


class TrainingSpec(Section):
    num_epochs: PositiveInt = Field(1, description="passes over the training rows")
    max_steps: PositiveInt | None = Field(None, description="stop after so many optimizer steps")
    micro_batch_size: PositiveInt = Field(1, description="rows per worker and forward")
    global_batch_size: PositiveInt | None = Field(None, description="rows per optimizer step over all workers")
    gradient_accumulation_steps: PositiveInt | None = Field(None, description="forwards per optimizer step")
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Share = Field(0.03, description="share of the steps over which the rate rises from zero")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="0 turns clipping off")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    seed: NonNegativeInt = 42
    base_dropout: bool = Field(False, description="keep the base's own dropout on while the adapter trains")
    save_steps: PositiveInt | None = Field(None, description="checkpoint every so many steps")
    saves_per_epoch: PositiveInt | None = Field(None, description="checkpoints per epoch; 1 where neither is given")
    eval_steps: PositiveInt | None = Field(None, description="evaluate every so many steps")
    evals_per_epoch: PositiveInt | None = Field(None, description="evaluations per epoch; 1 where neither is given")


class ResourcesSpec(Section):
    num_workers: PositiveInt = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="1 where the cluster has GPUs for all workers, else 0"
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    labels: dict[str, str] = Field(default_factory=dict, description="Ray node labels that the workers need")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"


class StorageSpec(Section):
    path: str | None = Field(None, description="runs and checkpoints; the cluster's where not given")
    keep_best: PositiveInt = Field(1, description="checkpoints kept for their evaluation loss")
    keep_latest: PositiveInt = Field(1, description="checkpoints kept for being the newest")


class RetrySpec(Section):
    start_timeout: Duration = Field("10m", description="how long to wait for a place on the cluster")  # type: ignore[assignment]


class EvalSpec(Section):
    datasets: tuple[DatasetSpec, ...] = Field((), description="the held-out rows where none is given")
    metrics: tuple[Literal["exact_match", "contains"], ...] = Field((), description="generated, beside eval_loss")
    max_rows: PositiveInt | None = Field(None, description="evaluate at most so many rows")
    max_new_tokens: PositiveInt = 64


class RegisterSpec(Section):
    name: str | None = Field(None, description="the adapter's name; the job's where not given")
    alias: str | None = Field(None, description="an alias that the new version takes")


class GateSpec(Section):
    """Exactly one of `all` and `any`: comparisons such as `eval_loss < base.eval_loss`."""

    all: tuple[str, ...] | None = None
    any: tuple[str, ...] | None = None


class DeploySpec(Section):
    gate: GateSpec | None = Field(None, description="conditions over the metrics; none: deploy always")
    alias: str = Field("production", description="the alias that the deployed version takes")
    endpoint: str | None = Field(None, description="the endpoint's name; from the base where not given")
    num_replicas: PositiveInt = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1


class JobSpec(Section):
    """One YAML file, every default filled in."""

    name: str
    cluster: str = Field("local", description="a cluster file or its name")
    model: ModelSpec
    data: DataSpec
    adapter: AdapterSpec = AdapterSpec()
    training: TrainingSpec = TrainingSpec()
    deepspeed: Literal["zero0", "zero1", "zero2", "zero3"] | str | dict[str, Any] = Field(
        "zero2", description="a stage, a path to a DeepSpeed JSON, or its content"
    )
    resources: ResourcesSpec = ResourcesSpec()
    storage: StorageSpec = StorageSpec()
    retry: RetrySpec = RetrySpec()
    secrets: dict[str, str] = Field(default_factory=dict, description="NAME: env, or file:/path; never a literal")
    eval: EvalSpec = EvalSpec()
    register_: RegisterSpec = Field(RegisterSpec(), alias="register")
    deploy: DeploySpec | None = Field(None, description="absent: registered, not deployed")
