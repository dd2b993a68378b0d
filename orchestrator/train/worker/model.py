"""The model of a run: the base as it was loaded, the adapter on it, sharded where the plan says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

import peft_dist
from orchestrator.devices import recomputes_activations
from orchestrator.errors import ModelError, SpecError, first_line
from orchestrator.runner import TrainRequest
from orchestrator.spec.adapter import peft_config
from orchestrator.spec.job import JobSpec
from orchestrator.spec.quantization import Quantization, quantization_of
from orchestrator.spec.sharing import keeps_past, looks_ahead
from orchestrator.spec.tasks import task_type
from peft_dist.base_layer.quantised import num_elements
from peft_dist.catalog import config_class
from peft_dist.errors import PeftDistError
from peft_dist.loading import load_base
from peft_dist.model import TASK_CLASSES
from peft_dist.sharding import is_partitioned

from ..group import Group
from .seat import ADAPTER, Seat
from .starts import Samples, prepare_base, start_adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_frozen_base(
    spec: JobSpec,
    precision: str,
    device: str,
    *,
    labels: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    shards: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The base in the run's dtype on the worker's device, quantised where the job says so, its own dropout silent
    unless `base_dropout`.

    Args:
        shards: DeepSpeed's config, where the base is partitioned over the ranks: each then reads its part alone.
        labels: of a head that tells them apart; a new head is the same on every rank and attempt.
        pad_token_id: for a config that names none, without which some decoders classify no two texts at once.
    """
    torch.manual_seed(spec.training.seed)
    stage = 0 if shards is None else 3
    quantised = quantization_of(spec.model, precision, stage)
    base = load_base(
        spec.model.base_model,
        task=task_type(spec),
        dtype=DTYPES[precision],
        revision=spec.model.revision,
        trust_remote_code=spec.model.trust_remote_code,
        labels=labels,
        quantization=_bitsandbytes(quantised) if quantised else None,
        zero_stage=stage,
        deepspeed=shards,
        device=device,
    )
    config: Any = base.config
    if getattr(config, "pad_token_id", None) is None and labels is not None:
        config.pad_token_id = pad_token_id
    if not spec.training.base_dropout:
        silence_dropout(base)
    if looks_ahead(spec.adapter.type):
        config.use_cache = False
    return base


def _bitsandbytes(wanted: Quantization) -> BitsAndBytesConfig:
    if wanted.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=wanted.quant_type,
        bnb_4bit_use_double_quant=wanted.double,
        bnb_4bit_compute_dtype=getattr(torch, wanted.compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, wanted.storage),
    )


def silence_dropout(base: nn.Module) -> None:
    """Sets every dropout rate of the base to zero: its modules' `p`, and the rates that its layers and config
    keep as numbers (`attention_dropout`, `resid_pdrop`, `layerdrop`, ...).

    The base stays in train mode, which gradient checkpointing needs; adapters bring their own dropout.
    """
    for owner in _rate_owners(base):
        for name, value in vars(owner).items():
            is_rate = isinstance(value, float) and ("drop" in name or (name == "p" and _is_dropout(owner)))
            if is_rate and value > 0:
                setattr(owner, name, 0.0)


def build_model(
    request: TrainRequest,
    base: nn.Module,
    group: Group,
    init_from: Path | None,
    total_steps: int,
    samples: Samples,
) -> nn.Module:
    """The base with the run's adapter alone, in train mode, gradient checkpointing as planned.

    Args:
        total_steps: of the run, for methods that have a schedule of their own.
        samples: of the training rows, for starts that look at them.
        init_from: a local adapter directory to train on from; None: a fresh adapter, the same on every rank.

    Raises:
        SpecError: the adapter's config does not fit the base (a target that matches nothing).
        ModelError: the adapter to train on from is of another kind or does not fit.
    """
    spec = request.spec
    torch.manual_seed(spec.training.seed)
    if init_from is None:
        model = _fresh(spec, base, total_steps, samples)
    else:
        model = _continued(spec, base, init_from)
    _made_ready(spec, model, base, group)
    return model


def bare_model(spec: JobSpec, base: nn.Module) -> nn.Module:
    """The base with no adapter yet, of the class that adapters of the job's task stand on; frozen."""
    return TASK_CLASSES.get(task_type(spec), peft_dist.PeftModel)(base, None)


