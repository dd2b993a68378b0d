"""Base models from safetensors: a directory, an fsspec URL or a hub id, checked before they are loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn

from peft_dist.errors import BaseModelError, suggest
from peft_dist.folder import FolderError, check_safetensors, is_hub_id, local_folder

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
_FILES = ("*.json", "*.safetensors", "*.py", "*.bin", "*.model", "*.txt", "*.jinja")


def load_base(
    path: str,
    *,
    task: str = "CAUSAL_LM",
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
) -> nn.Module:
    """The base model at `path`, on the CPU, with the head of `task`.

    Args:
        path: a directory, an fsspec URL or a hub id.
        task: one of HF PEFT's task types.
        dtype: of the floating parameters; "auto" for the one they are stored in.
        revision: of a hub id: a branch, tag or commit.
        trust_remote_code: run the Python code that comes with the model.
        labels: names of the classes that its head tells apart, kept in its config; a head of another size that
            the base brings gives way to a new one. None: those of the base's own config.

    Raises:
        BaseModelError: it is missing, has no safetensors, is cut short, lacks weights, or its architecture is
            unknown here.
    """
    if task not in AUTO_CLASSES:
        known = ", ".join(AUTO_CLASSES)
        raise BaseModelError(
            f"load_base: task is {task!r}; it is one of {known}.{suggest(task, AUTO_CLASSES)}"
        )
    source = path
    if not is_hub_id(path):
        folder = _checked_folder(path)
        source = str(folder)
    auto_class = getattr(transformers, AUTO_CLASSES[task])
    try:
        config = transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: number for number, label in enumerate(labels)}
        model, report = auto_class.from_pretrained(
            source,
            config=config,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=labels is not None,
            key_mapping=_renamed(auto_class, config),
        )
    except (OSError, ValueError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        raise BaseModelError(_why(path, source, error)) from error
    _check_complete(path, task, model, report)
    return model


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of the base at `path`, every default of its architecture filled in.

    Raises:
        BaseModelError: there is none, or its architecture is unknown here.
    """
    source = path if is_hub_id(path) else str(_checked_folder(path))
    try:
        return transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseModelError(_why(path, source, error)) from error


def _renamed(auto_class: Any, config: Any) -> dict[str, str] | None:
    """Some classes keep the same base under another name than the language model that it was saved from:
    `LlamaForQuestionAnswering` calls `transformer` what `LlamaForCausalLM` calls `model`."""
    wanted = auto_class._model_mapping.get(type(config), None)
    saved = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    if wanted is None or saved is None or isinstance(wanted, tuple) or isinstance(saved, tuple):
        return None
    if auto_class is transformers.AutoModel or wanted.base_model_prefix == saved.base_model_prefix:
        return None
    if wanted.__name__ in (getattr(config, "architectures", None) or ()):
        return None
    return {rf"^{saved.base_model_prefix}\.": f"{wanted.base_model_prefix}."}


def _checked_folder(path: str) -> Path:
    """A local directory with config and whole safetensors; reads headers alone."""
    try:
        folder = local_folder(path, _FILES)
        _check_config(path, folder)
        for file in _weight_files(path, folder):
            check_safetensors(file)
    except FolderError as error:
        raise BaseModelError(f"base model: {error}") from error
    return folder


def _check_config(path: str, folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file():
        raise BaseModelError(f"base model: {path!r} has no config.json; it is not a model's directory.")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise BaseModelError(f"base model: {file} is not JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BaseModelError(f"base model: {file} names no model_type; it is not a model's config.")


def _weight_files(path: str, folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(f"base model: {index} is not an index of shards. Copy it again.") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise BaseModelError(
                f"base model: {path!r} lacks {len(missing)} of {len(names)} weight files: "
                f"{', '.join(missing[:3])}. "
                "Copy them beside model.safetensors.index.json."
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    if pickled:
        raise BaseModelError(
            f"base model: {path!r} has its weights in {pickled[0]}, which runs code when it is read; only "
            "safetensors are loaded. Convert it where you trust it: "
            "AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)."
        )
    raise BaseModelError(f"base model: {path!r} has no model.safetensors.")


def _why(path: str, source: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    if isinstance(error, ValueError | KeyError) and Path(source).is_dir():
        model_type = json.loads((Path(source) / "config.json").read_text()).get("model_type")
        if model_type not in transformers.CONFIG_MAPPING:
            return (
                f"base model: {path!r} is of model_type {model_type!r}, which transformers "
                f"{transformers.__version__} does not know. If the model brings its own code and you trust "
                "it, set "
                "trust_remote_code."
            )
    return f"base model: {path!r} cannot be loaded: {reason}"


def _check_complete(path: str, task: str, model: nn.Module, report: dict[str, Any]) -> None:
    """Refuses a model some of whose weights were made up because the files do not hold them."""
    missing = sorted(
        {*report.get("missing_keys", ()), *(key for key, *_ in report.get("mismatched_keys", ()))}
    )
    if task in _NEW_HEAD_ALLOWED:
        prefix = getattr(model, "base_model_prefix", "")
        missing = [key for key in missing if key.startswith(f"{prefix}.") or not prefix]
    if missing:
        raise BaseModelError(
            f"base model: the weights of {path!r} lack {len(missing)} tensors of {type(model).__name__}, "
            f"such as {missing[0]}. They were saved from another architecture, or for another task than "
            f"{task}."
        )
