"""Trainable tokens: the named rows of an embedding's weight are trained, the others stay: W[token] = its own vector.

Where another layer shares the embedding's weight, such as a language model's head, the same vectors replace its
rows. A linear layer keeps its bias (HF PEFT drops it). As HF PEFT has it, the file holds the vectors, not what
they add to W, so that they mean the same on a base whose vocabulary was resized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Method, Param, Params, Site, WeightMethod
from peft_dist.errors import AdapterError, ConfigError
from peft_dist.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


class TokenRows(WeightMethod):
    """The method, for whichever config names the tokens."""

    layers: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})

    token_indices: Sequence[int]
    init_weights: bool

    def tied(self, site: Site) -> TokenRows | None:
        return SameRows(self.token_indices)

    def check_together(self, where: str, others: Sequence[Method]) -> None:
        theirs = {token for other in others if isinstance(other, TokenRows) for token in other.token_indices}
        both = sorted(theirs.intersection(self.token_indices))
        if both:
            raise AdapterError(
                f"{where}: {len(both)} tokens, such as {both[0]}, have vectors of two adapters, which cannot both be "
                "theirs. Activate one at a time, or train other tokens."
            )

    def facts(self, site: Site) -> dict[str, Any]:
        return {"token_indices": list(self.token_indices)}

    def params(self, site: Site) -> dict[str, Param]:
        tokens, (vocabulary, width) = self.token_indices, table(site)
        check_tokens("token_indices", tokens)
        wrong = [token for token in tokens if not 0 <= token < vocabulary]
        if wrong:
            raise ConfigError(
                f"token_indices: {wrong[0]!r} is no token of {site.name}, which has {vocabulary}. Resize the "
                "embeddings first, or leave it out."
            )
        shape, dims = (len(tokens), width), ("tokens", "width")
        start = starts.inherit if self.init_weights else starts.normal
        return {
            "rows": Param("trainable_tokens_delta", dims, shape, start),
            "start": Param("trainable_tokens_original", dims, shape, starts.inherit, trainable=False),
            "tokens": Param(
                "trainable_tokens_index",
                ("tokens",),
                (len(tokens),),
                starts.given(tokens),
                trainable=False,
                persistent=False,
                is_index=True,
            ),
        }

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        W = base.weight()
        rows = (W.T if base.site.kind == "embedding" else W)[p["tokens"].to(W.device)]
        p["start"].copy_(rows)
        if self.init_weights:
            p["rows"].copy_(rows)

    def export(self, p: Params, site: Site) -> dict[str, Tensor]:
        # What the vectors started from is the base's.
        return {"trainable_tokens_delta": p["rows"]}

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        change = p["rows"] - p["start"]
        if base.site.kind == "embedding":
            return change.new_zeros(base.shape).index_copy(1, p["tokens"], change.T)
        return change.new_zeros(base.shape).index_copy(0, p["tokens"], change)

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        change = p["rows"] - p["start"]
        if base.site.kind == "linear":
            h = x @ change.T
            return h.new_zeros(*h.shape[:-1], base.site.out).index_copy(-1, p["tokens"], h)
        place, is_ours = _looked_up(p["tokens"], x)
        rows = change[place] * is_ours[..., None].to(change.dtype)
        return base.as_given(rows, x)  # type: ignore[attr-defined]

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        if base.site.kind == "linear":
            y = base(x)
            change = p["rows"] - p["start"]
            return y.index_add(-1, p["tokens"], (enter(x) @ change.T).to(y.dtype))
        y = base(x)
        return y + self.added(p, base, x).to(y.dtype)


def table(site: Site) -> tuple[int, int]:
    """(vocabulary, width) of an embedding, or of a head."""
    return (site.in_, site.out) if site.kind == "embedding" else (site.out, site.in_)


def _looked_up(tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each id its place in `tokens`, and whether it is there."""
    ordered, order = tokens.sort()
    place = torch.searchsorted(ordered, ids).clamp(max=len(tokens) - 1)
    return order[place], ordered[place] == ids


@dataclass(frozen=True)
class SameRows(TokenRows):
    """On a layer that shares the embedding's weight: the embedding's own vectors, so no tensors."""

    token_indices: Sequence[int]
    init_weights: bool = True

    peft_type: ClassVar[str | None] = "TRAINABLE_TOKENS"
    prefix: ClassVar[str] = "trainable_tokens_"

    def params(self, site: Site) -> dict[str, Param]:
        return {}

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        return None

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        # Saved here too, as HF PEFT does; read where they are the embedding's.
        return {}


def check_tokens(where: str, tokens: Any) -> None:
    """Refuses what is no list of different whole numbers from 0."""
    if (
        not isinstance(tokens, (list, tuple))
        or not tokens
        or not all(isinstance(token, int) and token >= 0 for token in tokens)
        or len(set(tokens)) < len(tokens)
    ):
        raise ConfigError(f"{where}: {tokens!r}; it lists different tokens by their numbers, at least one.")


@dataclass
class TrainableTokensConfig(TargetedConfig, TokenRows):
    """HF PEFT's TrainableTokensConfig.

    Args:
        token_indices: the tokens, by their numbers.
        target_modules: the embedding; the base's input embedding where None.
        init_weights: True: start at W's own rows, which changes nothing; False: at random.
    """

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    prefix: ClassVar[str] = "trainable_tokens_"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "TRAINABLE_TOKENS"
        if self.token_indices:
            check_tokens("TrainableTokensConfig.token_indices", self.token_indices)
