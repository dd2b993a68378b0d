"""ZeRO-3 for frozen weights: the engine that partitions a base, and the contexts that gather from it.

DeepSpeed owns the frozen weights and nothing else. The engine is built without an optimizer and the model is
called as `model(...)`; adapter tensors stay whole, outside the partition, and belong to `AdapterOptimizer`.
ZeRO: arXiv 1910.02054.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_dist import packed
from peft_dist.errors import ShardingError
from peft_dist.lazy import lazy
from peft_dist.resting import RestingLinear

deepspeed = lazy("deepspeed")

# A parameter that DeepSpeed may have partitioned: it then has `ds_shape`, `ds_tensor`, `ds_status` and more, which
# torch's type does not know.
Weight: TypeAlias = Any

_ENGINE = "_peft_dist_zero3_engine"
_ORDER = "_peft_dist_fetches"
_REGISTRY = "_peft_dist_in_flight"
_TRAINED = "_peft_dist_trained_in_pieces"
# What takes tokens, images or sounds, which need no gradient.
_FIRST = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What a base is partitioned with has no optimizer, no schedule and no precision of its own.
_NOT_FOR_A_BASE = (
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
_AHEAD, _DEFAULT_BUCKET = 2, 50_000_000
"""Blocks of the base that may be whole at once, one in use and one fetched ahead, or as many elements as DeepSpeed
fetches in one go, by default so many. It fetches at least one weight more at every module that runs, and would soon
hold the whole base."""
# What DeepSpeed may do to what it gathers.
_NOT_FOR_CODES = {
    "zero_quantized_weights": "quantise its pieces once more",
    "zero_quantized_nontrainable_weights": "quantise its pieces once more",
    "stage3_use_all_reduce_for_fetch_params": "add its pieces up instead of gathering them",
}


def is_partitioned(parameter: Weight) -> bool:
    """Whether DeepSpeed owns this parameter's storage (stage 3), gathered at this moment or not."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Weight) -> torch.Size:
    """The parameter's own shape, also while it rests in pieces and its `.shape` is (0,)."""
    return torch.Size(parameter.ds_shape) if is_partitioned(parameter) else parameter.shape


@contextlib.contextmanager
def gathered(parameters: Iterable[Weight | None], *, modify: bool = False) -> Iterator[None]:
    """Within the context the given parameters are whole on every rank; a collective if any rests in pieces.

    Parameters that are whole already (not partitioned, or gathered around us by a forward's hooks) are left
    as they are, so the context nests. With `modify=True` what rank 0 wrote is what every rank keeps
    afterwards;
    without it a change would be lost when the context ends, so it must not be made.

    Raises:
        ShardingError: `modify=True` for a parameter that a running forward or backward holds gathered.
    """
    partitioned = list({id(p): p for p in parameters if p is not None and is_partitioned(p)}.values())
    if not partitioned:
        yield
        return
    pieces = deepspeed.runtime.zero.partition_parameters
    for p in partitioned:
        if p.ds_status == pieces.ZeroParamStatus.INFLIGHT:
            _wait_for(p)
    resting = [p for p in partitioned if p.ds_status == pieces.ZeroParamStatus.NOT_AVAILABLE]
    if not modify:
        with deepspeed.zero.GatheredParameters(resting, enabled=bool(resting)):
            yield
        return
    in_use = [
        p
        for p in partitioned
        if p.ds_status == pieces.ZeroParamStatus.AVAILABLE and (p.ds_active_sub_modules or _in_context(p))
    ]
    if in_use:
        raise ShardingError(
            f"{len(in_use)} of {len(partitioned)} partitioned weights are in use by a running forward, "
            "backward or "
            "gather and cannot be changed now. Change weights between steps."
        )
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


def whole(parameter: Weight) -> Tensor:
    """A detached copy of the whole parameter, in its own dtype, on its device; a collective if it is "
    "partitioned."""
    with gathered([parameter]), torch.no_grad():
        return parameter.detach().clone()


def stored_bits(parameter: Weight) -> Tensor:
    """A copy of what this rank stores of the parameter: all of it, or its piece (flat); nothing is "
    "gathered."""
    return (parameter.ds_tensor if is_partitioned(parameter) else parameter).detach().clone()


