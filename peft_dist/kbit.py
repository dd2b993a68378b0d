"""A quantised base made ready to be trained through: `prepare_model_for_kbit_training`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist.packed import settle_base
from peft_dist.sharding import cast_stored

# Quantisations whose half-precision tensors belong to their kernels and stay as they are.
_LEFT_AS_THEY_ARE = frozenset({"gptq", "aqlm", "eetq", "torchao", "hqq"})


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """`model` itself, frozen, with what is not quantised of it (norms, embeddings, the head) in fp32.

    Args:
        use_gradient_checkpointing: on a quantised base, recompute activations in the backward.
        gradient_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`. Unless `use_reentrant` is False
            in it, the embeddings' output is made to require a gradient, without which a reentrant checkpoint
            has none.
        auto_clear_cache: let go of the accelerator's memory that the fp16 tensors took.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    settle_base(model, model.modules())
    method = str(getattr(model, "quantization_method", None) or "").rpartition(".")[2].lower()
    is_left = method in _LEFT_AS_THEY_ARE or getattr(model, "hqq_quantized", False)
    if not is_left:
        _upcast(model)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    is_quantised = is_left or any(
        getattr(model, flag, False) for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit")
    )
    if is_quantised and use_gradient_checkpointing:
        _checkpoint(model, dict(gradient_checkpointing_kwargs or {}))
    return model


def prepare_model_for_int8_training(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The old name of `prepare_model_for_kbit_training`."""
    warnings.warn(
        "prepare_model_for_int8_training is deprecated. Use prepare_model_for_kbit_training.",
        FutureWarning,
        stacklevel=2,
    )
    return prepare_model_for_kbit_training(model, *args, **kwargs)


def _upcast(model: nn.Module) -> None:
    for parameter in model.parameters():
        # A 4-bit weight may be packed into halves; those are codes.
        is_packed = type(parameter).__name__ == "Params4bit"
        if parameter.dtype in (torch.float16, torch.bfloat16) and not is_packed:
            cast_stored(parameter, torch.float32)


def _checkpoint(model: Any, settings: dict[str, Any]) -> None:
    if settings.get("use_reentrant", True):
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(_require_grad)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)
