"""Bases from safetensors, with the head of a task: read part by part, quantised while they are read.

Nothing of a base is held that a rank does not keep: it is built on the meta device, and each tensor is read from
its file by positions, converted as transformers converts it, and quantised a chunk at a time, or taken as it is
where the file has bitsandbytes' codes. At stage 3 a rank
reads its own slices, up to the borders of their rows or blocks. Codes and statistics are those that transformers'
`from_pretrained` makes in one process, bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn

from peft_dist import packed
from peft_dist.errors import BaseModelError, suggest
from peft_dist.folder import is_hub_id
from peft_dist.inject import start_waiting
from peft_dist.lazy import lazy
from peft_dist.loading.codes import with_codes
from peft_dist.loading.config import explaining, read_config, set_labels
from peft_dist.loading.filling import Progress, check_filled, fill, start_the_rest, tie
from peft_dist.loading.keys import Group, Keys, conversions, match
from peft_dist.loading.pieces import fill_pieces
from peft_dist.loading.skeleton import OTHER, build, quantisation, quantised_weights, stored_quantisation
from peft_dist.loading.stored import Files
from peft_dist.loading.weight_files import fetched, weight_files
from peft_dist.ranks import Ranks
from peft_dist.sharding import bare, base_of, check_partitionable

deepspeed = lazy("deepspeed")
logger = logging.getLogger(__name__)

# The head that each task needs on top of the base; tasks whose head a base seldom has may start a new one.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_NEW_HEAD_ALLOWED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_FULL = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = {"zero_optimization": {"stage": 3}}


def load_base(
    path: str,
    task: str = "CAUSAL_LM",
    dtype: torch.dtype | str = torch.float32,
    quantization: Any = None,
    zero_stage: int = 0,
    *,
    deepspeed: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    into: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> Any:
    """The base model at `path`, in eval mode, with the head of `task`; its `begun_anew` names the tensors that its
    files do not hold, which begin with random values.

    At stages 0 to 2 it is whole on each rank; at stage 3 it comes back as `sharding.partition_base` leaves it, and
    no rank has read or held more than its part. All ranks of the process group then call this together.

    Args:
        path: a directory, an fsspec URL or a hub id.
        task: one of HF PEFT's task types.
        dtype: of the floating parameters; "auto" for the one they are stored in.
        quantization: None, "int8", "nf4" or "fp4" (with double quantisation), or a transformers.BitsAndBytesConfig.
            The output head, tied weights and a task's new head stay as they are, as `llm_int8_skip_modules` says.
            None too for a base whose files hold bitsandbytes' codes: they are kept as they are stored.
        zero_stage: 0, 1, 2 or 3.
        deepspeed: at stage 3, the config for `sharding.partition_base`; its `zero_optimization` may offload.
        device: where the base comes to and is quantised; None: the CPU, at stage 3 the rank's accelerator.
        into: a model on the meta device to give values to, in place of a new one: what `meta_base` made, also
            with adapters on it, which are started then. It is what is returned.
        revision: of a hub id: a branch, tag or commit.
        trust_remote_code: run the Python code that comes with the model.
        labels: names of the classes that its head tells apart, kept in its config; a head of another size that
            the base brings gives way to a new one. None: those of the base's own config.
        on_progress: called with the bytes that are done and the bytes of all, as this rank's part is read.

    Raises:
        BaseModelError: it is missing, has no safetensors, is cut short, lacks weights, or its architecture is
            unknown here; at stage 3 on all ranks, if one of them finds so.
        ShardingError: stage 3 without a process group.
    """
    sharded = zero_stage == 3
    ranks = Ranks(_refusal, alone=not (sharded and dist.is_initialized()))
    with contextlib.ExitStack() as opened:
        with ranks.failing_together():
            _check_stage(zero_stage, deepspeed)
            wanted = quantisation(quantization)
            place = _Place(path, task, revision, trust_remote_code)
            config = place.config(labels)
            stored = _stored(path, config, wanted)
            if stored == OTHER:
                _check_whole(path, sharded=sharded, into=into)
                return place.by_transformers(config, dtype, device)
            wanted = wanted or stored
            files = opened.enter_context(Files(place.files()))
            kept = _dtype(path, dtype, config, files, wanted)
            model = place.empty(config, kept, wanted) if into is None else into
            base = base_of(model)
            opened.enter_context(bare(base))
            _check_empty(base, wanted, is_given=into is not None)
            keys = place.keys(base, files, labels, are_codes=stored is not None)
        tie(base, keys, (ranks.rank, ranks.world), ranks.agree)
        with ranks.failing_together():
            place.check_complete(base, keys)
            start_the_rest(base)
        advance = _advance(keys, ranks.world, on_progress)
        at = _home(sharded, device)
        if sharded:
            fill_pieces(model, base, keys, deepspeed or _PLAIN, ranks, base.dtype, at, advance)
        else:
            fill(base, keys, at, advance)
            packed.keep_4bit(base)
        check_filled(base)
        place.finish(base)
        base.begun_anew = frozenset(keys.missing)
    if into is not None:
        start_waiting(model)
    return model


def meta_base(
    path: str,
    task: str = "CAUSAL_LM",
    dtype: torch.dtype | str = torch.float32,
    quantization: Any = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
) -> Any:
    """The base at `path` on the meta device, which holds no values: for adapters that are put on it before
    `load_base(..., into=model)` fills both. Arguments and errors are those of `load_base`.
    """
    place = _Place(path, task, revision, trust_remote_code)
    wanted = quantisation(quantization)
    config = place.config(labels)
    stored = _stored(path, config, wanted)
    if stored == OTHER:
        _check_whole(path, sharded=False, into=path)
    wanted = wanted or stored
    with Files(place.files()) as files:
        return place.empty(config, _dtype(path, dtype, config, files, wanted), wanted)


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of the base at `path`, every default of its architecture filled in.

    Raises:
        BaseModelError: there is none, or its architecture is unknown here.
    """
    source = path if is_hub_id(path) else str(fetched(path))
    return read_config(path, source, revision=revision, trust_remote_code=trust_remote_code)


