"""The optimizer of adapter tensors: adds and removes adapters while training, shards like ZeRO, saves whole.

Adapter tensors are ours at every ZeRO stage: whole parameters, never in DeepSpeed's partition. What is
sharded, by whole tensors over the ranks and balanced by bytes, is the rest (ZeRO, arXiv 1910.02054):

    stage 0      gradients are summed on every rank, every rank updates every tensor
    stage 1      as 0, but a tensor's states live on one rank, its owner, which updates it and sends it to all
    stage 2, 3   as 1, but a gradient is summed on its owner alone and freed elsewhere

At stage 3 a large tensor itself rests in pieces, gathered from its layer's forward to the end of the backward; its
gradient, once reduced, and its states are in pieces too.

Small tensors travel together, so the number of collectives goes with bytes, not with tensors. All collectives
are entered by every rank in the order of `add`: a rank on which an adapter got no gradient takes part with
zeros.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from peft_dist.errors import OptimizerError
from peft_dist.gradients import keeps_gradient_whole, sums_gradient
from peft_dist.pooled import holder_of, is_gone, leave_pool
from peft_dist.sharding import (
    gathered,
    is_partitioned,
    let_go,
    piece_of,
    rest_in_pieces,
    rests_in_pieces,
    whole_shape,
)

_BUCKET_BYTES = 64 * 2**20
LARGE = 2**22
"""Elements from which on a trained tensor rests in pieces at stage 3: OSF's factors, whole modules, embeddings."""
_CONSTRAINT = "_peft_dist_constraint"


def constrain_before_update(parameter: Parameter | Tensor, constrain: Callable[[Tensor], None]) -> None:
    """Lets `constrain` bring the parameter's values back to where they may be, in place, before each of its updates:
    also on a rank whose rows do not name its adapter, and not where no rank's do."""
    setattr(parameter, _CONSTRAINT, constrain)


@dataclass(frozen=True)
class Hyper:
    """How one adapter is trained; the meaning of each number is torch.optim.AdamW's or SGD's.

    `max_grad_norm` bounds the 2-norm over all gradients of the adapter; 0 does not clip.
    """

    learning_rate: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 0.0


@dataclass
class _Tensor:
    """One trained tensor: its name within the adapter, and the group rank that owns its state."""

    name: str
    parameter: Parameter
    owner: int
    has_grad: bool = False  # on any rank, after `reduce`
    piece: Parameter | None = None  # of a large one at stage 3, what this rank has of it, flat

    @property
    def trained(self) -> Parameter:
        """What torch's optimizer steps on this rank."""
        return self.parameter if self.piece is None else self.piece


@dataclass
class _Adapter:
    hyper: Hyper
    tensors: list[_Tensor]
    torch_optimizer: torch.optim.Optimizer | None = field(default=None)  # None where this rank owns nothing


