"""A run of the base before its run, for methods whose layers read what the first one gives: X-LoRA's weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from peft_dist.contract import Method
from peft_dist.errors import ConfigError
from peft_dist.packed import without_gradients
from peft_dist.packed_rows import Reads
from peft_dist.rows import drop, token_input
from peft_dist.sharding import is_partitioned, reach


def looks_ahead(method: Any) -> bool:
    """Whether the method needs the run before."""
    return isinstance(method, Method) and type(method).ahead is not Method.ahead


class LookAhead:
    """Before each forward of a tuner's base within `watching`, runs it once without gradients and puts what the
    methods make of its last hidden state where their layers read it.

    Attributes:
        given: adapter -> what its method made of the latest run.
        log: the same of each run while `logs`.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner
        self.given: dict[str, Mapping[str, Tensor]] = {}
        self.log: list[Mapping[str, Tensor]] = []
        self.logs = False
        self._watches = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context the base is run twice where a method that serves asks for it."""
        if self._watches or not any(looks_ahead(config) for config in self.tuner.peft_config.values()):
            yield
            return
        handle = self.tuner.model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._watches = True
        try:
            yield
        finally:
            self._watches = False
            handle.remove()

    def leave_cache(self, kwargs: dict[str, Any]) -> None:
        """Turns the cache off in the arguments of generate, where a run over all tokens decides.

        Raises:
            ConfigError: they turn it on.
        """
        if not self.serving():
            return
        if kwargs.get("use_cache"):
            raise ConfigError(
                "generate: use_cache cannot be True: an adapter here decides from a run over all tokens. Leave it out."
            )
        kwargs["use_cache"] = False

    def serving(self) -> list[str]:
        """The adapters that serve now and need the run before."""
        tuner = self.tuner
        return [
            name
            for name in tuner._serving()
            if looks_ahead(tuner.peft_config[name])
            and not any(module.disabled for module in tuner._adapters.sites[name].values())
        ]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = self.serving()
        current = self.tuner._adapters.current
        # On a partitioned base a rank whose rows name others gathers what its peers gather.
        names_others = current.rows is not None and current.rows.adapters is not None
        is_joint = names_others and any(map(is_partitioned, module.parameters()))
        if not names and not is_joint:
            return
        sized = token_input(args, kwargs)
        if names and not isinstance(sized, Tensor):
            raise ConfigError(f"adapter {names[0]!r}: needs input_ids or inputs_embeds. Pass them.")
        for name in names:
            first = self.tuner.peft_config[name].first_run(sized.shape[0], sized.shape[1])
            current.batch = {**current.batch, **{k: t.to(sized.device) for k, t in first.items()}}
        asked = {key: value for key, value in kwargs.items() if key != "labels"}
        with without_gradients():
            outputs = module.forward(*args, **{**asked, "output_hidden_states": True, "return_dict": True})
        if not names:
            return
        states = getattr(outputs, "hidden_states", None)
        if not states:
            raise ConfigError(
                f"adapter {names[0]!r}: {type(module).__name__} gives no hidden states of one stream, from which it "
                "could be decided what the layers do."
            )
        for name in names:
            p = current.run_with(self.tuner.tensors(name))
            reach(self.tuner, p.values())
            # As its layers are, whatever mode the base was left in.
            trains = any(layer.training for layer in self.tuner._adapters.sites[name].values())
            drops = functools.partial(self._drop, adapter=name) if trains else _kept
            made = self.tuner.peft_config[name].ahead(p, states[-1], drops)
            self.given[name] = made
            self.log += [made] if self.logs else []
            current.batch = {**current.batch, **made}

    def _drop(self, x: Tensor, p: float, name: str, adapter: str) -> Tensor:
        rows = self.tuner._adapters.current.rows
        if not p:
            return x
        if rows is None or rows.samples is None:
            return F.dropout(x, p)
        key = rows.stream_of(adapter, name)
        if rows.bins is None:
            return drop(x, p, rows.samples, key)
        return rows.bins.together(drop(rows.bins.apart(x), p, rows.samples, key))


def reads_of_first_run(model: Any, adapter: str, length: int) -> Reads:
    """What the layers of an adapter that looks ahead read in its first run over `length` positions of one sequence."""
    method, device = model.peft_config[adapter], model.get_base_model().device
    return tuple((name, t.to(device)) for name, t in method.first_run(1, length).items())


def reads_after_first_run(model: Any, adapter: str, hidden: Tensor) -> Reads:
    """What they read in the run itself, from the first one's last hidden state (1, positions, width). Each position's
    follows from its own and those before it, so the two runs can each keep their keys and values."""
    made = model.peft_config[adapter].ahead(model.base_model.tensors(adapter), hidden, _kept)
    return tuple(made.items())


def _kept(x: Tensor, p: float, name: str) -> Tensor:
    return x
