"""What all doors share: facts from sizes alone, tensors gathered, a weight added to in fp32 and put back.

Whether a weight is partitioned is asked at each call, since a base may be partitioned before or after its
adapters are injected. Shapes come from the parameters' own sizes and never gather.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_dist.contract import Kind, Site
from peft_dist.errors import BaseLayerError, RowsError
from peft_dist.pooled import outer_modules
from peft_dist.rows import Cut, Rows
from peft_dist.sharding import gathered, is_partitioned, restore_bits, stored_bits, whole_shape

# Where a wrapper keeps what it stands around.
_WRAPPED = ("base_layer", "original_module")


class Layer:
    """Any module with a bias or with parameters to replace; the root of all doors.

    Attributes:
        layer: the frozen module. site: its facts.
        key, bias_key: the names of its weight and bias.

    Args:
        layer: the frozen module.
        name: its dotted name in the base.
    """

    kind: Kind = "module"
    key = "weight"
    bias_key = "bias"
    # Whether the weight is used as a function's argument, so that an adapter acts by `substituted` alone.
    is_argument = False
    # Whether the weight is stored as codes, so that it is read and changed as a whole.
    is_quantised = False
    # Whether the layer's own call is under way, and runs what `within` was given.
    is_running = False

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer: Any = layer
        out, in_ = self._matrix_shape()
        bias = getattr(layer, self.bias_key, None)
        self.site = Site(
            name,
            out,
            in_,
            self.kind,
            self._kernel(),
            getattr(layer, "groups", 1) if self._kernel() else 1,
            whole_shape(bias).numel() if isinstance(bias, Tensor) else 0,
            self._tensors(),
            self._experts(),
        )

    def _matrix_shape(self) -> tuple[int, int]:
        return 0, 0

    def _kernel(self) -> tuple[int, ...]:
        return ()

    def _experts(self) -> int:
        return 0

    def _tensors(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        # Layers in it that others have wrapped keep their names.
        return tuple(
            (
                ".".join(part for part in (*name.split("."), key) if part and part not in _WRAPPED),
                _shape_of(p),
            )
            for name, module in outer_modules(self.layer)
            for key, p in module._parameters.items()
            if p is not None
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.site.out, self.site.in_

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        return next((p.dtype for p in self.layer.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where its weight lives; a partitioned weight's is where it is gathered."""
        return next((p.device for p in self.layer.parameters()), torch.device("cpu"))

    @property
    def parameter(self) -> nn.Parameter | None:
        """The Parameter that holds the weight, as it is stored; None where the layer has none."""
        return self.layer._parameters.get(self.key)

    def adopt(self) -> None:
        """The layer gets an adapter: what must hold from now on, without changing any value that it has."""
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_running:
            return type(self.layer).forward(self.layer, *args, **kwargs)
        return self.layer(*args, **kwargs)

    def within(
        self, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any], again: Callable[..., Any] | None
    ) -> Any:
        """run(*args, **kwargs) as the layer's own call: between its hooks, which gather the weight for the forward
        and for the backward. `again(run, ...)`, where it is given, lets the backward run it anew."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.is_running = True
            try:
                return _with_a_backward(run(*args, **kwargs))
            finally:
                self.is_running = False

        own = self.layer.__dict__
        own["forward"] = call if again is None else functools.partial(again, call)
        try:
            return self.layer(*args, **kwargs)
        finally:
            del own["forward"]

    def tensor(self, key: str) -> Tensor:
        """The layer's parameter or buffer `key`, whole and detached; a collective if it is partitioned."""
        above, _, last = key.rpartition(".")
        parameter = getattr(self.layer.get_submodule(above) if above else self.layer, last)
        # The alias outlives the context: DeepSpeed lets go of the gathered storage, it does not free it.
        with gathered([parameter]):
            return parameter.detach()

    def weight(self) -> Tensor:
        """W (out, in), whole and detached; a collective if it is partitioned."""
        return self._as_matrix(self.tensor(self.key))

    def bias(self) -> Tensor | None:
        """b (out,), whole and detached, or None; a collective if it is partitioned."""
        return self.tensor(self.bias_key) if self.site.bias else None

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        """The layer with W (rows, in) in place of its weight, without bias: x (..., in) -> (..., rows)."""
        raise BaseLayerError(
            f"{self.site.name}: a {type(self.layer).__name__} has no weight matrix to apply."
        )

    def mix(self, M: Tensor, h: Tensor) -> Tensor:
        """M (rows, channels) over the channels of h: (..., channels) -> (..., rows)."""
        return F.linear(h, M)

    def plus(self, W: Tensor, dW: Tensor) -> Tensor:
        """W + dW, for any two matrices that `apply` takes; torch adds nothing in 8-bit floats."""
        return W.to(dW.dtype) + dW if W.dtype.itemsize == 1 else W + dW

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the shape that the layer stores its weight in; no copy."""
        return self._as_stored(matrix)

    def cut(self, rows: Rows, length: int | None) -> Cut:
        """How a call of the layer is taken apart by rows, where its weight is an argument."""
        return Cut(rows, self.site, length)

    def check_cut(self, args: tuple, kwargs: dict[str, Any], num: int) -> None:
        """Whether a call of the layer on one packed row of `num` positions can be taken apart between them, where its
        weight is an argument.

        Raises:
            RowsError: it cannot.
        """
        raise RowsError(
            f"{self.site.name}: its weight is used as a function's argument, so that a row that many adapters "
            "serve cannot be run through it. Run one adapter at a time, or leave the layer out."
        )

    def add_(self, dW: Tensor) -> None:
        """Adds dW (out, in) to the weight in place, in fp32, rounded once to the weight's dtype; a
        collective if it is partitioned: rank 0's result is what every rank keeps."""
        self._add(self.key, self._as_stored(dW))

    def add_bias_(self, b: Tensor) -> None:
        """Adds b (out,) to the bias in place; a collective if it is partitioned.

        Raises:
            BaseLayerError: the layer has no bias.
        """
        if not self.site.bias:
            raise BaseLayerError(
                f"{self.site.name}: this layer has no bias to add to. Do not merge; keep the adapter."
            )
        self._add(self.bias_key, b)

    def exchange_(self, dW: Tensor) -> Tensor | None:
        """Adds dW as `add_` does, into memory of the sum's own, and gives the stored weight as it was: no copy
        of it is made. None, and nothing is changed, where a weight cannot be exchanged. dW is used up."""
        parameter, kind = self.parameter, type(self)
        own_ways = kind.add_ is not Layer.add_ or kind._add is not Layer._add
        if own_ways or type(parameter) is not nn.Parameter or is_partitioned(parameter) or parameter.is_meta:
            return None
        old, change = parameter.data, self._as_stored(dW)
        exact = _exact(old.dtype)
        change = change.to(old.device, exact)
        if old.dtype == exact and change.is_contiguous():
            parameter.data = change.add_(old)
        else:
            parameter.data = rounded(old.to(exact) + change, old.dtype)
        return old

    def stored(self) -> dict[str, Any]:
        """A copy of the stored bits of weight and bias, as `restore_` takes them: this rank's piece of a
        partitioned parameter, so nothing is gathered."""
        own = self.layer._parameters
        return {key: stored_bits(own[key]) for key in (self.key, self.bias_key) if own.get(key) is not None}

    def restore_(self, stored: Mapping[str, Any]) -> None:
        """Puts back bit for bit what `stored` returned, which is used up."""
        for key, bits in stored.items():
            parameter = self.layer.get_parameter(key)
            fits = type(parameter) is nn.Parameter and not is_partitioned(parameter)
            if fits and (bits.dtype, bits.device) == (parameter.dtype, parameter.device):
                parameter.data = bits
            else:
                restore_bits(parameter, bits)

    @contextlib.contextmanager
    def substituted(self, W: Tensor, b: Tensor | None = None) -> Iterator[None]:
        """Within the context the layer runs with W (out, in), and b (out,) where it is given; gradients flow
        to both."""
        taken = {self.key: self.layer._parameters.pop(self.key)}
        setattr(self.layer, self.key, self._as_stored(W))
        if b is not None and self.site.bias:
            taken[self.bias_key] = self.layer._parameters.pop(self.bias_key)
            setattr(self.layer, self.bias_key, b)
        try:
            yield
        finally:
            for key, parameter in taken.items():
                delattr(self.layer, key)
                self.layer._parameters[key] = parameter

    def _add(self, key: str, change: Tensor) -> None:
        parameter = self.layer.get_parameter(key)
        if parameter.is_meta:
            raise BaseLayerError(
                f"{self.site.name}.{key} is on the meta device: load the base before changing it."
            )
        with torch.no_grad(), gathered([parameter], modify=True):
            stored = parameter.data
            exact = _exact(stored.dtype)
            change = change.to(stored.device, exact)
            # In half precision the sum is rounded once, and not the change before it.
            if stored.dtype == exact:
                stored.add_(change)
            else:
                stored.copy_(rounded(stored.to(exact) + change, stored.dtype))

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return matrix


def _with_a_backward(given: Any) -> Any:
    """What a layer gives, so that a backward goes through it: a layer without one is not gathered for it, and another
    rank's rows may need one."""
    for each in given if isinstance(given, tuple) else (given,):
        if isinstance(each, Tensor) and not each.requires_grad and torch.is_grad_enabled():
            each.requires_grad_(each.is_floating_point())
    return given


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`. What lies outside an 8-bit float's range becomes its largest, not NaN."""
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        value = value.clamp(-largest, largest)
    return value.to(dtype)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What a sum is made in: fp32, or `dtype` where that is wider."""
    return torch.float32 if dtype.itemsize == 1 else torch.promote_types(dtype, torch.float32)


def _shape_of(parameter: Any) -> tuple[int, ...]:
    """Its own shape, also where it rests in pieces or packed."""
    packed = getattr(parameter, "quant_state", None)
    return tuple(whole_shape(parameter) if packed is None else packed.shape)