class _Place:
    """Where a base is and what of it is wanted."""

    def __init__(self, path: str, task: str, revision: str | None, trust_remote_code: bool) -> None:
        if task not in AUTO_CLASSES:
            known = ", ".join(AUTO_CLASSES)
            raise BaseModelError(
                f"load_base: task is {task!r}; it is one of {known}.{suggest(task, AUTO_CLASSES)}"
            )
        self.path, self.task, self.revision, self.trusted = path, task, revision, trust_remote_code
        self.auto_class = getattr(transformers, AUTO_CLASSES[task])
        self.folder = fetched(path, revision)
        # Code and config keep the name of the repository that they come from.
        self.source = path if is_hub_id(path) else str(self.folder)

    def files(self) -> list[Path]:
        return weight_files(self.path, self.folder)

    def config(self, labels: Sequence[str] | None) -> Any:
        config = read_config(self.path, self.source, revision=self.revision, trust_remote_code=self.trusted)
        if labels is not None:
            set_labels(config, labels)
        return config

    def empty(self, config: Any, dtype: torch.dtype, wanted: Any) -> Any:
        """The model on the meta device."""
        with explaining(self.path, self.source):
            model = build(
                self.auto_class,
                config,
                dtype,
                trust_remote_code=self.trusted,
                quantization=wanted,
                heads=self.task in _NEW_HEAD_ALLOWED,
            )
        model.config.name_or_path = self.source
        return model

    def by_transformers(
        self, config: Any, dtype: torch.dtype | str, device: torch.device | str | None
    ) -> Any:
        """A base whose files hold codes of another library than bitsandbytes, that is installed."""
        with explaining(self.path, self.source):
            model, report = self.auto_class.from_pretrained(
                self.source,
                config=config,
                revision=self.revision,
                trust_remote_code=self.trusted,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
            )
        self._refuse_missing(model, report["missing_keys"])
        model.begun_anew = frozenset(report["missing_keys"])
        return model if device is None else model.to(device)

    def keys(self, base: Any, files: Files, labels: Sequence[str] | None, *, are_codes: bool) -> Keys:
        """What the files hold of the model.

        Args:
            are_codes: weights are stored quantised.

        Raises:
            BaseModelError: a tensor has another size than the config says.
        """
        mapping = conversions(base, self.auto_class)
        tensors = with_codes(files.tensors) if are_codes else files.tensors
        keys = match(base, tensors, mapping, base.dtype, frozenset(quantised_weights(base)))
        if keys.mismatched and labels is None:
            name, there, here = keys.mismatched[0]
            raise BaseModelError(
                f"base model: {self.path!r} cannot be loaded: {len(keys.mismatched)} of its tensors have other sizes "
                f"than its config says, such as {name}: {list(there)} in the files, {list(here)} by config.json. "
                "Take both from one model."
            )
        return keys

    def check_complete(self, base: Any, keys: Keys) -> None:
        """Refuses a model some of whose weights would be made up, and says which of the files' are not used."""
        self._refuse_missing(base, keys.missing)
        if keys.missing:
            logger.warning(
                "base model: %s begin anew, since %r does not hold them",
                ", ".join(sorted(keys.missing)),
                self.path,
            )
        if keys.unexpected:
            logger.warning(
                "base model: %d tensors of %r have no place in %s and are left out, such as %s",
                len(keys.unexpected),
                self.path,
                type(base).__name__,
                min(keys.unexpected),
            )

    def _refuse_missing(self, base: Any, keys: Iterable[str]) -> None:
        missing = sorted(keys)
        if self.task in _NEW_HEAD_ALLOWED:
            prefix = getattr(base, "base_model_prefix", "")
            missing = [key for key in missing if key.startswith(f"{prefix}.") or not prefix]
        if missing:
            raise BaseModelError(
                f"base model: the weights of {self.path!r} lack {len(missing)} tensors of {type(base).__name__}, "
                f"such as {missing[0]}. They were saved from another architecture, or for another task than "
                f"{self.task}."
            )

    def finish(self, base: Any) -> None:
        """What else `from_pretrained` does: eval mode, the settings of generation."""
        base.eval()
        if base.can_generate() and hasattr(base, "adjust_generation_fn"):
            base.adjust_generation_fn(
                None,
                True,
                None,
                self.source,
                cache_dir=None,
                force_download=False,
                proxies=None,
                local_files_only=False,
                token=None,
                revision=self.revision,
                subfolder="",
                trust_remote_code=self.trusted,
            )


