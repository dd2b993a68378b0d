"""How many numbers an adapter trains and keeps, and where: asked of its method, from the base's table of tensors alone.

The method is the one that trains: its own functions say which tensors it wants at which layer, and which all layers
share. Nothing is read of the base but names and shapes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_dist.catalog import config_class
from peft_dist.contract import BaseSizes, BlockMethod, Method, Param, PromptMethod, Site
from peft_dist.errors import PeftDistError
from peft_dist.targets import (
    BaseFacts,
    UnmatchedWarning,
    ends_in,
    resolve,
    resolve_parameters,
    resolve_saved,
)

from ..errors import SpecError
from ..spec.adapter import peft_config
from ..spec.job import AdapterSpec
from .model_sizes import ModelSizes
from .task_heads import with_head

_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose linear layers are HF's Conv1D, stored (in, out)."""


@dataclass(frozen=True)
class SiteSizes:
    """One adapted layer."""

    name: str
    in_: int
    out: int
    inner: int
    """Width of what the adapter computes between its tensors: a rank, 0 where there is none."""
    parameters: int
    largest: int = 0
    """Elements of its largest trained tensor."""
    frozen: int = 0
    """Elements that it keeps beside those that are trained."""
    keeps_input: bool = True
    """Whether the backward reads what the layer takes."""
    outputs: int = 0
    """Tensors as large as what the layer gives that it keeps until the backward."""
    called_outputs: int = 0
    """The same where the frozen layer is called by itself: quantised, in another precision, or with dropout."""
    between: int = 0
    """Elements, whatever the tokens, that it computes from its tensors and keeps until the backward."""
    is_folded: bool = False
    """Whether it multiplies itself into a copy of the weight where that is smaller than what the layer takes."""

    @property
    def leaf(self) -> str:
        """`q_proj` of `model.layers.0.self_attn.q_proj`."""
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class AdapterSizes:
    """What is trained, in elements."""

    parameters: int
    largest: int
    """Elements of the largest trained tensor: whole tensors are what is sharded."""
    sites: tuple[SiteSizes, ...] = ()
    saved_modules: tuple[SiteSizes, ...] = ()
    """`modules_to_save` and the task's head, trained whole."""
    virtual_tokens: int = 0
    dropout: float = 0.0
    frozen: int = 0
    """Elements that stay with the adapter and are not trained: no gradient, no optimizer state."""
    full_size: int = 0
    """Tensors as large as a site's weight that are kept until the backward, for each site."""


