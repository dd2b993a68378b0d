"""Spec + cluster -> Plan: pure arithmetic, printed by `raypeft plan`, the same that the driver runs by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..cluster import ClusterFacts
from ..deepspeed_config import deepspeed_config
from ..deepspeed_config import warnings as deepspeed_warnings
from ..devices import recomputes_activations
from ..errors import SpecError
from ..spec.deepspeed_keys import offload_param, zero_stage
from ..spec.durations import format_duration
from ..spec.job import JobSpec
from ..spec.places import Tree, raise_all
from ..spec.quantization import Quantization, quantization_of
from ..spec.rules import accumulation, check_rules
from ..spec.rules import sizes as sizes_of
from ..spec.sharing import keeps_past, unshareable
from ..spec.tasks import TASKS, task_type
from ..spec.workers import GroupSize, forwards, numbers
from .adapter_sizes import AdapterSizes, adapter_sizes
from .memory import FP32, Memory, Step, estimate, is_known
from .model_sizes import ModelSizes
from .packing import packed_length, unpackable
from .placement import check_placement, gpu_memory, memory_shortage
from .row_lengths import RowFacts
from .serving import serving
from .task_heads import with_head

__all__ = ["Memory", "Plan", "make_plan"]

LONGEST = 2048
"""Tokens of a row where neither the job nor the base says less."""

FRAMEWORK_CPU = 590 * 2**20
"""Resident bytes of a CPU worker before it loads a base: Python, torch, transformers, Ray, DeepSpeed and the
buffers of a first step. Measured by benchmarks/memory_plan.py."""

FRAMEWORK_GPU = 900 * 2**20
"""Bytes that the CUDA context, its libraries and nccl's buffers take on a GPU."""


