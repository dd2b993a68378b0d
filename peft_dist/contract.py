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
Kind = Literal["linear", "conv1d", "conv2d", "conv3d", "embedding", "mha", "experts", "module"]


@dataclass(frozen=True)
class Site:
    """One adapted layer: facts from its sizes alone, never a tensor.

    Args:
        name: its dotted name in the base.
        out: rows of W. in_: columns of W. Both 0 for a module that is only replaced or has only a bias.
        kind: how the layer uses W. `linear` covers HF's Conv1D; `mha` is an attention module's joint input
            projection and `experts` a raw parameter: their W is used as a function's argument, so that an
            adapter of theirs runs by `BaseLayer.substituted` alone.
        kernel: a convolution's kernel sizes, else empty.
        groups: of a convolution; in_ counts a group's channels x kernel. A change of its weight may also be
            wide, over all channels: (out, groups x in).
        bias: length of its bias, 0 where it has none.
        tensors: name and shape of each parameter of the layer, in its own order.
        experts: how many matrices a raw parameter stacks; its W is then (experts, out, in). 0 for none.
    """

    name: str
    out: int
    in_: int
    kind: Kind
    kernel: tuple[int, ...] = ()
    groups: int = 1
    bias: int = 0
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    experts: int = 0


@dataclass(frozen=True)
class Param:
    """A tensor that a method asks for.

    Args:
        key: where it hangs on the adapted module, as in HF PEFT: the adapter's name goes after the first part
            (`lora_A.weight` is `lora_A.NAME.weight`).
        dims: a name for each axis, for errors and checks.
        shape: its sizes.
        start: fills it in place, in the order of `params`.
        trainable: whether it gets a gradient. One that does not is a buffer, as in HF PEFT, and not counted.
        saved: its name in a checkpoint, relative to the layer, where that is not `key`.
        persistent: whether it is in a checkpoint. One that is not follows from the config alone: `start` fills
            it whenever the adapter gets memory, also before a load.
        is_index: int64, whatever the adapter's dtype.
        counted: one that is not trained is a Parameter all the same, since HF PEFT counts it.
    """

    key: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    start: Callable[[Tensor], object]
    trainable: bool = True
    saved: str | None = None
    persistent: bool = True
    is_index: bool = False
    counted: bool = False


@dataclass(frozen=True)
class Draw:
    """Random numbers, uniform in [0, 1), that a method asks for while its layer trains.

    Args:
        shape: of one draw.
        each: `step`: one for all rows, and p holds (*shape); `sequence`: one for each, and p holds
            (rows, *shape).
    """

    shape: tuple[int, ...]
    each: Literal["step", "sequence"] = "step"


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
        """M (rows, channels) over the output channels of h: (..., rows). On a convolution with groups M may
        be (rows, channels of a group)."""

    def plus(self, W: Tensor, dW: Tensor) -> Tensor:
        """W + dW, of which one may be wide where the layer has groups."""

    def substituted(self, W: Tensor, b: Tensor | None = None) -> AbstractContextManager[None]:
        """Within the context the layer runs with W (out, in), and with b (out,) where it is given."""


class Controller:
    """What acts on one adapter of one model as a whole, once a step. `sites` are its tensors by the names of
    its layers, as `Method.params` names them; gradients are whole tensors."""

    def after_backward(self, sites: Mapping[str, Params], step: int) -> None:
        """Between the backward and the optimizer's step: the gradients are there."""
        return None

    def after_step(self, sites: Mapping[str, Params], step: int) -> None:
        """After the optimizer's step."""
        return None

    def settle(self, sites: Mapping[str, Params]) -> None:
        """Does again, before the adapter is next run, what an optimizer's step after `after_step` undid."""
        return None

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs of it, by name."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        return None