def adapter_sizes(
    spec: AdapterSpec, sizes: ModelSizes, task_type: str = "CAUSAL_LM", num_labels: int | None = None
) -> AdapterSizes | None:
    """Counts the adapter's tensors on this base; None for a method that is a class of its own or is made of
    adapters that are stored elsewhere.

    Args:
        num_labels: that the head of a task tells apart; None: the head is not counted.

    Raises:
        SpecError: a target or a pattern matches nothing, or a layer that the method cannot adapt.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the workers say it once
        config: Any = config_class(spec.type.upper())(**peft_config(spec, task_type))
    if not isinstance(config, Method) or type(config).assemble is not Method.assemble:
        return None
    base = _Base(with_head(sizes, task_type, num_labels))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", UnmatchedWarning)  # a typo would quietly leave layers out
            return _counted(config, base, task_type)
    except UnmatchedWarning as error:
        field_name, _, message = str(error).partition(": ")
        raise SpecError(message, where=f"adapter.{field_name}") from error
    except PeftDistError as error:
        field_name, _, message = str(error).partition(": ")
        known = field_name in ("modules_to_save", "target_parameters", "trainable_token_indices")
        where = f"adapter.{field_name}" if known else "adapter.target_modules"
        text = message if known else str(error).removeprefix("targets: ")
        raise SpecError(text, where=where) from error


def _counted(config: Any, base: _Base, task_type: str) -> AdapterSizes:
    saved = tuple(_saved_modules(config, base, task_type))
    if isinstance(config, PromptMethod):
        return _with(saved, _prompt(config, base))
    places = _sites(config, base)
    config = config.over([site for _, site in places])
    sites = [_keeping(_site(name, config.at(site).params(site), site), config, site) for name, site in places]  # type: ignore[attr-defined]
    sites += _token_rows(config, base)
    sites += _biases(config, base, [name for name, _ in places] + [each.name for each in saved])
    shared = _site("", config.shared([site for _, site in places]), Site("", 0, 0, "module"))
    every = [*sites, shared]
    return _with(
        saved,
        AdapterSizes(
            sum(each.parameters for each in every),
            max((each.largest for each in every), default=0),
            tuple(sites),
            dropout=float(getattr(config, "dropout", 0.0)),
            frozen=sum(each.frozen for each in every),
            full_size=max((int(getattr(config.at(site), "full_size", 0)) for _, site in places), default=0),
        ),
    )


def _with(saved: tuple[SiteSizes, ...], own: AdapterSizes) -> AdapterSizes:
    if not saved:
        return own
    return replace(
        own,
        parameters=own.parameters + sum(each.parameters for each in saved),
        largest=max(own.largest, *(each.largest for each in saved)),
        saved_modules=saved,
    )


class _Base:
    """A base as methods ask for it: its modules, their kinds and sizes."""

    def __init__(self, sizes: ModelSizes) -> None:
        self.sizes = sizes
        self.kinds = sizes.module_kinds
        self.own: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for name, shape in sizes.tensors.items():
            module, _, key = name.rpartition(".")
            self.own.setdefault(module, []).append((key, shape))
        embeddings = [name for name, kind in self.kinds.items() if kind == "embedding"]
        self.embedding = next(
            (name for name in embeddings if self._shape(name) == (sizes.vocab, sizes.hidden)), None
        )
        self.facts = BaseFacts(
            sizes.architecture,
            self.kinds,
            sizes.heads_of_output,
            sizes.model_type or None,
            parameters=list(sizes.tensors),
            embedding=self.embedding,
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        found = self.sizes.tensors.get(f"{name}.weight")
        if found is None and self.kinds.get(name) in ("linear", "embedding"):  # tied to the input embedding
            return (self.sizes.vocab, self.sizes.hidden)
        return found or ()

    def site(self, name: str) -> Site:
        """The facts of a module."""
        kind, shape = self.kinds[name], self._shape(name)
        bias = math.prod(self.sizes.tensors.get(f"{name}.bias", (0,)))
        tensors = tuple(self.own.get(name, ()))
        if kind not in ("linear", "embedding", "conv1d", "conv2d", "conv3d"):
            return Site(name, 0, 0, "module", bias=bias, tensors=tensors)
        rows, columns = shape[0], math.prod(shape[1:])
        if kind == "embedding" or (kind == "linear" and self.sizes.model_type in _TRANSPOSED):
            rows, columns = columns, rows
        return Site(name, rows, columns, kind, kernel=shape[2:], bias=bias, tensors=tensors)  # type: ignore[arg-type]

    def raw(self, name: str) -> Site:
        """The facts of one raw parameter, such as the experts of a mixture."""
        shape = self.sizes.tensors[name]
        experts = shape[0] if len(shape) == 3 else 0
        key = name.rpartition(".")[2]
        return Site(name, shape[-2], shape[-1], "experts", tensors=((key, shape),), experts=experts)


def _sites(config: Any, base: _Base) -> list[tuple[str, Site]]:
    blocks = (
        config.blocks(list(base.kinds), base.facts.architecture) if isinstance(config, BlockMethod) else None
    )
    names = resolve(config, base.facts) if blocks is None else blocks
    places = [(name, base.site(name)) for name in names]
    if isinstance(config, BlockMethod):
        places = [(name, _block(base, name)) for name in names]
    if getattr(config, "target_parameters", None):
        places += [(name, base.raw(name)) for name in resolve_parameters(config, base.facts, bool(names))]
    for name, site in places:
        if site.kind not in config.layers and "module" not in config.layers:
            raise SpecError(
                f"'{name}' is a layer of kind {site.kind}; {config.peft_type} sits on "
                f"{', '.join(sorted(config.layers))}.",
                where="adapter.target_modules",
                hint="Leave it out, or choose another method for it.",
            )
    return places


def _block(base: _Base, name: str) -> Site:
    """A block's facts: the parameters below it, by their names within it."""
    inside = tuple(
        (tensor.removeprefix(f"{name}."), shape)
        for tensor, shape in base.sizes.tensors.items()
        if tensor.startswith(f"{name}.")
    )
    return Site(name, 0, 0, "module", tensors=inside)


