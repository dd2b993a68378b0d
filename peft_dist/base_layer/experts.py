"""The door to a raw parameter of a module: the stacked experts of a mixture model, a router's matrix.

Its W is (experts, out, in) where the parameter has three axes, whichever way it is stored, and (out, in) where
it has two. The module reads it in its own way, so an adapter acts by `substituted` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft_dist.base_layer.layer import Layer
from peft_dist.contract import Site
from peft_dist.errors import BaseLayerError, RowsError
from peft_dist.rows import Cut, Rows, Segment
from peft_dist.sharding import whole_shape


class ParameterLayer(Layer):
    """One nn.Parameter with two or three axes, of any module.

    Args:
        name: the dotted name of the parameter.
    """

    kind = "experts"
    is_argument = True
    bias_key = ""

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.key = name.rpartition(".")[2]
        parameter = layer.get_parameter(self.key)
        shape = tuple(whole_shape(parameter))
        if len(shape) not in (2, 3) or not parameter.is_floating_point():
            raise BaseLayerError(
                f"{name}: a parameter of shape {shape} and dtype {parameter.dtype}; target_parameters takes "
                "floating ones of two axes (out, in) or three (experts, out, in)."
            )
        self._is_swapped = len(shape) == 3 and getattr(layer, "is_transposed", False)
        super().__init__(layer, name)

    def _matrix_shape(self) -> tuple[int, int]:
        first, second = whole_shape(self.layer.get_parameter(self.key))[-2:]
        return (second, first) if self._is_swapped else (first, second)

    def _experts(self) -> int:
        shape = whole_shape(self.layer.get_parameter(self.key))
        return shape[0] if len(shape) == 3 else 0

    def _tensors(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return ((self.key, tuple(whole_shape(self.layer.get_parameter(self.key)))),)

    def cut(self, rows: Rows, length: int | None) -> Cut:
        return TokenCut(rows, self.site, length)

    def check_cut(self, args: tuple, kwargs: dict[str, Any], num: int) -> None:
        """Whether a call on `num` tokens can be taken apart between them: each is given with the experts it goes to.

        Raises:
            RowsError: it cannot.
        """
        check_tokens(self.site, args, kwargs, num)

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored.mT if self._is_swapped else stored

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self._is_swapped else matrix


class TokenCut(Cut):
    """Calls whose tensors all have one entry per token, in the order of the batch: a router's choices stand
    beside the tokens that they are for. A call that gives tokens in a router's order is refused."""

    def of(self, tree: Any, segment: Segment) -> Any:
        args, kwargs = tree
        check_tokens(self.site, args, kwargs)

        def here(value: Any) -> Any:
            return self._cut(value, segment) if isinstance(value, Tensor) else value

        return tuple(map(here, args)), {key: here(value) for key, value in kwargs.items()}

    def _cut(self, t: Tensor, segment: Segment) -> Tensor:
        if t.shape[0] == 1:
            raise _refused(self.site, "all rows share one input")
        return super()._cut(t, segment)


def check_tokens(site: Site, args: tuple, kwargs: Mapping[str, Any], num: int | None = None) -> None:
    """Whether all tensors of a call have one entry per token, of `num` where that is known.

    Raises:
        RowsError: they do not.
    """
    given = [*args, *kwargs.values()]
    tensors = [value for value in given if isinstance(value, Tensor)]
    alone = len(tensors) < 2 and site.experts > 0
    if alone or any(t.ndim == 0 or t.shape[0] != (num or tensors[0].shape[0]) for t in tensors):
        raise _refused(site, "it is not given each token with the experts it goes to")
    if any(isinstance(value, (list, tuple, dict)) for value in given):
        raise _refused(site, "it is given more than tensors of tokens")


def _refused(site: Site, why: str) -> RowsError:
    return RowsError(
        f"{site.name}: {why}, so rows cannot tell which adapter serves which part of its input. Run "
        "one adapter at a time, or leave these parameters out."
    )
