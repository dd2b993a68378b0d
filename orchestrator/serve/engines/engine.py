"""What an endpoint asks of whatever generates. `SequentialEngine` takes one request at a time; a batching
engine takes its place behind the same protocol. No torch here: the HTTP side is tested against any engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]

LEAST_TEMPERATURE = 1e-5
"""Below it only the likeliest token has a share worth drawing by, and scores divided by it may overflow."""


class EngineDead(RuntimeError):
    """The engine's thread has ended: the replica must be replaced."""


class ScoresNotFinite(RuntimeError):
    """What comes of a sequence are no numbers to choose its next token by."""

    def __init__(self) -> None:
        super().__init__(
            "The model's scores behind this text are not finite numbers: its weights overflow there. Ask another "
            "version of the adapter, or the base."
        )


class AdapterRefused(Exception):
    """An adapter that cannot be served: its files do not load or do not fit the base."""


@dataclass(frozen=True)
class Generation:
    """One sequence to generate.

    `adapter` is the key given to `load`, None the bare base. A `temperature` of 0, or nearly, is greedy; `seed` makes a
    sampled sequence repeatable. `logprobs` asks for the log-probability of each token and of so many of the
    likeliest beside it. `queue` names whose turn it takes where more wait than run (an adapter, or a tenant's
    adapter). `shadow` is the key of a candidate that answers the same beside it, compared and seen by no client;
    `observed.Observed` sees to it, an engine itself passes it over.
    """

    prompt_ids: tuple[int, ...]
    adapter: str | None
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    queue: str = ""
    shadow: str | None = None
    task: int | None = None

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, and not the likeliest ones taken."""
        return self.temperature >= LEAST_TEMPERATURE


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer: its id, its log-probability (natural logarithm, of the model's own distribution at
    temperature 1) and the likeliest tokens there, each with its own, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a generation yields: final text, and the tokens it took. The last has a `finish_reason`.

    `logprobs` are of the tokens that this piece took, where the generation asked for them."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Figures:
    """What an engine does just now, for whoever watches it."""

    running: int = 0
    """Sequences of the batch."""
    waiting: int = 0
    """Sequences that wait for a place in it."""
    max_running: int = 1
    """Places of the batch."""
    prompt_tokens: int = 0
    """Tokens of all prompts since the start."""
    cached_tokens: int = 0
    """Those of them that the prefix cache had."""
    slots: int = 0
    """Adapters that the batch can hold loaded at once; 0: no bound."""
    loaded: int = 0
    """Adapters that are loaded."""


class Engine(Protocol):
    """One base and the adapters that were loaded onto it. All methods may be called from any thread."""

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    def virtual_tokens(self, adapter: str | None) -> int:
        """Tokens of the context that the adapter itself takes (prompt methods)."""

    def num_tasks(self, adapter: str | None) -> int:
        """How many tasks the adapter learned, of which each of its generations names one; 0: it knows of none."""

    async def load(self, adapter: str, directory: Path) -> None:
        """Loads an adapter under a key; returns at once where the key is loaded.

        Raises:
            AdapterRefused: the files are damaged or do not fit the base.
            EngineDead: the engine has stopped.
        """

    async def combine(self, adapter: str, parts: Sequence[tuple[str, float]]) -> None:
        """Makes a key that answers as the weighted sum of loaded adapters: each one's change of a layer times its
        weight, added to the base. The parts stay loaded while it is; `unload` takes it away; `loaded` has it.

        Raises:
            AdapterRefused: adapters of these kinds have no such sum.
            EngineDead: the engine has stopped.
        """

    async def unload(self, adapter: str) -> None:
        """Frees an adapter after the generations that use it; unknown keys are ignored."""

    def loaded(self) -> frozenset[str]:
        """The keys that are loaded."""

    def generate(self, request: Generation) -> AsyncGenerator[Piece, None]:
        """Yields pieces as they come; closing the generator cancels the generation within one token."""

    def figures(self) -> Figures:
        """What it does just now; cheap, from any thread."""

    def check(self) -> None:
        """Raises EngineDead where requests would never be answered."""

    def close(self) -> None:
        """Ends the engine; generations that run end with EngineDead."""
