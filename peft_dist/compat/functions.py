"""Functions of HF PEFT that programs call, in terms of this package."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist import checkpoint
from peft_dist.adapted import AdapterModule
from peft_dist.base_layer import door
from peft_dist.catalog import METHODS, prefix_of
from peft_dist.errors import CheckpointError, ConfigError, MismatchError
from peft_dist.replicate import replicate
from peft_dist.sharding import gathered
from peft_dist.targets import is_target
from peft_dist.tuner_layer import BaseTunerLayer

check_target_module_exists = is_target


class DoraCaching:
    """A context in which DoRA's weights may be kept between calls. Nothing is: they are computed for the whole
    layer at once, so the context changes no result and no time."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        return None

    def __call__(self, enabled: bool = True) -> None:
        """The same for good."""
        self.enabled = enabled


def match_target_against_key(target_pattern: str, key: str) -> Any:
    """The match of a regular expression with all of a module's name."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first pattern that matches the end of a name, or the name."""
    return next((p for p in pattern_keys if re.match(rf"(.*\.)?({p})$", key_to_match)), key_to_match)


def infer_device() -> str:
    """The kind of device to load to."""
    for name in ("cuda", "mps", "xpu"):
        module = getattr(torch, name, None) or getattr(torch.backends, name, None)
        if module is not None and module.is_available():
            return name
    return "cpu"


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A weight as (out, in), whichever way it is stored."""
    return weight.T if fan_in_fan_out else weight


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """A decoder's input: labels moved by one position, -100 become padding."""
    if pad_token_id is None:
        raise ConfigError("shift_tokens_right: pad_token_id is None. Give the base one.")
    start = input_ids.new_full((len(input_ids), 1), decoder_start_token_id)
    return torch.cat([start, input_ids[:, :-1]], dim=1).masked_fill_(
        torch.cat([start, input_ids[:, :-1]], dim=1) == -100, pad_token_id
    )


def create_attention_mask(
    model: Any,
    *,
    model_input: Any,
    attention_mask: Any,
    past_key_values: Any,
    cache_position: Any = None,
    **more: Any,
) -> Any:
    """The mask as transformers makes it for this base."""
    from_base = getattr(model, "create_masks_for_generate", None)
    masking = importlib.import_module("transformers.masking_utils")
    make = from_base or masking.create_masks_for_generate
    given = {
        "config": model.config,
        "inputs_embeds": model_input,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        **({} if cache_position is None else {"cache_position": cache_position}),
        **more,
    }
    return make(**given)