class AdapterOptimizer:
    """Trains the tensors of any number of adapters, each with its own hyperparameters.

    One step of a training loop, on every rank of the group:

        optimizer.zero_grad()
        ...backward over the rank's share, the loss divided by the global count of target tokens...
        optimizer.reduce()
        norms = optimizer.step()

    Updates equal torch.optim.AdamW's and SGD's to the bit: torch's own classes make them, one per adapter,
    over the tensors that this rank owns. A tensor without a gradient on any rank keeps its value and its
    state.

    Args:
        stage: the ZeRO stage, 0 to 3.
        group: the ranks that train together; the default group if None, one process if none is up.
        shard_from: at stage 3, tensors of at least so many elements on layers of a partitioned base rest in pieces:
            values, gradients once they are reduced, and states.
    """

    def __init__(
        self,
        stage: Literal[0, 1, 2, 3] = 0,
        group: dist.ProcessGroup | None = None,
        shard_from: int = LARGE,
    ) -> None:
        if stage not in (0, 1, 2, 3):
            raise OptimizerError(f"AdapterOptimizer: stage is {stage!r}; it is one of 0, 1, 2, 3.")
        self.stage = stage
        self.shard_from = shard_from
        self.group = group
        self._world = dist.get_world_size(group) if dist.is_initialized() else 1
        self._rank = dist.get_rank(group) if dist.is_initialized() else 0
        self._adapters: dict[str, _Adapter] = {}
        self._reduced: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they were added."""
        return tuple(self._adapters)

    def hyper(self, name: str) -> Hyper:
        """The adapter's hyperparameters, with its learning rate of now."""
        return self._adapter(name).hyper

    def owner(self, name: str, parameter: str) -> int:
        """The rank within the group that keeps this tensor's state and updates it (stage 0: each rank "
        "does)."""
        tensors = {tensor.name: tensor for tensor in self._adapter(name).tensors}
        return tensors[parameter].owner

    def state_bytes(self) -> int:
        """The bytes of optimizer state that this rank holds now."""
        return sum(
            value.numel() * value.element_size()
            for adapter in self._adapters.values()
            for values in (adapter.torch_optimizer.state.values() if adapter.torch_optimizer else ())
            for value in values.values()
            if isinstance(value, Tensor)
        )

    def add(self, name: str, named_params: Mapping[str, Parameter], hyper: Hyper) -> None:
        """Takes an adapter's tensors in; a collective: every rank adds the same adapters in the same order.

        All ranks go on from rank 0's values, so that different seeds cannot make ranks drift apart.

        Raises:
            OptimizerError: the name is taken, a tensor is not trainable, is trained already or is partitioned
                by DeepSpeed, or the ranks do not add the same.
        """
        tensors = [_Tensor(key, parameter, 0) for key, parameter in named_params.items()]
        complaint = self._complaint(name, tensors, hyper)
        self._check_same_on_all_ranks(name, tensors, hyper, complaint)
        if complaint:
            raise OptimizerError(complaint)
        self._assign_owners(tensors)
        for bucket in _buckets(t for t in tensors if not is_partitioned(t.parameter)):
            self._send(bucket, source=0)
        for tensor in tensors if self.stage == 3 and self._world > 1 else ():
            tensor.piece = self._piece_of(tensor.parameter)
        mine = [t.trained for t in tensors if self._steps(t)]
        for tensor in tensors:
            sums_gradient(tensor.parameter)
        self._adapters[name] = _Adapter(hyper, tensors, _torch_optimizer(mine, hyper) if mine else None)

    def remove(self, name: str) -> None:
        """Forgets the adapter's tensors and frees its state. Not a collective, yet every rank must do it."""
        self._adapter(name)
        del self._adapters[name]
        self._reduced.discard(name)

    def set_learning_rate(self, name: str, learning_rate: float) -> None:
        """Sets the learning rate of the adapter's next steps."""
        adapter = self._adapter(name)
        adapter.hyper = replace(adapter.hyper, learning_rate=learning_rate)
        if adapter.torch_optimizer:
            adapter.torch_optimizer.param_groups[0]["lr"] = learning_rate

    def zero_grad(self, names: Collection[str] | None = None) -> None:
        """Frees the gradients of the named adapters, or of every one."""
        for tensor in self._tensors(names):
            tensor.parameter.grad = tensor.trained.grad = None
            tensor.has_grad = False
        self._reduced -= self._chosen(names).keys()

    @torch.no_grad()
    def reduce(self, keep_whole: bool = False, names: Collection[str] | None = None) -> None:
        """Sums the gradients over the ranks; a collective. At stage 2 and 3 only a tensor's owner keeps the
        sum.

        Args:
            keep_whole: every rank keeps every sum, at any stage, as it does those of tensors that
                `keep_gradient_whole` was said of.
            names: of these adapters alone, the same on every rank.

        Raises:
            OptimizerError: gradients were reduced already and neither stepped nor zeroed since; or an adapter's
                tensors are no longer in the model.
        """
        chosen = self._chosen(names)
        if self._reduced & chosen.keys():
            raise OptimizerError(
                "AdapterOptimizer.reduce: these gradients are sums over the ranks already. "
                "Call step() or zero_grad() in between."
            )
        for name, adapter in chosen.items():
            if any(is_gone(tensor.parameter) for tensor in adapter.tensors):
                raise OptimizerError(
                    f"AdapterOptimizer.reduce: adapter {name!r} is not in the model as it was added: it was deleted, "
                    "or a checkpoint put other tensors in the place of its own. Call remove, and add what is there "
                    "now."
                )
        self._reduced |= chosen.keys()
        tensors = list(self._tensors(names))
        for tensor in tensors:
            tensor.has_grad = tensor.parameter.grad is not None
        if self._world == 1 or not tensors:
            return
        flags = torch.tensor([t.has_grad for t in tensors], dtype=torch.int32, device=self._device(tensors))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        for tensor, flag in zip(tensors, flags.tolist(), strict=True):
            tensor.has_grad = bool(flag)
        for tensor in tensors:
            if tensor.has_grad and tensor.piece is not None:
                self._sum_in_pieces(tensor, keep_whole or keeps_gradient_whole(tensor.parameter))
        used = [t for t in tensors if t.has_grad and t.piece is None]
        everywhere = [t for t in used if self.stage < 2 or keep_whole or keeps_gradient_whole(t.parameter)]
        for bucket in _buckets(everywhere):
            self._sum(bucket, owner=None)
        kept = {id(t) for t in everywhere}
        for owner, owned in self._by_owner([t for t in used if id(t) not in kept]):
            for bucket in _buckets(owned):
                self._sum(bucket, owner)

    @torch.no_grad()
    def step(self, scale: float = 1.0, names: Collection[str] | None = None) -> dict[str, float]:
        """Clips, updates and shares the tensors of every adapter that has gradients; a collective.

        Args:
            scale: what the loss was multiplied with (fp16); gradients are divided by it first.
            names: of these adapters alone, the same on every rank.

        Returns:
            Each adapter's gradient norm before clipping; nan or inf where a gradient was not finite: such an
            adapter is left as it was, tensors and state. 0.0 for one that no rank used.

        Raises:
            OptimizerError: several ranks, and `reduce` was not called since the last backward.
        """
        chosen = self._chosen(names)
        if self._world > 1 and not chosen.keys() <= self._reduced:
            raise OptimizerError("AdapterOptimizer.step: call reduce() first; gradients are not sums yet.")
        if left := chosen.keys() - self._reduced:
            self.reduce(names=left)
        self._reduced -= chosen.keys()
        norms: dict[str, float] = {}
        updated: list[_Tensor] = []
        for (name, adapter), norm in zip(chosen.items(), self._norms(chosen), strict=True):
            norm = norm / scale
            norms[name] = norm.item()
            used = [t for t in adapter.tensors if t.has_grad]
            if not used or not math.isfinite(norms[name]):
                continue
            for tensor in used:
                constrain = getattr(tensor.parameter, _CONSTRAINT, None)
                if constrain and tensor.piece is None:
                    constrain(tensor.parameter.data)
            self._update(adapter, used, norm, scale)
            updated.extend(t for t in used if t.piece is None)
            for tensor in used:
                if tensor.piece is not None:
                    let_go(tensor.parameter)
        if self.stage > 0 and self._world > 1:
            for owner, owned in self._by_owner(updated):
                for bucket in _buckets(owned):
                    self._send(bucket, source=owner)
        return norms

    def whole_state(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The state of every adapter, or of the named ones, whole, on the CPU of every rank; a collective.

        Keys are `NAME/PARAMETER/exp_avg`, `.../exp_avg_sq` and `.../step`. It does not depend on the number
        of ranks or the stage: `load_whole_state` goes on from it exactly. Tensors never stepped have no keys.
        """
        state: dict[str, Tensor] = {}
        for name, adapter in self._chosen(names).items():
            for tensor in adapter.tensors:
                for key, value in self._state_of(adapter, tensor).items():
                    if tensor.piece is not None and key != "step":
                        value = self._joined(tensor, value)
                    state[f"{name}/{tensor.name}/{key}"] = value.detach().cpu().clone()
        if self.stage == 0 or self._world == 1:
            return state
        return self._gather_state(state)

    def _steps(self, tensor: _Tensor) -> bool:
        """Whether this rank updates it, or its piece of it."""
        return tensor.piece is not None or self.stage == 0 or tensor.owner == self._rank

    def _piece_of(self, parameter: Parameter) -> Parameter | None:
        """What this rank has of a large tensor, which rests in pieces from now on; None for others."""
        if not is_partitioned(parameter):
            holder: Any = holder_of(parameter)
            layer = getattr(getattr(holder, "base", None), "layer", None)
            like = next(filter(is_partitioned, layer.parameters()), None) if layer is not None else None
            if like is None or holder.base.layer is holder or parameter.numel() < self.shard_from:
                return None
            leave_pool(parameter)
            rest_in_pieces(parameter, like)
        return Parameter(parameter.ds_tensor.data)  # type: ignore[attr-defined]

    def _sum_in_pieces(self, tensor: _Tensor, keep_whole: bool) -> None:
        """Sums a gradient over the ranks, each of which keeps the part of its own piece."""
        p, piece = tensor.parameter, tensor.trained
        flat = piece.new_zeros(piece.numel() * self._world)
        if p.grad is not None:
            flat[: p.grad.numel()] = p.grad.flatten()
        parts = flat.split(piece.numel())
        if keep_whole:
            dist.all_reduce(flat, group=self.group)
        else:
            for rank, part in enumerate(parts):
                dist.reduce(part, dst=self._global(rank), group=self.group)
        shape = whole_shape(p)
        p.grad = None
        piece.grad = parts[self._rank].clone()
        if keep_whole:
            with gathered([p]):
                p.grad = flat[: shape.numel()].view(shape)

    def _joined(self, tensor: _Tensor, part: Tensor) -> Tensor:
        """What all ranks have of a tensor as large as the parameter, whole."""
        parts = [torch.empty_like(part) for _ in range(self._world)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        shape = whole_shape(tensor.parameter)
        return torch.cat(parts)[: shape.numel()].view(shape)

    def load_whole_state(self, state: Mapping[str, Tensor], names: Collection[str] | None = None) -> None:
        """Replaces the state of every adapter, or of the named ones, by `whole_state`'s result. Each rank takes what it
        owns.

        Raises:
            OptimizerError: a key names no tensor of this optimizer, or a shape is another; nothing is
            changed.
        """
        per_tensor: dict[tuple[str, str], dict[str, Tensor]] = {}
        chosen = self._chosen(names)
        known = {(name, t.name): t for name, adapter in chosen.items() for t in adapter.tensors}
        for path, value in state.items():
            head, _, key = path.rpartition("/")
            name = next(
                (n for n in chosen if head.startswith(n + "/") and (n, head[len(n) + 1 :]) in known),
                None,
            )
            if name is None:
                raise OptimizerError(
                    f"AdapterOptimizer.load_whole_state: {path!r} names no trained tensor; "
                    f"adapters here: {', '.join(chosen) or 'none'}. Add the same adapters first."
                )
            shape = whole_shape(known[name, head[len(name) + 1 :]].parameter)
            if key != "step" and value.shape != shape:
                raise OptimizerError(
                    f"AdapterOptimizer.load_whole_state: {path!r} has shape {tuple(value.shape)}, "
                    f"the tensor has {tuple(shape)}."
                )
            per_tensor.setdefault((name, head[len(name) + 1 :]), {})[key] = value
        for (name, key), tensor in known.items():
            self._set_state(self._adapters[name], tensor, per_tensor.get((name, key), {}))

    # Ownership

    def _assign_owners(self, tensors: Iterable[_Tensor]) -> None:
        """Gives each tensor to the rank with the fewest bytes so far, the largest tensor first."""
        load = [0] * self._world
        for tensor in self._tensors():
            load[tensor.owner] += _size_bytes(tensor)
        for tensor in sorted(tensors, key=_size_bytes, reverse=True):
            tensor.owner = min(range(self._world), key=load.__getitem__)
            load[tensor.owner] += _size_bytes(tensor)

    def _by_owner(self, tensors: list[_Tensor]) -> Iterator[tuple[int, list[_Tensor]]]:
        for owner in range(self._world):
            owned = [tensor for tensor in tensors if tensor.owner == owner]
            if owned:
                yield owner, owned

    # Collectives

    def _send(self, bucket: list[_Tensor], source: int) -> None:
        """Every rank takes `source`'s values of these parameters."""
        if self._world == 1:
            return
        flat = _flat([t.parameter.detach() for t in bucket])
        dist.broadcast(flat, src=self._global(source), group=self.group)
        if self._rank != source:
            for tensor, values in zip(bucket, _slices(flat, bucket), strict=True):
                tensor.parameter.detach().copy_(values)

    def _sum(self, bucket: list[_Tensor], owner: int | None) -> None:
        """Sums these gradients over the ranks: to `owner` alone, freeing the others', or to all if None."""
        flat = _flat(
            [
                t.parameter.grad if t.parameter.grad is not None else t.parameter.new_zeros(t.parameter.shape)
                for t in bucket
            ]
        )
        if owner is None:
            dist.all_reduce(flat, group=self.group)
        else:
            dist.reduce(flat, dst=self._global(owner), group=self.group)
        for tensor, values in zip(bucket, _slices(flat, bucket), strict=True):
            tensor.parameter.grad = values if owner in (None, self._rank) else None

    def _gather_state(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        described = [(key, tuple(value.shape), value.dtype) for key, value in mine.items()]
        everyones: list[Any] = [None] * self._world
        dist.all_gather_object(everyones, described, group=self.group)
        gathered: dict[str, Tensor] = {}
        device = self._device(list(self._tensors()))
        for owner, entries in enumerate(everyones):
            for batch in _batches(entries, lambda e: math.prod(e[1]) * e[2].itemsize, lambda e: e[2]):
                values = [
                    mine[key] if owner == self._rank else torch.empty(shape, dtype=dtype)
                    for key, shape, dtype in batch
                ]
                flat = torch.cat([value.flatten() for value in values]).to(device)
                dist.broadcast(flat, src=self._global(owner), group=self.group)
                parts = flat.cpu().split([value.numel() for value in values])
                for (key, shape, _), part in zip(batch, parts, strict=True):
                    gathered[key] = part.reshape(shape).clone()
        order = [f"{name}/{t.name}/" for name, adapter in self._adapters.items() for t in adapter.tensors]
        rank_of = {prefix: index for index, prefix in enumerate(order)}
        return dict(sorted(gathered.items(), key=lambda item: rank_of[item[0].rpartition("/")[0] + "/"]))

    def _check_same_on_all_ranks(
        self, name: str, tensors: list[_Tensor], hyper: Hyper, complaint: str | None
    ) -> None:
        if self._world == 1:
            return
        facts = [(t.name, tuple(t.parameter.shape), str(t.parameter.dtype)) for t in tensors]
        digest = hashlib.sha256(
            repr((name, facts, hyper, self.stage, list(self._adapters))).encode()
        ).hexdigest()
        everyones: list[Any] = [None] * self._world
        dist.all_gather_object(everyones, (complaint, name, digest), group=self.group)
        for rank, (other, other_name, other_digest) in enumerate(everyones):
            if other:
                raise OptimizerError(other)
            if other_digest != everyones[0][2]:
                raise OptimizerError(
                    f"AdapterOptimizer.add: rank 0 adds {everyones[0][1]!r} and rank {rank} adds "
                    f"{other_name!r} "
                    "with other tensors, hyperparameters or adapters before it. Every rank adds the same "
                    "adapters "
                    "in the same order, also those whose rows it does not see."
                )

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank) if self.group else rank

    def _device(self, tensors: list[_Tensor]) -> torch.device:
        return tensors[0].parameter.device if tensors else torch.device("cpu")

    # One adapter's step

    def _norms(self, chosen: Mapping[str, _Adapter]) -> list[Tensor]:
        """Each adapter's gradient norm: every tensor's norm on its owner, put together the same on every "
        "rank."""
        tensors = [tensor for adapter in chosen.values() for tensor in adapter.tensors]
        sharded = self.stage >= 2 and self._world > 1
        mine = [t for t in tensors if t.has_grad and (not sharded or self._steps(t))]
        gradients = [t.trained.grad for t in mine if t.trained.grad is not None]
        found = torch._foreach_norm(gradients) if gradients else ()
        by_tensor = {id(t): norm for t, norm in zip(mine, found, strict=True)}
        dtype = torch.float64 if any(t.parameter.dtype == torch.float64 for t in tensors) else torch.float32
        zero = torch.zeros((), dtype=dtype, device=self._device(tensors))
        norms = torch.stack([by_tensor.get(id(t), zero).to(zero) for t in tensors]) if tensors else zero[None]
        if sharded:
            # A sum of one norm and of zeros, of pieces' squares; a nan or inf reaches every rank the same way.
            in_pieces = torch.tensor([t.piece is not None for t in tensors], device=norms.device)
            norms = torch.where(in_pieces, norms * norms, norms)
            dist.all_reduce(norms, group=self.group)
            norms = torch.where(in_pieces, norms.sqrt(), norms)
        counts = [len(adapter.tensors) for adapter in chosen.values()]
        return [torch.linalg.vector_norm(part) for part in norms.split(counts)] if counts else []

    def _update(self, adapter: _Adapter, used: list[_Tensor], norm: Tensor, scale: float) -> None:
        if adapter.torch_optimizer is None:
            return
        gradients = [t.trained.grad for t in used if t.trained.grad is not None and self._steps(t)]
        if not gradients:
            return
        bound = adapter.hyper.max_grad_norm
        if bound > 0:
            # As torch.nn.utils.clip_grad_norm_, to the bit.
            torch._foreach_mul_(gradients, torch.clamp(bound / (norm + 1e-6), max=1.0) / scale)
        elif scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        adapter.torch_optimizer.step()

    # State

    def _state_of(self, adapter: _Adapter, tensor: _Tensor) -> dict[str, Tensor]:
        if adapter.torch_optimizer is None:
            return {}
        state = adapter.torch_optimizer.state.get(tensor.trained, {})
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}

    def _set_state(self, adapter: _Adapter, tensor: _Tensor, values: Mapping[str, Tensor]) -> None:
        if adapter.torch_optimizer is None or not self._steps(tensor):
            return
        adapter.torch_optimizer.state.pop(tensor.trained, None)
        if values:
            # torch keeps the step count on the CPU, in float32, whatever the parameter is.
            adapter.torch_optimizer.state[tensor.trained] = {
                key: value.detach().clone() if key == "step" else self._own_part(tensor, value)
                for key, value in values.items()
            }

    def _own_part(self, tensor: _Tensor, value: Tensor) -> Tensor:
        """A copy of what this rank keeps of a tensor as large as the parameter."""
        if tensor.piece is None:
            return value.detach().to(tensor.parameter.device, copy=True)
        return piece_of(value, tensor.piece.numel(), self._rank).to(tensor.piece.device, copy=True)

    # Adapters

    def _tensors(self, names: Collection[str] | None = None) -> Iterator[_Tensor]:
        return (tensor for adapter in self._chosen(names).values() for tensor in adapter.tensors)

    def _chosen(self, names: Collection[str] | None) -> dict[str, _Adapter]:
        """The named adapters, or all, in the order in which they were added."""
        if names is None:
            return self._adapters
        for name in names:
            self._adapter(name)
        return {name: adapter for name, adapter in self._adapters.items() if name in names}

    def _adapter(self, name: str) -> _Adapter:
        if name not in self._adapters:
            raise OptimizerError(
                f"AdapterOptimizer: there is no adapter {name!r}. "
                f"There are: {', '.join(self.names) or 'none'}."
            )
        return self._adapters[name]

    def _complaint(self, name: str, tensors: list[_Tensor], hyper: Hyper) -> str | None:
        where = f"AdapterOptimizer.add({name!r})"
        if name in self._adapters:
            return f"{where}: the name is taken. Remove that adapter first, or use another name."
        if hyper.optimizer not in ("adamw", "sgd"):
            return f"{where}: optimizer is {hyper.optimizer!r}; it is one of 'adamw', 'sgd'."
        if not tensors:
            return f"{where}: it has no trainable tensor. Is the adapter loaded with is_trainable=True?"
        taken = {id(tensor.parameter) for tensor in self._tensors()}
        for tensor in tensors:
            if is_partitioned(tensor.parameter) and not rests_in_pieces(tensor.parameter):
                return (
                    f"{where}: {tensor.name!r} is in DeepSpeed's partition, whose engine would overwrite it. "
                    "Partition the frozen base alone: peft_dist.sharding.partition_base."
                )
            if not tensor.parameter.requires_grad:
                return f"{where}: {tensor.name!r} does not require a gradient; add trainable ones only."
            if id(tensor.parameter) in taken:
                return f"{where}: {tensor.name!r} is trained under another name already."
            taken.add(id(tensor.parameter))
        return None