@torch.no_grad()
def restore_bits(parameter: Weight, bits: Tensor) -> None:
    """Puts back, bit for bit, what `stored_bits` gave on this rank."""
    if not is_partitioned(parameter):
        parameter.data.copy_(bits)
        return
    parameter.ds_tensor.data.copy_(bits)
    available = deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.AVAILABLE
    if parameter.ds_status == available:
        # A small weight that stays gathered between steps would go on with its old values.
        parameter.partition()


@torch.no_grad()
def set_whole(parameter: Weight, value: Tensor) -> None:
    """Sets the parameter to `value` wherever its values are kept, cast to its dtype; also while a forward uses
    it.

    A parameter that a user's own DeepSpeed engine trains has an fp32 master in that engine, which the next
    step would write back over a plain copy: it is set too. Nothing is sent; every rank must call it.

    Args:
        value: of the parameter's whole shape, the same on every rank.
    """
    if is_partitioned(parameter):
        pieces = deepspeed.runtime.zero.partition_parameters
        if parameter.ds_status == pieces.ZeroParamStatus.INFLIGHT:
            _wait_for(parameter)
        size, rank = parameter.ds_tensor.numel(), parameter.ds_zero_partition_rank
        piece = piece_of(value, size, rank)
        parameter.ds_tensor.data.copy_(piece)
        if parameter.ds_status == pieces.ZeroParamStatus.AVAILABLE:
            parameter.data.copy_(value)
        if hasattr(parameter, "_z3_optimizer"):
            deepspeed.utils.safe_set_local_fp32_param(parameter, piece.to(parameter.device, torch.float32))
        return
    parameter.data.copy_(value)
    if hasattr(parameter, "_hp_mapping"):
        deepspeed.utils.safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))


def piece_of(value: Tensor, size: int, rank: int) -> Tensor:
    """What a rank keeps of `value`, flat: `size` elements from `rank` times that on, zeros after its end. It is a view
    of a contiguous `value` that does not end there."""
    own = value.flatten()[size * rank : size * (rank + 1)]
    missing = size - own.numel()
    return nn.functional.pad(own, (0, missing)) if missing else own


def rest_in_pieces(parameter: Weight, like: Weight) -> None:
    """Partitions a trained tensor as `like`, a weight of a partitioned base, is; a collective. The hooks of that base
    release it where it hangs in it; `reach` gathers it."""
    partition_like(parameter, like)
    parameter.ds_persist = False
    setattr(parameter, _TRAINED, True)


def rests_in_pieces(parameter: Weight) -> bool:
    """Whether `rest_in_pieces` was said of it."""
    return hasattr(parameter, _TRAINED)


def let_go(parameter: Weight) -> None:
    """Frees the whole values of a partitioned parameter, which its pieces have left behind."""
    if parameter.ds_status == deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.AVAILABLE:
        parameter.partition()


def reach(module: nn.Module, parameters: Iterable[Weight]) -> None:
    """Gathers what `module`, whose forward is running, uses of partitioned parameters that hang elsewhere.

    They are released after its forward, and gathered again for its backward, by the hooks that the engine
    put on `module`. Does nothing for parameters that are not partitioned.
    """
    for parameter in parameters:
        if is_partitioned(parameter):
            # A trained one stays until the end of the backward: its layer's hooks would release it before its use.
            if not rests_in_pieces(parameter):
                deepspeed.zero.register_external_parameter(module, parameter)
            if parameter.ds_status == deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.INFLIGHT:
                _wait_for(parameter)
            parameter.all_gather()


def whole_until_backward_ends(parameters: Iterable[Weight]) -> None:
    """Gathers, in a running backward, those of the parameters that rest in pieces; a collective if any does. They are
    let go when it ends."""
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        return
    states = deepspeed.runtime.zero.partition_parameters.ZeroParamStatus
    for p in partitioned:
        if p.ds_status == states.INFLIGHT:
            _wait_for(p)
    resting = [p for p in partitioned if p.ds_status == states.NOT_AVAILABLE]
    if not resting:
        return
    resting[0].all_gather(param_list=resting)

    def let_go_of_all() -> None:
        for p in resting:
            let_go(p)

    torch.autograd.Variable._execution_engine.queue_callback(let_go_of_all)  # type: ignore[attr-defined]


