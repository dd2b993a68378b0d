"""A base of which nothing is read yet: its model on meta, and what its files hold of each tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dist.errors import BaseModelError, MergeError
from peft_dist.loading.base import AUTO_CLASSES
from peft_dist.loading.codes import Codes, with_codes
from peft_dist.loading.config import explaining, read_config, set_labels
from peft_dist.loading.keys import Keys, conversions, match
from peft_dist.loading.pending import Pending
from peft_dist.loading.skeleton import OTHER, build, stored_quantisation
from peft_dist.loading.stored import Files
from peft_dist.loading.weight_files import fetched, weight_files
from peft_dist.merged.request import Request
from peft_dist.merged.stored_adapter import StoredTensors

_HEADS = ("score", "classifier", "qa_outputs")


class UnreadBase:
    """The base that a request names, with the head of its adapter's task.

    Args:
        adapter: its config. tensors: of the adapter.

    Attributes:
        folder: where its files are. model: on meta, each tensor of the dtype that it is stored in. pending: by name,
            what the files hold, unread; of codes what they stand for. from_codes: of such weights the dtype that they
            are written in unless another is asked for: the one that they compute in, as of a base in memory.

    Raises:
        BaseModelError: it is missing, damaged or cannot be built. MergeError: another library than bitsandbytes
            quantised it.
    """

    pending: dict[str, Pending]

    def __init__(self, request: Request, adapter: Any, tensors: StoredTensors) -> None:
        self.folder = fetched(request.base, request.revision)
        self.from_codes: dict[str, torch.dtype] = {}
        self._files = Files(weight_files(request.base, self.folder))
        try:
            self.model = self._empty(request, adapter, tensors)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes its files."""
        self._files.close()

    def _empty(self, request: Request, adapter: Any, tensors: StoredTensors) -> Any:
        source = str(self.folder)
        config = read_config(request.base, source, trust_remote_code=request.trust_remote_code)
        stored = stored_quantisation(config)
        if stored == OTHER:
            raise MergeError(
                f"{request.base!r} is stored quantised, not by bitsandbytes, so nothing here says what its codes stand "
                "for. Name the base that it was made from by --base."
            )
        held: Mapping[str, Pending] = (
            self._files.tensors if stored is None else with_codes(self._files.tensors)
        )
        config.__dict__.pop("quantization_config", None)
        _set_labels(config, adapter, tensors, request.labels)
        auto_class = _class_of(config, adapter)
        with explaining(request.base, source):
            model = build(
                auto_class,
                config,
                _own_dtype(held),
                trust_remote_code=request.trust_remote_code,
            )
        model.config.name_or_path = source
        turned = frozenset() if stored is None else _turned(model)
        keys = match(model, held, conversions(model, auto_class), model.dtype, turned)
        # A head that the adapter brings may be of another size.
        wrong = [each for each in keys.mismatched if f"base_model.model.{each[0]}" not in tensors]
        if wrong:
            name, there, here = wrong[0]
            raise BaseModelError(
                f"base model: {name} is {list(there)} in the files of {request.base!r} and {list(here)} by "
                "config.json. Take both from one model."
            )
        model.tie_weights()
        self.pending = _pending(keys, held, turned)
        _take_stored_dtypes(model, self.pending)
        if stored is not None:
            computes = stored.bnb_4bit_compute_dtype if stored.load_in_4bit else model.dtype
            are_codes = (group for group in keys.groups if isinstance(group.only_source, Codes))
            self.from_codes = {name: computes for group in are_codes for name in group.targets}
        return model


def _class_of(config: Any, adapter: Any) -> Any:
    """What makes the model of a config: the auto class of the adapter's task, else the base's own architecture."""
    if adapter.task_type in AUTO_CLASSES:
        found = getattr(transformers, AUTO_CLASSES[adapter.task_type])
        if type(config) in found._model_mapping or getattr(config, "auto_map", None):
            return found
    told = (adapter.auto_mapping or {}).get("base_model_class") if adapter.auto_mapping else None
    for name in (told, *(getattr(config, "architectures", None) or ())):
        for auto in AUTO_CLASSES.values():
            known = getattr(transformers, auto)
            classes = known._model_mapping.get(type(config), None)
            if name in {
                each.__name__ for each in (classes if isinstance(classes, tuple) else (classes,)) if each
            }:
                return known
        if name and hasattr(transformers, name):
            return _ByName(getattr(transformers, name))
    return transformers.AutoModelForCausalLM


class _ByName:
    """A class of transformers in the place of an auto class."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._model_mapping: dict[type, Any] = {}

    def from_config(self, config: Any, *, trust_remote_code: bool = False, dtype: Any = None) -> Any:
        """The model of a config."""
        return self._kind._from_config(config, dtype=dtype)


def _set_labels(config: Any, adapter: Any, tensors: StoredTensors, labels: Sequence[str]) -> None:
    """Gives a config as many classes as the adapter's head tells apart, and their names where they are known."""
    if labels:
        set_labels(config, labels)
        return
    if adapter.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return
    heads = [f"base_model.model.{head}{part}.weight" for head in _HEADS for part in ("", ".out_proj")]
    sizes = [tensors.shape(key)[0] for key in heads if key in tensors]
    if sizes and config.num_labels != sizes[0]:
        config.num_labels = sizes[0]


def _own_dtype(tensors: Mapping[str, Pending]) -> torch.dtype:
    """The dtype of the first floating tensor, by key, that is not stored as codes."""
    plain = (tensor for _, tensor in sorted(tensors.items()) if not isinstance(tensor, Codes))
    return next((tensor.dtype for tensor in plain if tensor.is_floating_point()), torch.float32)


def _turned(model: nn.Module) -> frozenset[str]:
    """Weights that are (in, out) in the model, and (out, in) where they are stored as codes."""
    return frozenset(f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D))


def _pending(keys: Keys, tensors: Mapping[str, Pending], turned: Collection[str]) -> dict[str, Pending]:
    """Each of the model's tensors that the files hold, unread, in the dtype that it is stored in."""
    found: dict[str, Pending] = {}
    for group in keys.groups:
        group.sources = [(name, key, pattern, tensors[key]) for name, key, pattern, _ in group.sources]
        made = group.converted(keys.outline)
        for name in group.targets:
            value = made[name]
            found[name] = value.T if name in turned and isinstance(value, Codes) else value
    return found


def _take_stored_dtypes(base: Any, pending: Mapping[str, Pending]) -> None:
    """Lets the base's empty tensors be of the dtypes that they are stored in."""
    done: set[int] = set()
    for name, value in pending.items():
        tensor = base.get_parameter_or_buffer(name)
        if isinstance(tensor, nn.Parameter) and id(tensor) not in done and tensor.dtype != value.dtype:
            tensor.data = torch.empty(tensor.shape, dtype=value.dtype, device="meta")
        done.add(id(tensor))