_IN_ONE_PASS = (torch.float32, torch.float64)


def _torch_optimizer(parameters: list[Parameter], hyper: Hyper) -> torch.optim.Optimizer:
    if hyper.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=hyper.learning_rate, weight_decay=hyper.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=hyper.learning_rate,
        betas=hyper.betas,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        # torch's one pass, where it rounds as its loop does to the last bit or so and leaves the step count on the CPU.
        fused=all(p.device.type == "cpu" and p.dtype in _IN_ONE_PASS for p in parameters) or None,
    )


def _size_bytes(tensor: _Tensor) -> int:
    return tensor.parameter.numel() * tensor.parameter.element_size()


def _buckets(tensors: Iterable[_Tensor]) -> Iterator[list[_Tensor]]:
    """Tensors of one dtype and device each, in order, up to 64 MiB together or one larger tensor alone."""
    return _batches(tensors, _size_bytes, lambda t: (t.parameter.dtype, t.parameter.device))


def _batches(
    items: Iterable[Any], size: Callable[[Any], int], kind: Callable[[Any], Any]
) -> Iterator[list[Any]]:
    open_ones: dict[Any, list[Any]] = {}
    filled: dict[Any, int] = {}
    for item in items:
        key = kind(item)
        if filled.get(key, 0) and filled[key] + size(item) > _BUCKET_BYTES:
            yield open_ones.pop(key)
            filled[key] = 0
        open_ones.setdefault(key, []).append(item)
        filled[key] = filled.get(key, 0) + size(item)
    yield from open_ones.values()


def _flat(tensors: list[Tensor]) -> Tensor:
    """The tensors end to end; a single contiguous one is taken as it is, without a copy."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        return tensors[0].view(-1)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _slices(flat: Tensor, bucket: list[_Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.parameter.numel() for tensor in bucket])
    return [part.view(tensor.parameter.shape) for part, tensor in zip(parts, bucket, strict=True)]