def layers_changed(base: nn.Module) -> None:
    """Lets the engine learn anew which parameters the layers of a partitioned base have, after some got others;
    also a user's own, while adapters that it trains are in the base.

    Raises:
        ShardingError: the base is partitioned and no engine is to be found.
    """
    if not any(is_partitioned(parameter) for parameter in base.parameters()):
        return
    order = base.__dict__.get(_ORDER) or _order_of(base)
    if not order.is_invalid_trace():
        order._invalidate_trace()
    # For a base that has no adapter any more.
    base.__dict__[_ORDER] = order
    if (engine := base.__dict__.get(_ENGINE)) is not None:
        # It would hold those that are gone.
        engine.param_names = {parameter: name for name, parameter in base.named_parameters()}


def _order_of(base: nn.Module) -> Any:
    """What fetches the parameters of a partitioned base's layers, in the order in which they run."""
    if (engine := base.__dict__.get(_ENGINE)) is not None:
        return engine.optimizer.get_param_coordinator()
    for parameter in base.parameters():
        if (trains := getattr(parameter, "_z3_optimizer", None)) is not None:
            return trains.parameter_offload.get_param_coordinator()
    raise ShardingError(
        "an engine of your own has partitioned this base and trains nothing in it: it cannot be told that layers are "
        "dequantised. Merge without dequantize, or partition the base by peft_dist.sharding.partition_base."
    )


def partition_like(parameter: nn.Parameter, other: Weight) -> None:
    """Partitions a whole frozen parameter as `other` is; a collective, of which rank 0's values are kept. Does
    nothing where `other` is whole."""
    if not is_partitioned(other) or is_partitioned(parameter):
        return
    other.convert_to_zero_parameters(param_list=[parameter])
    if (registry := getattr(other, _REGISTRY, None)) is not None:
        setattr(parameter, _REGISTRY, registry)


def cast_stored(parameter: Weight, dtype: torch.dtype) -> None:
    """Keeps the parameter's values in another dtype from now on, a rank's piece of them where it is partitioned."""
    if is_partitioned(parameter):
        if parameter.ds_status == deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.INFLIGHT:
            _wait_for(parameter)
        parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)
    parameter.data = parameter.data.to(dtype)


def elements_at_rest(model: nn.Module) -> int:
    """How many elements of the model's parameters this rank holds now: whole ones, or its own pieces."""
    held = 0
    parameter: Weight
    for parameter in model.parameters():
        held += parameter.numel()
        if is_partitioned(parameter):
            held += parameter.ds_tensor.numel()
    return held


def bytes_at_rest(model: nn.Module) -> int:
    """How many bytes of memory this rank holds of the base of `model` now, its adapters left out.

    Every storage that can be reached from its modules counts, once and whole: parameters, the pieces that
    DeepSpeed keeps of them, buffers, bitsandbytes' codes and statistics wherever they hang, tables that layers
    share.
    """
    base, storages = base_of(model), {}
    with bare(base):
        for module in base.modules():
            for tensor in _reachable(vars(module), set()):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(storages.values())


