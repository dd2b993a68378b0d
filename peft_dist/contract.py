"""What a method is: a dataclass that is its public config, and a few pure functions. Imports no torch.

Letters: W (out, in); x (..., in); y (..., out). An embedding is a linear layer over one-hot rows: in is the
vocabulary, out the width. A convolution's in is channels x kernel, its out the channels it gives.

A method never stores a tensor, never sees a module, a rank or a quantised format: it asks for tensors by
`params(site)`, gets them back as `p`, and reaches the frozen layer through `BaseLayer` alone. What it
defines is `delta`; `forward`, `mixed` and `added` are cheaper paths to the same thing.

The laws, which `tests/contract/` runs over every row of the catalog:
 1. a fresh adapter leaves the output unchanged;
 2. `forward` equals the layer run with W + delta and b + bias_delta; `mixed` equals `forward` row by row;
 3. every trainable tensor gets a nonzero gradient after a disturbance, frozen and base tensors get none;
 4. shapes on meta equal shapes on CPU; every dimension is named;
 5. merged output equals adapter output, and unmerging restores the base;
 6. save, load, pickle and dictionary round trips are exact, and HF PEFT reads what we write and the reverse;
 9. several active adapters equal the sum ("add") or the chain ("chain") of each;
10. `full_size` is true: so many (out, in) tensors are kept until the backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Params: TypeAlias = "Mapping[str, Tensor]"
Enter: TypeAlias = "Callable[[Tensor], Tensor]"
Kind = Literal["linear", "conv1d", "conv2d", "conv3d", "embedding", "module"]


@dataclass(frozen=True)
class Site:
    """One adapted layer: facts from its sizes alone, never a tensor.

    Args:
        name: its dotted name in the base.
        out: rows of W. in_: columns of W. Both 0 for a module that is only replaced or has only a bias.
        kind: how the layer uses W. `linear` covers HF's Conv1D.
        kernel: a convolution's kernel sizes, else empty.
        bias: length of its bias, 0 where it has none.
        tensors: name and shape of each parameter of the layer, in its own order.
    """

    name: str
    out: int
    in_: int
    kind: Kind
    kernel: tuple[int, ...] = ()
    bias: int = 0
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Param:
    """A tensor that a method asks for.

    Args:
        key: where it hangs on the adapted module, as in HF PEFT: the adapter's name goes after the first part
            (`lora_A.weight` is `lora_A.NAME.weight`).
        dims: a name for each axis, for errors and checks.
        shape: its sizes.
        start: fills it in place, in the order of `params`.
        trainable: whether it gets a gradient.
        saved: its name in a checkpoint, relative to the layer, where that is not `key`.
    """

    key: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    start: Callable[[Tensor], object]
    trainable: bool = True
    saved: str | None = None


class BaseLayer(Protocol):
    """The frozen layer, whatever its storage. The only way to reach frozen weights."""

    site: Site

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), known without gathering, also on meta and for partitioned weights."""

    def __call__(self, x: Tensor) -> Tensor:
        """The layer as it is."""

    def weight(self) -> Tensor:
        """W (out, in): gathered, detached."""

    def bias(self) -> Tensor | None:
        """b (out,): gathered, detached."""

    def tensor(self, key: str) -> Tensor:
        """The layer's parameter `key`: gathered, detached."""

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        """The layer with W (rows, in) in place of its own weight and no bias: (..., rows)."""

    def mix(self, M: Tensor, h: Tensor) -> Tensor:
        """M (rows, channels) over the output channels of h: (..., rows)."""

    def substituted(self, W: Tensor) -> AbstractContextManager[None]:
        """Within the context the layer runs with W (out, in)."""


class Method(ABC):
    """What every method may define. All functions are pure."""

    prefix: ClassVar[str]

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        """A start that reads the frozen layer; runs once, after every `Param.start`, without gradients."""
        return None


class SiteMethod(Method):
    """A method that changes one layer by a change of its weight and bias.

    `compose` says what several active adapters of it on one layer mean: "add" sums their deltas, each taken
    of the layer underneath; "chain" takes each of the layer as the one before left it, in the order they were
    set.
    """

    compose: ClassVar[Literal["add", "chain"]] = "add"
    full_size: ClassVar[int] = 0

    @property
    def dropout(self) -> float:
        """The share of the adapter branch's input that is zeroed while training."""
        return 0.0

    @abstractmethod
    def params(self, site: Site) -> dict[str, Param]:
        """The tensors that it wants at `site`, from sizes alone; none where it has nothing to do there."""

    @abstractmethod
    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        """dW (out, in): the definition of the method."""

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor | None:
        """db (out,), or None where the bias stays."""
        return None

    @abstractmethod
    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        """y of the adapted layer. `enter(x)` is x as the adapter's branch takes it: in its dtype, dropped
        out."""


class WeightMethod(SiteMethod):
    """Adds `delta` to W: base(x) + added(enter(x))."""

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        """What the adapter adds to y; may be cheaper than through `delta`."""
        added = base.apply(self.delta(p, base), x)
        bias = self.bias_delta(p, base)
        return added if bias is None else added + bias

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        return base(x) + self.added(p, base, enter(x))

    @classmethod
    def mixed(cls, methods: Sequence[Any], p: Params, base: BaseLayer, x: Tensor) -> Tensor | None:
        """`added` of k adapters at once: p stacked (k, ...), x (k, rows, ..., in) -> (k, rows, ..., out), or
        None where there is no such path and each adapter is to be run by itself."""
        return None


class ActivationMethod(SiteMethod):
    """Changes what the layer takes (`before`) or gives (`after`), both linear in their argument."""

    compose: ClassVar[Literal["add", "chain"]] = "chain"

    def before(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        """x (..., in) as the layer is to take it."""
        return x

    def after(self, p: Params, base: BaseLayer, y: Tensor) -> Tensor:
        """y (..., out) as the adapted layer is to give it."""
        return y

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        return self.after(p, base, base(self.before(p, base, x)))


class ReplaceMethod(Method):
    """Puts tensors of its own in the place of a module's."""

    @abstractmethod
    def params(self, site: Site) -> dict[str, Param]:
        """One tensor for each of the module's that it replaces, under the same names."""


class PromptMethod(Method):
    """Adds virtual tokens before the input; changes no layer."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """How many positions it adds."""

    @abstractmethod
    def params(self, site: Site) -> dict[str, Param]:
        """Its tensors; `site` is the input embedding (in: vocabulary, out: width)."""

    @abstractmethod
    def embeds(self, p: Params) -> Tensor:
        """The virtual tokens' embeddings (num_tokens, width)."""