def _site(name: str, params: Mapping[str, Param], site: Site) -> SiteSizes:
    trained = [each for each in params.values() if each.trainable]
    inner = max((each.shape[each.dims.index("r")] for each in trained if "r" in each.dims), default=0)
    elements = [math.prod(each.shape) for each in trained]
    frozen = sum(
        math.prod(each.shape) * (2 if each.is_index else 1) for each in params.values() if not each.trainable
    )
    return SiteSizes(name, site.in_, site.out, inner, sum(elements), max(elements, default=0), frozen)


def _keeping(own: SiteSizes, config: Any, site: Site) -> SiteSizes:
    """With what a method keeps for its backward where that is not what the layer takes and the ranks between."""
    if config.peft_type == "IA3":
        takes = config.is_feedforward(site)
        given = 0 if takes else 1
        return replace(own, keeps_input=takes, outputs=given, called_outputs=given, is_folded=True)
    if getattr(config, "use_dora", False):
        return replace(own, outputs=1, called_outputs=2)
    if config.peft_type == "OFT" and site.in_:
        # The skew matrices of the blocks, their squares and their rotations.
        return replace(own, between=3 * site.in_ * config.block_size(site))
    return own


def _whole(name: str, shapes: Sequence[tuple[int, ...]]) -> SiteSizes:
    elements = [math.prod(shape) for shape in shapes]
    first = shapes[0]
    return SiteSizes(name, first[-1], first[0], 0, sum(elements), max(elements))


def _saved_modules(config: Any, base: _Base, task_type: str) -> Iterable[SiteSizes]:
    wanted = list(getattr(config, "modules_to_save", None) or [])
    wanted += [name for name in HEADS.get(task_type, ()) if name not in wanted]
    for module in resolve_saved(wanted, base.facts):
        shapes = [shape for name, shape in base.sizes.tensors.items() if name.startswith(f"{module}.")]
        yield _whole(module, shapes or [(base.sizes.vocab, base.sizes.hidden)])


HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What the classes of these tasks train whole beside any adapter."""


def _token_rows(config: Any, base: _Base) -> list[SiteSizes]:
    """`trainable_token_indices`: rows of embeddings that are trained beside the adapter; a tied head has the same."""
    given: Any = getattr(config, "trainable_token_indices", None)
    if given is None:
        return []
    if not isinstance(given, Mapping):
        given = {base.embedding or "embed_tokens": given}
    found: dict[str, list[int]] = {}
    for target, tokens in given.items():
        names = [name for name in base.kinds if ends_in([target], name)]
        if not names:
            raise SpecError(
                f"{target!r} matched no layer of {base.facts.name}.", where="adapter.trainable_token_indices"
            )
        found |= dict.fromkeys(names, tokens)
    heads = [name for name in found if base.sizes.tied and name in base.facts.heads]
    if base.embedding in found:
        found = {name: tokens for name, tokens in found.items() if name not in heads}
    return [_whole(name, [(len(tokens), base.sizes.hidden)]) for name, tokens in found.items()]


def _biases(config: Any, base: _Base, taken: list[str]) -> list[SiteSizes]:
    """`bias: all`: the biases of the layers that the method does not sit on."""
    if getattr(config, "bias", "none") != "all":
        return []
    found = []
    for name, tensors in base.own.items():
        inside = any(name == other or name.startswith(f"{other}.") for other in taken)
        bias = dict(tensors).get("bias")
        if bias is not None and not inside:
            found.append(_whole(name, [bias]))
    return found


def _prompt(config: Any, base: _Base) -> AdapterSizes:
    sizes = base.sizes
    config.fit(base_sizes(sizes))
    site = Site(base.embedding or "embed_tokens", sizes.hidden, sizes.vocab, "embedding")
    own = _site("", config.params(site), site)
    tokens = int(config.num_tokens)
    return AdapterSizes(own.parameters, own.largest, virtual_tokens=tokens, frozen=own.frozen)


def base_sizes(sizes: ModelSizes) -> BaseSizes:
    """What a prompt method asks of a base."""
    return BaseSizes(
        width=sizes.hidden,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_layers=sizes.decoder_layers or sizes.layers,
        num_kv_heads=sizes.kv_heads,
        kv_width=sizes.kv_width or sizes.head_dim,
        num_stacks=2 if sizes.is_encoder_decoder else 1,
    )