@dataclass(frozen=True)
class Plan:
    """How a job will run.

    `global_batch_size = num_workers * micro_batch_size * gradient_accumulation_steps`; of an elastic job at most, where
    its workers do not share the batch evenly.
    """

    num_workers: int
    """The most that it runs with; those of this attempt in a worker's own plan."""
    bundle: dict[str, float]
    """Ray resources of one worker: `{"CPU": 1}` or `{"CPU": 1, "GPU": 1}`."""
    placement: str
    labels: dict[str, str]
    zero_stage: int
    deepspeed: dict[str, Any]
    """The DeepSpeed config that the workers use."""
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    memory: Memory | None
    """None where the architecture is unknown; `notes` then says so."""
    fits: bool | None
    """None where the cluster or the memory is not known."""
    notes: tuple[str, ...] = field(default=())
    """What the plan does not know, and what it chose by itself."""
    sequence_len: int = LONGEST
    """Tokens of the longest row, by which memory is counted."""
    base_parameters: int | None = None
    adapter_parameters: int | None = None
    """Trained elements; None where the base's shapes are not known."""
    cluster: str = ""
    """Where the cluster's facts were read; empty where they are not known."""
    quantization: str | None = None
    """How the base's linear layers are kept: `int8`, `nf4+double`; None: in its own precision."""
    sizes: tuple[GroupSize, ...] = ()
    """The numbers of workers with which an elastic job steps, ascending; empty where the number is fixed."""
    serving: str | None = None
    """What its deployment comes to, in words; None: it is not deployed."""
    alone: str | None = None
    """Why no other run may train on its base at the same time, in a few words; None where others may."""

    @property
    def use_gpu(self) -> bool:
        """Whether each worker is given (part of) a GPU."""
        return self.bundle.get("GPU", 0) > 0

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of workers with which the job steps, ascending."""
        return tuple(size.num_workers for size in self.sizes) or (self.num_workers,)

    def at(self, num_workers: int, micro_batch_size: int | None = None) -> Plan:
        """The plan of one attempt: the same global batch over so many workers, so many rows a forward."""
        micro = micro_batch_size or self.micro_batch_size
        steps = forwards(self.global_batch_size, micro, num_workers)
        batch = {
            "train_batch_size": num_workers * micro * steps,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": steps,
        }
        config = {key: batch.get(key, value) for key, value in self.deepspeed.items()}
        return replace(
            self,
            num_workers=num_workers,
            micro_batch_size=micro,
            gradient_accumulation_steps=steps,
            deepspeed=config,
        )


def make_plan(
    spec: JobSpec, cluster: ClusterFacts | None, sizes: ModelSizes | None, rows: RowFacts = RowFacts()
) -> Plan:
    """The plan of a job.

    Args:
        cluster: None where it does not answer or was not asked.
        sizes: of the base; None where they could not be read.
        rows: what is known of the job's rows (`row_lengths.row_facts`).

    Raises:
        SpecError: sizes that do not divide, a DeepSpeed key that contradicts the job, targets that match nothing.
        PlacementError: more workers than the cluster can ever give, the autoscaler's maximum counted.
    """
    raise_all(Tree("job").errors([*check_rules(spec, (), []), *unpackable(spec, sizes)]))
    notes: list[str] = []
    bundle = _bundle(spec, cluster, notes)
    if cluster is None:
        notes.append("The cluster is not known: whether the workers fit is not checked.")
    else:
        check_placement(spec, bundle, cluster)
    _, batch = accumulation(spec)
    counts = sizes_of(spec)
    notes += _elastic(spec, counts)
    length = sequence_len(spec, sizes)
    if spec.data.sample_packing:
        shared = packed_length(spec, length, rows.longest, batch // counts[-1].num_workers)
        notes.append(
            f"Rows share sequences of up to {length} tokens; those of one step make at most {shared}."
        )
        length = shared
    elif rows.longest is not None and rows.longest < length:
        notes.append(f"The longest row has about {rows.longest} tokens, of {length} that are allowed.")
        length = rows.longest
    notes += [f"There is no '{path}' here: with this data the job does not run." for path in rows.absent]
    task = task_type(spec)
    adapter = adapter_sizes(spec.adapter, sizes, task, rows.labels) if sizes else None
    if sizes is not None:
        sizes = with_head(sizes, task, rows.labels)
        if adapter is None:
            notes.append(f"Memory is not estimated: the tensors of {spec.adapter.type} are not known here.")
        if task in ("SEQ_CLS", "TOKEN_CLS") and rows.labels is None:
            notes.append("How many labels the rows have is not known: the head on top is not counted.")
    memory = _memory(spec, bundle, sizes, adapter, length, notes)
    shortage = memory_shortage(spec, bundle, cluster, memory.total) if cluster and memory else None
    fits = _fits(bundle, cluster, memory, shortage, notes)
    notes += deepspeed_warnings(spec)
    return Plan(
        num_workers=counts[-1].num_workers,
        bundle=bundle,
        placement=spec.resources.placement,
        labels=dict(spec.resources.labels),
        zero_stage=zero_stage(spec.deepspeed),
        deepspeed=deepspeed_config(spec, sizes.hidden if sizes else None),
        micro_batch_size=spec.training.micro_batch_size,
        gradient_accumulation_steps=counts[-1].gradient_accumulation_steps,
        global_batch_size=batch,
        memory=memory,
        fits=fits,
        notes=tuple(notes),
        sequence_len=length,
        base_parameters=sizes.parameters if sizes else None,
        adapter_parameters=adapter.parameters if adapter else None,
        cluster=cluster.source if cluster else "",
        quantization=bits.name if (bits := _quantization(spec, sizes)) else None,
        sizes=counts if spec.resources.max_workers > spec.resources.min_workers else (),
        serving=serving(spec),
        alone=unshareable(spec) or (sizes.mixes_rows if sizes else None),
    )


def _elastic(spec: JobSpec, counts: tuple[GroupSize, ...]) -> list[str]:
    """What an elastic job does with its range, and which numbers of workers are passed over."""
    least, most = spec.resources.min_workers, spec.resources.max_workers
    if least == most:
        return []
    used = {size.num_workers for size in counts}
    left_out = [count for count in range(least, most + 1) if count not in used]
    often = format_duration(spec.resources.growth_interval)
    notes = [
        f"Elastic: it steps with {numbers(counts)} workers; the rows of a step stay the same. It grows at most once "
        f"in {often}."
    ]
    if left_out:
        shown = ", ".join(map(str, left_out[:8])) + (", ..." if len(left_out) > 8 else "")
        notes.append(f"Not used: {shown} workers, with which a step takes as many forwards as with fewer.")
    return notes


def sequence_len(spec: JobSpec, sizes: ModelSizes | None) -> int:
    """Tokens of the longest row: the job's word, else what the base allows, at most 2048."""
    if spec.data.sequence_len is not None:
        return spec.data.sequence_len
    return min(LONGEST, sizes.max_positions or LONGEST) if sizes else LONGEST


