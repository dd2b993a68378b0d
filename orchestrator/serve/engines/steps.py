"""The steps of an engine's batch: who joins it, one forward after the other, and what each sequence is told of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_dist.packed_rows import PackedRows

from .apart import Apart, ApartLane
from .continuous import ContinuousBatches, Step
from .engine import EngineDead, ScoresNotFinite
from .live_sequence import LiveSequence, Outbox, Token, next_tokens
from .loaded_adapters import LoadedAdapters
from .packed_base import PackedBase
from .pieces import pieces_of
from .sampling import Sampler
from .step_cost import StepCost
from .turns import Turns

_LATE = 0.25
"""Of a step's time: what prompts of a flooded queue may add to it while others have less to do."""
_log = logging.getLogger(__name__)


class StepFailed(RuntimeError):
    """The forward in which a sequence was failed; nothing is known of whose fault it was."""


class Steps:
    """All in the engine's own thread.

    Args:
        model: the base.
        packed: it and its adapters, run in packed rows.
        batches: sequences side by side, with their cache. lane: those that run apart.
        turns: whose sequences they are.
        adapters: that serve them.
        eos_ids: the tokens that end an answer.
    """

    def __init__(
        self,
        model: Any,
        packed: PackedBase,
        batches: ContinuousBatches,
        lane: ApartLane,
        turns: Turns,
        adapters: LoadedAdapters,
        eos_ids: frozenset[int],
    ) -> None:
        self._model, self._packed = model, packed
        self._batches, self._lane = batches, lane
        self._turns, self._adapters, self._eos_ids = turns, adapters, eos_ids
        self._outbox = Outbox()
        self._cost = StepCost()
        self.prompt_tokens = 0
        """Of all prompts that joined."""

    def admit(self) -> None:
        """Lets go of those that nobody listens to, and takes in as many as there are places."""
        for sequence in self._turns.left():
            self._end(sequence)
        while self._batches.num_sequences + len(self._lane) < self._batches.sizes.max_sequences:
            taken = self._turns.take()
            if taken is None:
                return
            self._join(taken)

    def next_step(self) -> Step | None:
        """The next forward of those that run side by side; None where nobody does."""
        late = self._turns.late()
        if not late:
            return self._batches.next_step(self._place)
        return self._batches.next_step(
            self._place,
            lambda name: self._turns.by_name[name].queue in late,
            self._cost.addable(self._batches.num_sequences, _LATE),
        )

    def run(self, step: Step) -> None:
        """One forward and what follows from it. Where it fails, its sequences do, and the others go on."""
        began = time.monotonic()
        sequences = [self._turns.by_name[part.sequence] for part in step.parts]
        try:
            with torch.inference_mode():
                logits = self._forward(step, sequences)
                last = [s for s, part in zip(sequences, step.parts, strict=True) if part.is_last]
                chosen = next_tokens(last, logits)
        except Exception as error:
            self._fail(sequences, error)
        else:
            # Whatever comes next of one that has no token: it ends here.
            tokens = {s.name: 0 if token is None else token[0] for s, token in zip(last, chosen, strict=True)}
            self._batches.take(step, tokens)
            self._turns.served(zip(sequences, (part.length for part in step.parts), strict=True))
            for sequence, token in zip(last, chosen, strict=True):
                self._say(sequence, token)
        self._outbox.send()
        self._cost.took(sum(part.length for part in step.parts), time.monotonic() - began)

    def run_apart(self, apart: Apart) -> None:
        """One step of a sequence in rows of its own."""
        sequence = self._turns.by_name[apart.name]
        try:
            with torch.inference_mode():
                num, scores = self._lane.run(apart, self._packed.outputs)
                chosen = next_tokens([sequence], scores[None]) if scores is not None else []
        except Exception as error:
            self._fail([sequence], error)
            return
        self._turns.served([(sequence, num)])
        for token in chosen:
            apart.tokens.append(0 if token is None else token[0])
            self._say(sequence, token)

    def send(self) -> None:
        """Gives out what is not given out yet."""
        self._outbox.send()

    def end(self, error: EngineDead) -> None:
        """Fails every sequence that runs or waits, and those that come later."""
        self._turns.end(error)
        for sequence in self._turns.by_name.values():
            self._outbox.give(sequence.stream, error)
        self._outbox.send()

    def _join(self, sequence: LiveSequence) -> None:
        try:
            sequence.sampler = Sampler(self._model, sequence.request, self._eos_ids)
        except Exception as error:
            self._outbox.give(sequence.stream, error)
            self._end(sequence)
            return
        tokens = sequence.tokens
        self.prompt_tokens += len(tokens)
        if sequence.adapter is not None and sequence.adapter.is_apart:
            assert isinstance(sequence.choice, str)
            need = (len(tokens) + sequence.request.max_tokens) * self._lane.runs_of(sequence.choice)
            sequence.apart = Apart(sequence.name, sequence.choice, list(tokens), need, sequence.reads)
            self._lane.add(sequence.apart)
            return
        salt = sequence.choice if isinstance(sequence.choice, str) else repr(sequence.choice)
        # Keys and values of one task are another's no more than those of another adapter.
        salt += repr(sequence.reads) if sequence.reads else ""
        self._batches.add(sequence.name, tokens, salt)

    def _place(self, name: str) -> tuple[str, str]:
        """Where a sequence stands in a packed row: beside those that its adapter serves alike."""
        sequence = self._turns.by_name[name]
        return str(sequence.choice), str(sequence.reads)

    def _forward(self, step: Step, sequences: list[LiveSequence]) -> Tensor:
        """Scores (kept sequences, vocabulary) in fp32."""
        rows = PackedRows(
            adapters=tuple(s.choice for s in sequences),  # type: ignore[misc]
            lengths=tuple(part.length for part in step.parts),
            starts=tuple(part.start for part in step.parts),
            reads=tuple(s.reads for s in sequences),
            kept=tuple(i for i, part in enumerate(step.parts) if part.is_last),
            alone=self._packed.deterministic,
        )
        return self._packed.scores(rows, dict(step.inputs))

    def _fail(self, sequences: Sequence[LiveSequence], error: Exception) -> None:
        _log.error("a step of %d sequences failed", len(sequences), exc_info=error)
        for sequence in sequences:
            self._outbox.give(sequence.stream, StepFailed(f"{type(error).__name__}: {error}"))
            self._end(sequence)

    def _say(self, sequence: LiveSequence, given: Token | None) -> None:
        """Gives a new token's text out, and ends the sequence where it is its last, or where there is none."""
        if given is None:
            _log.error("scores with %r are not finite", sequence.choice)
            self._outbox.give(sequence.stream, ScoresNotFinite())
            self._end(sequence)
            return
        token, note = given
        notes = () if note is None else (note,)
        sequence.ids.append(token)
        sequence.num_generated += 1
        is_last = sequence.num_generated >= sequence.request.max_tokens
        for piece in pieces_of(token, sequence.text, self._eos_ids, notes, is_last=is_last):
            self._outbox.give(sequence.stream, piece)
            if piece.finish_reason is not None:
                self._end(sequence)

    def _end(self, sequence: LiveSequence) -> None:
        """Forgets a sequence, and its adapter where that was to go."""
        self._turns.forget(sequence)
        if sequence.apart is not None:
            self._lane.finish(sequence.name)
        elif sequence.runs:
            self._batches.finish(sequence.name)
        if sequence.adapter is not None:
            self._adapters.release(sequence.adapter)