def seat_on(
    request: TrainRequest,
    model: nn.Module,
    adapter: str,
    group: Group,
    init_from: Path | None,
    total_steps: int,
    samples: Samples,
) -> Seat:
    """A further adapter beside those of other runs: the one that `build_model` would have made, under another name.

    Raises:
        SpecError, ModelError: as `build_model`; the model is as it was.
    """
    spec, on = request.spec, Seat(model, adapter, is_shared=True)
    base = model.get_base_model()  # type: ignore[operator]
    torch.manual_seed(spec.training.seed)
    if init_from is None:
        _fresh(spec, base, total_steps, samples, on)
    else:
        _continued(spec, base, init_from, on)
    model.set_requires_grad(list(model.peft_config), True)  # type: ignore[operator, arg-type]
    _made_ready(spec, model, base, group)
    return on


def _made_ready(spec: JobSpec, model: nn.Module, base: nn.Module, group: Group) -> None:
    _move_adapter(model, torch.device(group.device))
    model.train()
    num_parameters = sum(num_elements(parameter) for parameter in base.parameters())
    if recomputes_activations(
        spec.training.gradient_checkpointing,
        on_gpu=group.device != "cpu",
        num_parameters=num_parameters,
        keeps_past=keeps_past(spec.adapter.type),
    ):
        recompute: Any = base.gradient_checkpointing_enable
        recompute(gradient_checkpointing_kwargs={"use_reentrant": False})


def _move_adapter(model: nn.Module, device: torch.device) -> None:
    """Brings what a start left elsewhere to the device; the base is there, or rests in pieces."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type != device.type and not is_partitioned(tensor):
            tensor.data = tensor.data.to(device)


def _fresh(
    spec: JobSpec, base: nn.Module, total_steps: int, samples: Samples, on: Seat | None = None
) -> nn.Module:
    fields = peft_config(spec.adapter, task_type(spec), total_steps=total_steps)
    if looks_ahead(spec.adapter.type):
        fields.setdefault("hidden_size", base.config.hidden_size)  # type: ignore[union-attr]
    try:
        config = config_class(spec.adapter.type.upper())(**fields)
        _train_what_begins_anew(base, config)
        prepare_base(base, config, samples)
        if on is not None:
            on.model.add_adapter(on.adapter, config)  # type: ignore[operator]
            with on.active():
                start_adapter(on.model, config, samples, on.adapter)
            return on.model
        model = peft_dist.get_peft_model(base, config, adapter_name=ADAPTER)
        start_adapter(model, config, samples, ADAPTER)
        return model
    except PeftDistError as error:
        raise SpecError(str(error), where="adapter") from error


def _train_what_begins_anew(base: Any, config: Any) -> None:
    """Has an adapter train and keep all that the base's files do not hold: what it stood on would be another else
    wherever it is loaded (DistilBERT's pre_classifier, the dense layer before ModernBERT's classifier)."""
    fresh = {name.partition(".")[0] for name in getattr(base, "begun_anew", ())}
    saved = list(getattr(config, "modules_to_save", None) or ())
    if fresh - set(saved):
        config.modules_to_save = [*saved, *sorted(fresh - set(saved))]


def _continued(spec: JobSpec, base: nn.Module, folder: Path, on: Seat | None = None) -> nn.Module:
    name = ADAPTER if on is None else on.adapter
    model: Any
    try:
        if on is None:
            model = peft_dist.PeftModel.from_pretrained(
                base, str(folder), adapter_name=name, is_trainable=True
            )
        else:
            model = on.model
            model.load_adapter(str(folder), name, is_trainable=True)
    except (PeftDistError, OSError) as error:
        raise ModelError(
            f"the adapter does not fit the base '{spec.model.base_model}': {first_line(error)}",
            where=f"adapter.init_from: {spec.adapter.init_from}",
            hint="Name an adapter that was trained on this base.",
        ) from error
    kind = model.peft_config[name].peft_type
    found = str(getattr(kind, "value", kind))
    if found.lower() != spec.adapter.type.lower():
        if on is not None:
            model.delete_adapter(name)
        raise ModelError(
            f"the adapter is of type '{found.lower()}', adapter.type says '{spec.adapter.type}'.",
            where=f"adapter.init_from: {spec.adapter.init_from}",
            hint=f"Write `type: {found.lower()}`.",
        )
    return model


def _rate_owners(base: nn.Module) -> Iterator[object]:
    yield from base.modules()
    for module in base.modules():
        if (config := getattr(module, "config", None)) is not None and hasattr(config, "__dict__"):
            yield config


def _is_dropout(owner: object) -> bool:
    return isinstance(owner, nn.modules.dropout._DropoutNd)
