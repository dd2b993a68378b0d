"""What prompt methods know of a base, and which arguments it takes."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import transformers
from torch import Tensor, nn

from peft_dist.contract import BaseSizes
from peft_dist.errors import ConfigError

# Bases that know a token's place by its distance to others alone: padding before it changes nothing.
BY_DISTANCE = frozenset({"bloom", "mpt", "t5", "mt5", "umt5", "longt5", "switch_transformers"})


def base_sizes(base: Any, width: int) -> BaseSizes:
    """What prompt methods know of a base whose input embeddings are `width` wide; 0 for what it does not say."""
    facts = getattr(base, "config", None)
    if not isinstance(facts, transformers.PretrainedConfig):
        return BaseSizes(width, 0, 0, 0, 0, 0)
    whole, keeps = facts.get_text_config(), facts.get_text_config(decoder=True)
    # Tokens are as wide as the widest layer keeps them; narrower ones take their part.
    kv_heads, kv_width = max(kv_shapes(keeps), key=lambda shape: shape[1])
    return BaseSizes(
        width=width,
        num_layers=getattr(whole, "num_hidden_layers", None) or 0,
        num_heads=getattr(whole, "num_attention_heads", None) or 0,
        num_kv_layers=getattr(facts, "num_decoder_layers", None)
        or getattr(keeps, "num_hidden_layers", None)
        or 0,
        num_kv_heads=kv_heads,
        kv_width=kv_width,
        num_stacks=num_stacks(base),
    )


def kv_shapes(keeps: Any) -> list[tuple[int, int]]:
    """(heads, width of one) of the keys and values of each layer that a decoder's config says apart; one for all where
    they are equal."""
    layers = getattr(keeps, "per_layer_config", None) if getattr(keeps, "is_heterogeneous", False) else None
    return [_kv_shape(layer) for layer in ([keeps] if layers is None else layers)]


def _kv_shape(keeps: Any) -> tuple[int, int]:
    heads = getattr(keeps, "num_attention_heads", None) or 0
    kv_heads = getattr(keeps, "num_key_value_heads", None)
    if kv_heads is None and getattr(keeps, "multi_query", False):
        # Falcon: its newer decoders keep what each head reads.
        kv_heads = None if getattr(keeps, "new_decoder_architecture", False) else 1
    width = getattr(keeps, "head_dim", None) or getattr(keeps, "hidden_size", 0) // max(heads, 1)
    return kv_heads or heads, width


def num_stacks(base: Any) -> int:
    """2 for an encoder with a decoder, else 1."""
    has = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return 2 if has and "decoder_input_ids" in arguments(base) else 1


def has_decoder(base: Any) -> bool:
    """Whether it is an encoder with a decoder."""
    return num_stacks(base) == 2


def reads_one_way(base: Any) -> bool:
    """Whether each token of it sees those before it alone."""
    flags = [m.is_causal for m in base.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(flags) if flags else "past_key_values" in arguments(backbone(base))


def positions_of(base: Any) -> nn.Module | None:
    """The module that makes a decoder's position embeddings of positions that it counts by itself, where it can
    be told others."""
    module = getattr(base.get_decoder(), "embed_positions", None)
    return module if module is not None and "position_ids" in arguments(module) else None


def backbone(base: Any) -> Any:
    """The base below its head."""
    return getattr(base, "base_model", base)


def arguments(module: Any) -> tuple[str, ...]:
    """The names of what a module's forward takes, in order."""
    kind: Any = type(module)
    return _arguments_of(kind)


@functools.cache
def _arguments_of(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def refuse_recomputation(base: Any, what: str) -> None:
    """Raises ConfigError where layers of the base run again in the backward, and so keep no cache."""
    modules: Any = base.modules()
    if any(getattr(m, "gradient_checkpointing", False) for m in modules):
        raise ConfigError(
            f"{what}: does not work with gradient checkpointing, under which layers keep no keys and "
            "values. Call gradient_checkpointing_disable() on the base, or use another prompt method."
        )


def plain_mask(inputs: dict[str, Any], name: str) -> Tensor | None:
    """The mask `name` of the arguments, which must be one of positions; None where there is none."""
    mask = inputs.get(name)
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise ConfigError(
            f"{name}: virtual tokens need a mask of (sequences, positions). Give one, or leave it out."
        )
    return mask


def num_rows(inputs: dict[str, Any]) -> int:
    """How many sequences the arguments of a base with a decoder hold."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "labels"):
        if inputs.get(name) is not None:
            return inputs[name].shape[0]
    if inputs.get("encoder_outputs") is not None:
        return inputs["encoder_outputs"][0].shape[0]
    raise ConfigError("there is no input. Give input_ids.")