class Method(ABC):
    """What every method may define. All functions are pure.

    `reads` names the arguments of the model's forward (one entry per sequence, such as `task_ids`) that the
    method's functions find in `p` beside their tensors, cut to the rows that they serve. `layers` are the
    kinds that it can sit on; any module at all where it says `module`. `merges`: whether it can be merged.
    `is_beside`: whether it is a part of an adapter that acts elsewhere, such as a module trained whole.
    """

    prefix: ClassVar[str]
    merges: ClassVar[bool] = True
    is_beside: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    layers: ClassVar[frozenset[str]] = frozenset({"linear"})

    def at(self, site: Site) -> Method:
        """The method to use at `site`: itself, or a variant that its settings ask for."""
        return self

    def over(self, sites: Sequence[Site]) -> Method:
        """The method on these layers together, asked before `at` is of each: itself, or a copy that knows what of all
        of them each needs."""
        return self

    def shared(self, sites: Sequence[Site]) -> dict[str, Param]:
        """Tensors that all its layers share; every function finds them in `p` too, under these names. Saved
        on the model, not on a layer."""
        return {}

    def tied(self, site: Site) -> Method | None:
        """The method for another layer that shares the weight of the one at `site`: it has no tensors of its own
        and finds in `p` those at `site`. None: such layers stay as they are."""
        return None

    def assemble(self, base: Any, read: Callable[[str], Any]) -> None:
        """Reads the saved adapters that it is made of, before it is asked anything else. `read` takes a path and
        gives an adapter's `config` and `tensors`; `base` is the model."""
        return None

    def first_run(self, num_rows: int, length: int) -> dict[str, Tensor]:
        """What its functions read in a first run of the model, where it needs one: see `ahead`."""
        return {}

    def ahead(
        self, p: Params, hidden: Tensor, drop: Callable[[Tensor, float, str], Tensor]
    ) -> dict[str, Tensor]:
        """What its functions read, by the names in `reads`, from the last hidden state (rows, positions, width) of
        a first run of the model. `p` are its shared tensors; drop(x, share, name) drops out while training. Only a
        method that defines it has the model run twice."""
        return {}

    def made(self, sites: Mapping[str, Params]) -> Mapping[str, Params]:
        """What follows from its tensors alone, where making it for all layers at once is cheaper: by layer, to be found
        in `p` beside them in a whole model's forward that wants gradients. A layer that finds nothing, as in every
        other run, makes its own."""
        return {}

    def parts(self, sites: Mapping[str, Params]) -> dict[str, tuple[Any, dict[str, Tensor]]]:
        """Adapters that are saved in folders beside it, by name: config and tensors."""
        return {}

    def fitted(self, tensors: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A checkpoint's tensors as large as those `here`, by the names in it, where the settings say how."""
        return tensors

    def saved_at(self, directory: str) -> Method:
        """The config as it is written there, beside its parts."""
        return self

    def check_together(self, where: str, others: Sequence[Method]) -> None:
        """Refuses to serve the layer called `where` together with `others`, by an error."""
        return None

    def check_beside(self, others: Sequence[Method]) -> None:
        """Refuses to stand on one model with `others` of its class, by an error."""
        return None

    def check_training(self, p: Params, site: Site) -> None:
        """Refuses to run while its layer trains, by an error."""
        return None

    def draws(self, site: Site) -> dict[str, Draw]:
        """What chance decides while training, by the names under which its functions find it in `p`; `delta`
        goes without."""
        return {}

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        """A start that reads the frozen layer; runs once, after every `Param.start`, without gradients. Not
        run where a checkpoint fills the tensors."""
        return None

    def replace_base(self, p: Params, base: BaseLayer) -> None:
        """Changes the frozen layer itself, once its tensors are started or loaded: no other function may."""
        return None

    def gradient(self, name: str, gradient: Tensor, p: Params) -> Tensor:
        """The gradient of tensor `name` as the optimizer is to see it: a projection of `gradient`."""
        return gradient

    def extra_loss(self, sites: Mapping[str, Params]) -> Tensor | None:
        """A term that is added to the loss while training, or None."""
        return None

    def controller(self, sites: Mapping[str, Site]) -> Controller | None:
        """What acts on the adapter as a whole once a step, or None."""
        return None

    def export(self, p: Params, site: Site) -> dict[str, Tensor] | None:
        """The saved form by name relative to the layer, where it is not the tensors themselves, else None."""
        return None

    def facts(self, site: Site) -> dict[str, Any]:
        """What programs read of a layer with it, by HF PEFT's names of a layer's attributes: r, scaling, ..."""
        return {}

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        """The tensors by `Param.saved` or `key` from a checkpoint's, by name relative to the layer: undoes
        `export`, and reads older forms."""
        return saved


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

    @classmethod
    def together(
        cls, methods: Sequence[Any], ps: Sequence[Params], bases: Sequence[BaseLayer], x: Tensor
    ) -> Sequence[Tensor] | None:
        """`forward` of several layers that take the same x, of the adapters' dtype and not dropped out, in
        one go; None where it is not cheaper."""
        return None


class WeightMethod(SiteMethod):
    """Adds `delta` to W: base(x) + added(enter(x))."""

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        """What the adapter adds to y; may be cheaper than through `delta`."""
        added = base.apply(self.delta(p, base), x)
        bias = self.bias_delta(p, base)
        return added if bias is None else added + bias

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        return base(x) + self.added(p, base, enter(x))

    def low_rank(self, p: Params, base: BaseLayer) -> tuple[Tensor, Tensor, float] | None:
        """(A (r, in), B (out, r), s) where `added` is s B A x and nothing else; None where it is more, or where
        nothing is gained. Many such adapters serve one batch side by side."""
        return None

    @classmethod
    def mixed(cls, methods: Sequence[Any], p: Params, base: BaseLayer, x: Tensor) -> Tensor | None:
        """`added` of k adapters at once: p stacked (k, ...), x (k, rows, ..., in) -> (k, rows, ..., out), or
        None where there is no such path and each adapter is to be run by itself."""
        return None

    @classmethod
    def by_slot(
        cls, methods: Sequence[Any], arrays: Params, base: BaseLayer
    ) -> tuple[Tensor, Tensor, list[float]] | None:
        """`low_rank` of all adapters whose tensors stand one after the other in `arrays`: A (slots, r, in), B (slots,
        out, r), and s of each of `methods`; None where that is not what `added` is."""
        return None

    @classmethod
    def adds_in_place(cls, p: Params, base: BaseLayer) -> bool:
        """Whether `add_mixed` is there, and cheaper than the sum."""
        return False

    @classmethod
    def add_mixed(cls, methods: Sequence[Any], p: Params, base: BaseLayer, x: Tensor, y: Tensor) -> None:
        """Adds `mixed` to y (k, rows, ..., out), contiguous and of x's dtype, in place; where no gradients are
        wanted."""
        raise NotImplementedError


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

    layers: ClassVar[frozenset[str]] = frozenset({"module"})

    @abstractmethod
    def params(self, site: Site) -> dict[str, Param]:
        """One tensor for each of the module's that it replaces, under the same names."""


class BlockMethod(Method):
    """Adds to what a whole block of the base gives: an attention module, a decoder layer."""

    merges: ClassVar[bool] = False
    layers: ClassVar[frozenset[str]] = frozenset({"module"})

    def blocks(self, names: Sequence[str], architecture: str | None) -> Sequence[str] | None:
        """The blocks that it sits on, of a base's modules by their names in order; None for those that its
        targets mean."""
        return None

    @abstractmethod
    def params(self, site: Site) -> dict[str, Param]:
        """The tensors that it wants at `site`, whose `tensors` are the block's own."""

    @abstractmethod
    def around(self, p: Params, block: Any, output: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """What the block is to give, from what it gave and what it was given. `block` is the frozen module."""


@dataclass(frozen=True)
class BaseSizes:
    """What a prompt method knows of its base.

    Args:
        width: of the input embeddings.
        num_layers, num_heads: as the base's config counts them.
        num_kv_layers: of the stack that keeps keys and values, the decoder where there are two.
        num_kv_heads, kv_width: heads of keys and values there, and the width of one.
        num_stacks: 2 for an encoder and a decoder, else 1.
    """

    width: int
    num_layers: int
    num_heads: int
    num_kv_layers: int
    num_kv_heads: int
    kv_width: int
    num_stacks: int = 1


class PromptMethod(Method):
    """Adds virtual tokens before the input; changes no layer.

    A config of `inference_mode` asks for the tensors of the saved form alone. `in_decoder`: whether the decoder
    of a base that has one gets the second half of the tokens. What the method reads of a batch it finds in `p`
    where it is given; then its tokens may differ from row to row.
    """

    merges: ClassVar[bool] = False
    layers: ClassVar[frozenset[str]] = frozenset()
    in_decoder: ClassVar[bool] = False

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """How many positions it adds to a row."""

    def fit(self, sizes: BaseSizes) -> None:
        """Takes the base's sizes into its fields; before `params`."""
        return None

    @abstractmethod
    def params(self, site: Site) -> dict[str, Param]:
        """Its tensors; `site` is the input embedding (in: vocabulary, out: width)."""

    @abstractmethod
    def embeds(self, p: Params, training: bool = False) -> Tensor:
        """The virtual tokens' embeddings (tokens, width), or (rows, tokens, width) where rows differ."""

    def saved_form(self) -> PromptMethod:
        """What a checkpoint fills: itself, or what is left of it where a network that made the tokens was not
        saved."""
        return self

    def resume(self, p: Params) -> None:
        """Once a checkpoint has filled what it has, and the base the rest: makes of it what is trained."""
        return None

    def constrain(self, p: Params) -> None:
        """Brings trained tensors, of which `p` may hold some alone, back to where they may be, in place: before
        each forward that they serve and that records gradients, and before each update."""
        return None

    def targets(self, labels: Tensor, p: Params) -> tuple[Tensor, Tensor] | None:
        """What its loss counts of a batch's `labels` (rows, T): (labels with the virtual tokens' own, -100 where
        nothing is counted; the weight of each), both (rows, tokens + T). None where the base's loss is
        right."""
        return None


class PastMethod(PromptMethod):
    """Adds keys and values of virtual tokens to each layer's attention, instead of tokens before the
    input."""

    @abstractmethod
    def past(self, p: Params, training: bool = False) -> Sequence[tuple[Tensor, Tensor]]:
        """For each layer keys and values (heads, tokens, head width)."""