def _bundle(spec: JobSpec, cluster: ClusterFacts | None, notes: list[str]) -> dict[str, float]:
    resources = spec.resources
    gpus = resources.gpus_per_worker
    if gpus == "auto":
        most = max(cluster.max_gpus, sum(node.gpus for node in cluster.nodes)) if cluster else 0
        gpus = 1.0 if most >= resources.min_workers else 0.0
        if cluster is None:
            notes.append("GPUs are not known: planned without. resources.gpus_per_worker: 1 asks for them.")
        elif 0 < most < resources.min_workers:
            notes.append(
                f"The cluster has {most:g} GPUs for {resources.min_workers} workers: planned on CPU."
                f" resources.num_workers: {int(most)} would use them."
            )
    bundle = {"CPU": float(resources.cpus_per_worker)}
    return {**bundle, "GPU": float(gpus)} if gpus else bundle


def _memory(
    spec: JobSpec,
    bundle: dict[str, float],
    sizes: ModelSizes | None,
    adapter: AdapterSizes | None,
    length: int,
    notes: list[str],
) -> Memory | None:
    if sizes is None:
        notes.append("The base's sizes are not known: memory is not estimated.")
    if sizes is None or adapter is None:
        return None
    if not is_known(sizes):
        notes.append(f"Memory is not estimated: the activations of {sizes.architecture} are not known.")
        return None
    on_gpu = bundle.get("GPU", 0) > 0
    stage, compute_bytes = zero_stage(spec.deepspeed), _compute_bytes(spec.training.precision, on_gpu)
    return estimate(
        sizes,
        adapter,
        Step(
            rows=spec.training.micro_batch_size,
            length=length,
            compute_bytes=compute_bytes,
            recomputes=recomputes_activations(
                spec.training.gradient_checkpointing,
                on_gpu=on_gpu,
                num_parameters=sizes.parameters,
                keeps_past=keeps_past(spec.adapter.type),
            ),
            on_gpu=on_gpu,
            texts=_TEXTS.get(spec.data.datasets[0].type, 1),
            has_vocabulary=TASKS[spec.data.datasets[0].type].task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"),
            quantization=_quantization(spec, sizes, "fp32" if compute_bytes == FP32 else "bf16", stage),
            is_sharded=stage == 3 and spec.resources.min_workers > 1,
        ),
        stage=stage,
        num_workers=spec.resources.min_workers,  # fewer share more
        optimizer=spec.training.optimizer,
        framework=FRAMEWORK_GPU if on_gpu else FRAMEWORK_CPU,
        rests_elsewhere=on_gpu and offload_param(spec.deepspeed) is not None,
    )


def _quantization(
    spec: JobSpec, sizes: ModelSizes | None, precision: str = "fp32", stage: int = 0
) -> Quantization | None:
    """How the base is quantised: by the job, or in its files.

    Raises:
        SpecError: both.
    """
    asked, stored = quantization_of(spec.model, precision, stage), sizes.quantization if sizes else None
    if asked is not None and stored is not None:
        key = "load_in_8bit" if asked.bits == 8 else "load_in_4bit"
        raise SpecError(
            f"the base '{spec.model.base_model}' is stored quantised ({stored.name}), and cannot be quantised again.",
            where=f"model.{key}",
            hint="Leave it out, or name the base that it was made from.",
        )
    return asked or stored


_TEXTS = {"embedding": 3}
"""Sequences of a row at most, where it is more than one."""


def _compute_bytes(precision: str, on_gpu: bool) -> int:
    if precision == "auto":
        return 2 if on_gpu else 4
    return 4 if precision == "fp32" else 2


def _fits(
    bundle: dict[str, float],
    cluster: ClusterFacts | None,
    memory: Memory | None,
    shortage: str | None,
    notes: list[str],
) -> bool | None:
    if shortage:
        notes.append(
            f"{shortage} Lower training.micro_batch_size or data.sequence_len, set"
            " training.gradient_checkpointing: true, or shard the base with deepspeed: zero3."
        )
        return False
    if cluster is None or memory is None:
        return None
    is_measured = all(node.memory for node in cluster.nodes)
    if bundle.get("GPU"):
        is_measured = any(gpu_memory(node) for node in cluster.nodes)
    if not cluster.nodes or not is_measured:
        what = "GPUs' memory" if bundle.get("GPU") else "nodes' memory"
        notes.append(f"The {what} is not known: whether a worker fits is not checked.")
        return None
    return True