def load_peft_weights(
    model_id: str | Path,
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """A saved adapter's tensors by their names in the file."""
    saved = checkpoint.read(model_id, key_mapping=key_mapping, **kwargs)
    return {key: tensor.to(device or infer_device()) for key, tensor in saved.tensors.items()}


def torch_load(*args: Any, **kwargs: Any) -> Any:
    """Refused: what `torch.load` reads may run code."""
    raise CheckpointError(
        "torch_load: only safetensors are read. Convert the file where you trust it: safetensors.torch.save_file("
        "torch.load(FILE, weights_only=True), NEW_FILE)."
    )


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The base's tensors by their names in the bare base."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapters = {id(t) for m in base.modules() for t in _adapter_tensors(m)}
    found = {}
    for key, tensor in base.state_dict(keep_vars=True).items():
        if id(tensor) not in adapters:
            found[key.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor.detach()
    return found


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Fills the base's tensors by their names in the bare base.

    Raises:
        MismatchError: `strict`, and a name has no counterpart; nothing is changed.
    """
    own = get_base_model_state_dict(model)
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    if strict and (missing or unexpected):
        first = (missing or unexpected)[0]
        raise MismatchError(
            f"the base lacks {len(unexpected)} of these tensors, and they lack {len(missing)} of the base's; the "
            f"first is {first!r}. Is it another architecture?"
        )
    with torch.no_grad():
        for key, tensor in own.items():
            if key in state_dict:
                tensor.copy_(state_dict[key])
    return checkpoint.LoadResult(missing, unexpected)


def _adapter_tensors(module: nn.Module) -> list[Any]:
    if isinstance(module, AdapterModule):
        return [t for adapter in module.adapters for t in module.tensors(adapter).values()]
    if isinstance(module, BaseTunerLayer):
        parts = [part for _, _, part in module.adapter_parts()]
        return [t for part in parts for t in (part.parameters() if isinstance(part, nn.Module) else [part])]
    return []


def set_additional_trainable_modules(*args: Any, **kwargs: Any) -> None:
    """Refused: modules trained whole are a config's."""
    raise ConfigError(
        "set_additional_trainable_modules: name the modules in the config's modules_to_save instead."
    )


def fsdp_auto_wrap_policy(model: Any) -> Any:
    """Wraps decoder layers, and adapters' tensors by themselves where they alone are trained."""
    wrap = importlib.import_module("torch.distributed.fsdp.wrap")
    names = set(
        getattr(
            model.get_base_model() if hasattr(model, "get_base_model") else model, "_no_split_modules", None
        )
        or ()
    )
    layers = {type(module) for module in model.modules() if type(module).__name__ in names}

    def is_trained_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not list(module.children()) and weight is not None and weight.requires_grad

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return bool(
            wrap._or_policy(
                module,
                recurse,
                nonwrapped_numel,
                policies=[
                    lambda module, recurse, nonwrapped_numel: recurse or is_trained_leaf(module),
                    lambda module, recurse, nonwrapped_numel: recurse or type(module) in layers,
                ],
            )
        )

    return policy


@contextlib.contextmanager
def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: Any = None) -> Iterator[None]:
    """Within the context partitioned parameters are whole."""
    params = [param] if isinstance(param, Tensor) else list(param)
    with contextlib.ExitStack() as held:
        for each in params:
            held.enter_context(gathered(each))
        yield


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The weight of a layer as numbers, whatever its storage."""
    return door(module, type(module).__name__).weight()


@contextlib.contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Within the context modules are made without memory."""
    with torch.device("meta"):
        yield


def skip_init_on_device(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func`, whose modules have memory also where it is called within `init_empty_weights`."""

    @functools.wraps(func)
    def made(*args: Any, **kwargs: Any) -> Any:
        if torch.get_default_device().type != "meta":
            return func(*args, **kwargs)
        with torch.device("cpu"):
            return func(*args, **kwargs)

    return made


def get_quantization_config(model: Any, method: str) -> Any:
    """A base's quantisation settings where they are of `method`."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if config is not None and getattr(config, "quant_method", None) == method else None


def prepare_config(peft_config: Any, model: Any) -> Any:
    """An adaption prompt's config with its target filled in for a base."""
    if peft_config.target_modules is None:
        peft_config.target_modules = "attn" if model.config.model_type == "gpt2" else "self_attn"
    return peft_config


def build_peft_weight_mapping(
    weight_conversions: Any, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """How transformers' own `load_adapter` finds a saved adapter's tensors in a base that has it: the names of
    the file without what stands before the base's, and with the adapter's name.

    Conversions of the base's weights themselves, such as those that stack experts, are not an adapter's.
    """
    if not weight_conversions:
        return []
    renaming = importlib.import_module("transformers.core_model_loading").WeightRenaming
    types = [peft_config.peft_type] if peft_config is not None else list(METHODS)
    prefixes = sorted({prefix_of(str(peft_type)) for peft_type in types})
    return [
        renaming("base_model.model.model.", "model."),
        renaming("base_model.model.", ""),
        *(renaming(rf"({re.escape(prefix)}[^\.]*)", rf"\1.{adapter_name}") for prefix in prefixes),
        *(each for each in weight_conversions if isinstance(each, renaming)),
    ]


def replicate_layers(model: nn.Module, layer_map: Sequence[Sequence[int]]) -> None:
    """Repeats ranges of a base's layers, which share their weights."""
    replicate(model, layer_map, False)


def decompose_weight_matrix(weight: Tensor, top_k: int) -> dict[str, Any]:
    """W as its `top_k` first directions, frozen, and the rest, trained, as OSF takes it apart."""
    U, S, V = torch.linalg.svd(weight.float(), full_matrices=False)
    k = min(top_k, len(S))
    parts = {"U_high": U[:, :k], "S_high": S[:k], "V_high": V[:k]}
    low = {"U_low": U[:, k:], "S_low": S[k:], "V_low": V[k:]}
    frozen = {name: t.contiguous().to(weight.dtype) for name, t in parts.items()}
    trained = {name: nn.Parameter(t.contiguous().to(weight.dtype)) for name, t in low.items()}
    return {**frozen, **trained, "rank_high": k}


def project_gradient_to_orthogonal_space(svd_dict: Mapping[str, Any]) -> None:
    """Takes out of the gradients of the trained directions what lies in the frozen ones; in place."""
    for low, high, along in (("U_low", "U_high", 0), ("V_low", "V_high", 1)):
        gradient, Q = svd_dict[low].grad, svd_dict[high].to(svd_dict[low].dtype)
        if gradient is not None:
            gradient -= Q @ (Q.mT @ gradient) if along == 0 else (gradient @ Q.mT) @ Q


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def is_bnb_available() -> bool:
    """Whether bitsandbytes is there."""
    return _has("bitsandbytes")


is_bnb_4bit_available = is_bnb_available


def is_gptqmodel_available() -> bool:
    """False: this package has no door to such layers, nor to those below."""
    return False


is_aqlm_available = is_eetq_available = is_hqq_available = is_inc_available = is_gptqmodel_available
is_te_available = is_te_pytorch_available = is_torchao_available = is_optimum_available = (
    is_gptqmodel_available
)


def is_diffusers_available() -> bool:
    """Whether diffusers is there."""
    return _has("diffusers")


def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is there."""
    return _has("torch_xla")


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether an Intel GPU is there."""
    return hasattr(torch, "xpu") and torch.xpu.is_available()