def _refusal(who: str, why: str) -> BaseModelError:
    return BaseModelError(f"base model: {who} could not load its part. {why}")


def _check_stage(zero_stage: int, config: Mapping[str, Any] | None) -> None:
    if zero_stage not in (0, 1, 2, 3):
        raise BaseModelError(f"load_base: zero_stage is {zero_stage!r}; it is 0, 1, 2 or 3.")
    if zero_stage == 3:
        check_partitionable(config or _PLAIN)


def _check_empty(base: Any, wanted: Any, *, is_given: bool) -> None:
    """Refuses to fill a model that has values, or that is not quantised as it should be; `is_given`, not made here."""
    for name, parameter in base.named_parameters():
        if not parameter.is_meta:
            raise BaseModelError(
                f"load_base: {name} of the model given as into is on {parameter.device}, not on the meta device. Give "
                "what peft_dist.meta_base made, or leave into out."
            )
    if wanted is None or quantised_weights(base):
        return
    if not is_given:
        kinds = {type(layer).__name__ for layer in base.modules() if isinstance(layer, nn.Linear)}
        raise BaseModelError(
            f"load_base: no layer of {type(base).__name__} can be quantised: bitsandbytes takes torch's own nn.Linear "
            f"and transformers' Conv1D alone, and not the head. Its linear layers are "
            f"{', '.join(sorted(kinds)) or 'none'}. Leave quantization out."
        )
    raise BaseModelError(
        "load_base: the model given as into has no quantised layers, quantization says that it should. Make it "
        "with peft_dist.meta_base(..., quantization=...), before adapters are put on it."
    )


def _stored(path: str, config: Any, wanted: Any) -> Any:
    """The BitsAndBytesConfig of a base whose files hold codes already, OTHER for another library's, else None.

    Raises:
        BaseModelError: they do, and are to be quantised again.
    """
    found = stored_quantisation(config)
    if found is not None and wanted is not None:
        raise BaseModelError(
            f"base model: {path!r} is stored quantised; it cannot be quantised again. Leave quantization out, or name "
            "the base that it was made from."
        )
    return found


def _check_whole(path: str, *, sharded: bool, into: Any) -> None:
    if sharded or into is not None:
        raise BaseModelError(
            f"base model: {path!r} is stored quantised, not by bitsandbytes; its codes are read whole or not at all. "
            "Name the base that it was made from and set quantization, so that each rank reads and quantises its own "
            "part."
        )


def _dtype(path: str, asked: torch.dtype | str, config: Any, files: Files, wanted: Any) -> torch.dtype:
    """The dtype of the floating parameters; quantised ones are quantised from it."""
    dtype: Any = asked
    if asked == "auto":
        dtype = getattr(config, "dtype", None) or files.floating_dtype() or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise BaseModelError(
            f"load_base: dtype is {asked!r}; it is a floating torch.dtype, its name, or 'auto'."
        )
    if wanted is not None and dtype not in _FULL:
        raise BaseModelError(
            f"load_base: {path!r} cannot be quantised from {dtype}; bitsandbytes quantises fp32, bf16 and fp16. Give "
            "one of them as dtype."
        )
    return dtype


def _home(sharded: bool, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device(deepspeed.accelerator.get_accelerator().current_device_name() if sharded else "cpu")


def _advance(keys: Keys, world: int, on_progress: Progress | None) -> Any:
    sizes = {id(group): group.num_bytes() // world for group in keys.groups}
    total, done = sum(sizes.values()), 0

    def advance(group: Group) -> None:
        nonlocal done
        done += sizes.pop(id(group), 0)
        if on_progress is not None:
            on_progress(done, total)

    return advance
