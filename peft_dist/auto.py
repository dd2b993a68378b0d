"""A base and its adapter at once, from the adapter's directory alone."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import transformers

from peft_dist import tasks
from peft_dist.config import PeftConfig
from peft_dist.errors import ConfigError
from peft_dist.folder import HUB_OPTIONS, is_hub_id, local_folder
from peft_dist.loading import AUTO_CLASSES, load_base
from peft_dist.model import PeftModel

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


def get_default_import_allowlist() -> list[str]:
    """The packages from which `auto_mapping` may name a base's class."""
    return ["diffusers", "lerobot", "megatron-core", "transformers"]


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """Whether a module is one of the packages, or inside one."""
    return any(parent_name == allowed or parent_name.startswith(f"{allowed}.") for allowed in allowlist)


def base_of(
    config: PeftConfig,
    import_allowlist: Sequence[str] | None = None,
    *,
    dtype: Any = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Any:
    """The base that a config names, with the head of its task, or of the class in its `auto_mapping`.

    Args:
        dtype: of the base; "auto" for the one it is stored in; None for fp32.
        kwargs: more arguments of the class's `from_pretrained`.

    Raises:
        ConfigError: the config names no base, or neither a task nor a class, or a class of a package that is not
            allowed. BaseModelError: that base cannot be loaded.
    """
    name = config.base_model_name_or_path
    if name is None:
        raise ConfigError("base_model_name_or_path is not given. Load the base, then the adapter on it.")
    if config.task_type is not None and not kwargs:
        return load_base(
            name,
            task=str(config.task_type),
            dtype="float32" if dtype is None else dtype,
            revision=config.revision,
            trust_remote_code=trust_remote_code,
        )
    if config.task_type is not None:
        found: Any = getattr(transformers, AUTO_CLASSES[str(config.task_type)])
    else:
        found = _mapped(config, import_allowlist)
    more = {"trust_remote_code": True} if trust_remote_code else {}
    # Pickled weights are refused, as everywhere here.
    return found.from_pretrained(
        name,
        revision=config.revision,
        use_safetensors=True,
        **({"dtype": dtype} if dtype else {}),
        **more,
        **kwargs,
    )


def _mapped(config: PeftConfig, import_allowlist: Sequence[str] | None) -> Any:
    mapping = config.auto_mapping
    if mapping is None:
        raise ConfigError(
            "the config has neither task_type nor auto_mapping, so the base's class is not known. Load the base, "
            "then the adapter on it."
        )
    library, name = mapping["parent_library"], mapping["base_model_class"]
    allowed = get_default_import_allowlist() if import_allowlist is None else import_allowlist
    if not check_import_allowlist(allowed, library):
        raise ConfigError(
            f"auto_mapping: wants to import {library!r}, which is not allowed. If it is safe, say "
            f"import_allowlist=[{library!r}]."
        )
    return getattr(importlib.import_module(library), name)


class AutoPeftModel:
    """The plain one, for an adapter without a task. Never made: ask `from_pretrained`."""

    task_type: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is not made by its name. Use {name}.from_pretrained(...).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The adapter of a directory or a hub id on the base that its config names.

        Args:
            import_allowlist: packages from which `auto_mapping` may name the base's class.
            kwargs: `subfolder` of the adapter; `token`, `cache_dir`, `local_files_only` and other arguments of
                the hub, for both; the rest goes to the base, such as `dtype`.

        Raises:
            ConfigError: the config names no base, or is of another task. BaseModelError: that base cannot be
                loaded.
        """
        where: dict[str, Any] = {key: kwargs[key] for key in ("token", *HUB_OPTIONS) if key in kwargs}
        if "subfolder" in kwargs:
            where["subfolder"] = kwargs.pop("subfolder")
        saved = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **where)
        if saved.task_type != cls.task_type and saved.task_type is not None:
            right = next(c.__name__ for c in _BY_TASK if c.task_type == saved.task_type)
            raise ConfigError(f"{cls.__name__}: the adapter's task_type is {saved.task_type}. Use {right}.")
        chosen = tasks.TASK_CLASSES.get(cls.task_type, PeftModel)
        if saved.task_type is None and saved.auto_mapping is None and cls.task_type is not None:
            saved.task_type = cls.task_type
        try:
            base = base_of(saved, import_allowlist, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"{pretrained_model_name_or_path}: {error}") from None
        _fit_vocabulary(base, pretrained_model_name_or_path, revision, where)
        return chosen.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name,
            is_trainable,
            config,
            revision=revision,
            **where,
        )


def _fit_vocabulary(base: Any, path: str | Path, revision: str | None, where: dict[str, Any]) -> None:
    """Gives the base the embeddings that a tokenizer beside the adapter needs."""
    if where.get("subfolder") or not hasattr(base, "get_input_embeddings"):
        return
    if is_hub_id(path):
        folder = local_folder(path, (TOKENIZER_CONFIG_NAME,), revision=revision, **where)
    else:
        folder = Path(path)
    if not (folder / TOKENIZER_CONFIG_NAME).is_file():
        return
    try:
        size = len(transformers.AutoTokenizer.from_pretrained(str(path), revision=revision, **where))
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: its tokenizer cannot be read: {error}", stacklevel=3)
        return
    if size > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(size)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """CAUSAL_LM."""

    task_type = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """SEQ_2_SEQ_LM."""

    task_type = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """SEQ_CLS."""

    task_type = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """TOKEN_CLS."""

    task_type = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """QUESTION_ANS."""

    task_type = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """FEATURE_EXTRACTION."""

    task_type = "FEATURE_EXTRACTION"


_BY_TASK = (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForFeatureExtraction,
)