def _reachable(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors in `value`: in containers, on tensors, and in bitsandbytes' states."""
    if id(value) in seen or isinstance(value, nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if not value.is_meta:
            yield value
        yield from _reachable(vars(value), seen)
    elif isinstance(value, Mapping):
        for item in list(value.values()):
            yield from _reachable(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _reachable(item, seen)
    elif any(kind.__module__.startswith("bitsandbytes.") for kind in type(value).__mro__):
        yield from _reachable(vars(value), seen)


def disable_deepspeed_op_builds() -> None:
    """Declares every DeepSpeed op incompatible, so that none is ever compiled at run time; torch does the
    work.

    To be called before `init_distributed`: its shared-memory op takes a minute to compile, and a compilation
    that was killed leaves a lock file on which every later process waits for ever.
    """
    # Put in place of the table itself, since asking for it runs compilers to see which ops would build.
    vars(deepspeed.ops)["__compatible_ops__"] = collections.defaultdict(bool)


def partition_base(
    model: nn.Module,
    deepspeed_config: Mapping[str, Any],
    *,
    pieces: Callable[[str, Weight], Tensor] | None = None,
) -> None:
    """Partitions the base of `model` over the ranks (ZeRO-3) and freezes it; then call `model(...)` as
    before.

    `model` is a base, or a model with adapters on it, whose tensors stay whole on each rank. Adapters may be
    added, loaded and removed afterwards. Backward is `loss.backward()`, with gradient checkpointing and
    accumulation as usual. Parameters are taken from rank 0.

    Args:
        deepspeed_config: of it, `zero_optimization` and what concerns communication is used; batch sizes,
            clipping, optimizer and scheduler are not DeepSpeed's here.
        pieces: of a base that is on the meta device: gives this rank's piece, flat, of each such parameter of
            the bare base, in their order: ceil(elements / ranks) elements from rank times that on, fewer where
            the parameter ends. It may use collectives.

    Raises:
        ShardingError: the stage is not 3, a precision section is on, no process group is up, the base is
            partitioned already, is on the meta device with nothing to fill it, or has parameters that are
            trained beside its adapters.
    """
    check_partitionable(deepspeed_config)
    _check(model)
    _check_codes(base_of(model), deepspeed_config)
    config = _engine_config(deepspeed_config, base_of(model))
    disable_deepspeed_op_builds()
    base = base_of(model)
    with bare(base) as num_adapted:
        _freeze(base, num_adapted)
        for layer in base.modules():
            packed.make_partitionable(layer)
            if type(layer) is nn.Linear:
                layer.__class__ = RestingLinear
        _lay_out(base, config, pieces)
        with _led_by_a_float(base):
            engine, *_ = deepspeed.initialize(model=base, config=config)
    # Not a child module: the engine holds the base, and the base would then hold itself.
    base.__dict__[_ENGINE] = engine
    offload = engine.optimizer
    for parameter in base.parameters():
        if is_partitioned(parameter):
            setattr(parameter, _REGISTRY, base.ds_inflight_param_registry)
    _let_first_layers_require_grad(base)
    _release_when_done(base, offload)


def _lay_out(base: nn.Module, config: dict[str, Any], pieces: Callable[[str, Weight], Tensor] | None) -> None:
    """Makes of each meta parameter one that DeepSpeed has partitioned; none of them is ever whole."""
    empty = [(name, parameter) for name, parameter in base.named_parameters() if parameter.is_meta]
    if not empty:
        return
    if pieces is None:
        raise ShardingError(
            f"partition_base: {empty[0][0]} and {len(empty) - 1} more parameters are on the meta device. Fill the "
            "base with peft_dist.load_base(..., zero_stage=3, into=model), which partitions it too."
        )
    zero = config["zero_optimization"]
    for key in ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key, 0) > 1 or zero.get(key) is True:
            raise ShardingError(
                f"partition_base: zero_optimization.{key} needs each weight whole once; a base that is read in pieces "
                "never is. Leave the key out, or load the base first."
            )
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise ShardingError(
            "partition_base: zero_optimization.offload_param.device is nvme; a base that is read in pieces rests on "
            "its device or in memory. Write cpu."
        )
    layout = deepspeed.zero.Init(config_dict_or_path=config)
    for name, parameter in empty:
        piece = pieces(name, parameter)
        _no_longer_meta(parameter, layout.local_device)
        layout._convert_to_deepspeed_param(parameter)
        _rest(parameter, piece.detach(), layout)


def _no_longer_meta(parameter: Weight, device: torch.device) -> None:
    """The same Parameter, of its shape, on a device, where it takes one element: whoever holds it keeps it."""
    values = torch.empty((), dtype=parameter.dtype, device=device).expand(parameter.shape)
    other = torch.Tensor._make_subclass(type(parameter), values, False)  # type: ignore[arg-type]
    other.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, other)


def _rest(parameter: Weight, piece: Tensor, layout: Any) -> None:
    """Gives a parameter its piece, as if DeepSpeed had cut it."""
    world = parameter.ds_zero_partition_world_size
    size = -(-parameter.ds_numel // world)
    device = (
        layout.local_device
        if parameter.ds_persist
        else torch.device(getattr(layout.remote_device, "value", layout.remote_device))
    )
    piece = piece_of(piece, size, 0).to(device)
    if layout.pin_memory and device.type == "cpu":
        piece = deepspeed.accelerator.get_accelerator().pin_memory(piece)
    own: Any = piece
    own.ds_numel, own.final_location = size, None
    own.status = deepspeed.runtime.zero.partition_parameters.PartitionedParamStatus.AVAILABLE
    parameter.ds_tensor, parameter.ds_numel_aligned = own, size * world
    # It has its piece, so this only lets go of the rest.
    parameter.partition()


def base_of(model: Any) -> Any:
    """The base that a model with adapters has, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_partitioned_base(model: nn.Module) -> bool:
    """Whether `partition_base` was called on this model or on its base."""
    base = base_of(model)
    return _ENGINE in base.__dict__


def check_partitionable(config: Mapping[str, Any]) -> None:
    """Raises if no base can be partitioned with this config, or not in this process.

    Raises:
        ShardingError: the stage is not 3, a precision section is on, or no process group is up.
    """
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        raise ShardingError(
            f"partition_base: zero_optimization.stage is {stage}; only stage 3 partitions a base. At stages "
            "0 to 2 "
            "the base stays whole: leave this call out."
        )
    for section in ("fp16", "bf16"):
        if config.get(section, {}).get("enabled"):
            raise ShardingError(
                f"partition_base: {section}.enabled is true; DeepSpeed would cast every floating parameter, "
                "packed "
                "4-bit weights included. Leave the section out: the base keeps the dtype it was loaded in."
            )
    if not dist.is_initialized():
        raise ShardingError(
            "partition_base: no process group is up. Call torch.distributed.init_process_group first; one "
            "process "
            "needs no partition."
        )


def _check(model: nn.Module) -> None:
    if is_partitioned_base(model) or any(is_partitioned(p) for p in model.parameters()):
        raise ShardingError("partition_base: this base is partitioned already.")
    # DeepSpeed itself looks at the first parameter alone.
    first = next(model.parameters(), None)
    if first is not None and first.dtype == torch.float64:
        raise ShardingError(
            "partition_base: the base is torch.float64; ZeRO-3 keeps fp32, bf16 and fp16. Load it in one of "
            "them."
        )


def _check_codes(base: nn.Module, config: Mapping[str, Any]) -> None:
    """Raises if the codes of a quantised base would not be partitioned, or not be the same when gathered."""
    layers: list[tuple[str, Any]] = [
        (name, layer) for name, layer in base.named_modules() if packed.is_quantised(layer)
    ]
    for key, what in _NOT_FOR_CODES.items() if layers else ():
        if config["zero_optimization"].get(key):
            raise ShardingError(
                f"partition_base: zero_optimization.{key} is true and {layers[0][0]} is quantised; DeepSpeed would "
                f"{what}, and codes are no numbers. Leave it out."
            )
    for name, layer in layers:
        if getattr(layer.weight, "has_fp16_weights", False):
            raise ShardingError(
                f"partition_base: {name} is a {type(layer).__name__} with has_fp16_weights=True, which quantises its "
                "whole weight in each forward. Load the base with has_fp16_weights=False."
            )


def _bucket(config: Mapping[str, Any]) -> int:
    """Elements that DeepSpeed may fetch ahead in one go."""
    asked = config["zero_optimization"].get("stage3_prefetch_bucket_size")
    return asked if isinstance(asked, int) else _DEFAULT_BUCKET


def _largest_block(base: nn.Module) -> int:
    """Elements of the largest of the layers that a base repeats; of the whole base where none repeat."""
    stacks = [[*each] for each in base.modules() if isinstance(each, nn.ModuleList)]
    blocks = max(stacks, key=lambda blocks: sum(map(_elements, blocks)), default=[base])
    return max(map(_elements, blocks), default=1) or 1


def _elements(module: nn.Module) -> int:
    return sum(whole_shape(parameter).numel() for parameter in module.parameters())


def _engine_config(config: Mapping[str, Any], base: nn.Module) -> dict[str, Any]:
    ours = {key: value for key, value in config.items() if key not in _NOT_FOR_A_BASE}
    # A weight kept for a reuse that never comes (an evaluation has no backward) would rest whole on every rank,
    # as would each small one under a threshold above 0.
    leeway = {
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": max(_AHEAD * _largest_block(base), _bucket(config)),
    }
    # Of a mixture's block that is gathered as one, DeepSpeed would take its adapters' tensors for pieces too.
    # transformers stacks experts in one parameter: every rank reads it, whichever of them its tokens go to.
    blocks = deepspeed.runtime.zero.leaf_module_config.DEFAULT_LEAF_MODULE_CLASSES
    kinds = {f"{type(module).__module__}.{type(module).__qualname__}" for module in base.modules()}
    apart: dict[str, Any] = {"leaf_module": {"classes": []}} if kinds & {*blocks} else {}
    ours["zero_optimization"] = {**leeway, **apart, **config["zero_optimization"]}
    ours["train_micro_batch_size_per_gpu"] = 1
    return ours


@contextlib.contextmanager
def bare(base: nn.Module) -> Iterator[int]:
    """Within the context the adapted layers, whose number it gives, are replaced by the layers they adapt.

    DeepSpeed's hooks then sit on the base's own modules alone; on an adapter's modules they would ask
    parameters that are not partitioned for their pieces.
    """
    replaced = [
        (parent, key, child)
        for parent in base.modules()
        for key, child in parent._modules.items()
        if child is not None and not hasattr(parent, "base_layer") and hasattr(child, "base_layer")
    ]
    for parent, key, child in replaced:
        layer: Any = child
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        parent._modules[key] = layer
    try:
        yield len(replaced)
    finally:
        for parent, key, child in replaced:
            parent._modules[key] = child


@contextlib.contextmanager
def _led_by_a_float(base: nn.Module) -> Iterator[None]:
    """Within the context the first parameter of `base` is a float: DeepSpeed asks the first one's dtype, and knows
    none of a quantised layer's."""
    first = next(base.parameters(), None)
    if first is None or first.is_floating_point():
        yield
        return
    own = dict(base._parameters)
    base._parameters.clear()
    base.register_parameter("_leading", nn.Parameter(torch.zeros(1), requires_grad=False))
    for key, parameter in own.items():
        base.register_parameter(key, parameter)
    try:
        yield
    finally:
        del base._parameters["_leading"]


def _freeze(base: nn.Module, num_adapted: int) -> None:
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    if trained and num_adapted:
        raise ShardingError(
            f"partition_base: {len(trained)} of the base's own parameters are trained, such as "
            f"{trained[0]!r}; an "
            "engine without an optimizer keeps only frozen ones. Name their modules in modules_to_save "
            "instead."
        )
    base.requires_grad_(False)


def _let_first_layers_require_grad(base: nn.Module) -> None:
    """Makes what embeddings and convolutions give require a gradient.

    The hook that releases a layer after its backward hangs on the gradient of the layer's input; the first
    layer has none otherwise, and would rest whole on every rank from its first backward on. And a layer is gathered
    for its backward where its output needs a gradient: so on every rank, whatever is trained before it there.
    """

    def require(module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and output.is_floating_point():
            output.requires_grad_(True)

    for module in first_layers(base):
        module.register_forward_hook(require)


def first_layers(base: nn.Module) -> list[nn.Module]:
    """The layers of a base that take its input: embeddings and convolutions."""
    return [module for module in base.modules() if isinstance(module, _FIRST)]


def _release_when_done(base: nn.Module, offload: Any) -> None:
    """Releases, at the end of each backward and of each forward without one, what DeepSpeed's hooks left
    gathered:
    layers with no input that needs a gradient, and weights prefetched for a backward that does not come."""

    def release(_: Tensor | None = None) -> None:
        offload.release_backward_leftovers()
        _release(base)

    def release_at_the_end(_: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(release)  # type: ignore[attr-defined]

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        needing_grad = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        for tensor in needing_grad:
            tensor.register_hook(release_at_the_end)
        if not needing_grad:
            release()

    base.register_forward_hook(watch)


def _release(base: Any) -> None:
    pieces = deepspeed.runtime.zero.partition_parameters
    # One handle may stand for several parameters: all of them must leave the registry before they are
    # gathered again.
    for handle in base.ds_inflight_param_registry.values():
        handle.wait()
    base.ds_inflight_param_registry.clear()
    done = []
    for parameter in filter(is_partitioned, base.parameters()):
        kept = parameter.ds_persist or parameter.ds_active_sub_modules
        if (
            parameter.ds_status == pieces.ZeroParamStatus.AVAILABLE
            and not kept
            and not _in_context(parameter)
        ):
            done.append(parameter)
    if done:
        done[0].partition(param_list=done)


def _in_context(parameter: Any) -> bool:
    depth = deepspeed.runtime.zero.partition_parameters.DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR
    return getattr(parameter, depth, 0) > 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _wait_for(parameter: Any) -> None:
    """Ends the prefetch that is under way for a partitioned parameter; its hook would otherwise do so "
    "later."""
    registry = getattr(parameter, _REGISTRY, None)
    if registry is None and (trains := getattr(parameter, "_z3_optimizer", None)) is not None:
        registry = getattr(trains.parameter_offload.module, "ds_inflight_param_registry", None)
    if registry is not None and parameter in registry:
        registry.pop(parameter).wait()
