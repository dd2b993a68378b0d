"""/v1/completions and /v1/chat/completions: a request to generations, their pieces to an answer."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orchestrator.errors import ModelError, RaypeftError

from ..api_error import ApiError, engine_stopped
from ..engines.engine import Engine, EngineDead, Generation, ScoresNotFinite
from ..engines.prompts import Prompts
from .admission import Admission
from .asked import Asked, asked
from .asked_task import task_of
from .catalogue import Catalogue, Target
from .choices import Numbered, pieces
from .event_stream import DONE, EventStream, event, while_connected
from .measured import timing_of
from .metrics import Metrics, Timing
from .openai_api import ChatRequest, CompletionRequest
from .replies import Choice, Reply

_log = logging.getLogger("ray.serve")

ANSWERED_BY = "x-raypeft-adapter"
"""The response header that names the version which answered."""
_LONG = 10_000
"""Letters that take a tokenizer a millisecond or more."""
_HUGE = 50_000
"""Letters whose tokens are not counted where they cannot fit."""
_PROGRAM = version("raypeft")


class Completions:
    """The routes that generate.

    Args:
        kept_as: how the base is kept and run, for the answers' fingerprint.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        catalogue: Catalogue,
        admission: Admission,
        metrics: Metrics,
        kept_as: str = "",
    ) -> None:
        self._kept_as = kept_as
        self._engine, self._prompts, self._catalogue = engine, prompts, catalogue
        self._admission, self._metrics = admission, metrics

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        read = await asked(request, CompletionRequest, self._admission)
        prompts = [await self._completion_ids(prompt) for prompt in read.wanted.prompts]
        return await self._answer(read, prompts)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        read = await asked(request, ChatRequest, self._admission)
        try:
            messages = [message.plain() for message in read.wanted.messages]
            size = self._check_size([message["content"] for message in messages], "messages")
            ids = await _beside(size, lambda: self._prompts.chat_ids(messages))
        except ModelError as error:
            raise ApiError(str(error), param="messages") from error
        if not ids:
            raise ApiError("The messages have no tokens.", param="messages")
        return await self._answer(read, [ids])

    async def _completion_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            size = self._check_size([prompt], "prompt")
            ids = await _beside(size, lambda: self._prompts.text_ids(prompt))
        else:
            ids = prompt
        if not ids:
            raise ApiError("The prompt has no tokens.", param="prompt")
        if min(ids) < 0 or max(ids) >= self._engine.vocab_size:
            raise ApiError(f"Token ids go from 0 to {self._engine.vocab_size - 1}.", param="prompt")
        return ids

    def _check_size(self, texts: list[str], param: str) -> int:
        """How many letters there are.

        Raises:
            ApiError: so many that they cannot fit; to know the very number of tokens would take seconds.
        """
        size = sum(map(len, texts))
        if size > _HUGE and (least := sum(map(self._prompts.least_tokens, texts))) > self._engine.max_context:
            raise ApiError(
                f"This model's maximum context length is {self._engine.max_context} tokens. Your prompt has at least "
                f"{least}. Shorten the prompt.",
                param=param,
                code="context_length_exceeded",
            )
        return size

    async def _answer(
        self, read: Asked[CompletionRequest] | Asked[ChatRequest], prompts: list[list[int]]
    ) -> Response:
        request, tenant, wanted = read.request, read.tenant, read.wanted
        timing = timing_of(request)
        timing.tenant = tenant.name
        tenant.check_model(wanted.model)
        async with AsyncExitStack() as held:
            acquired = self._catalogue.acquire(wanted.model, read.sticky, tenant.may_use)
            target = await held.enter_async_context(acquired)
            generations = self._generations(wanted, prompts, target)
            most = sum(len(each.prompt_ids) + each.max_tokens for each in generations)
            await self._admission.know(tenant)
            usage = timing.usage
            held.enter_context(self._admission.admitted(tenant, target.name, len(generations), most, usage))
            self._metrics.begin(timing, target.name)
            self._engine.check()
            usage.prompt_tokens = sum(map(len, prompts))
            reply = Reply(
                chat=isinstance(wanted, ChatRequest),
                model=target.name,
                fingerprint=self._fingerprint(target),
                token_bytes=None if wanted.top is None else self._prompts.token_bytes,
                include_usage=bool(wanted.stream and wanted.include_usage),
            )
            headers = {ANSWERED_BY: target.name}
            coming = pieces(self._engine, generations)
            if not wanted.stream:
                whole = _whole(coming, len(generations), reply, timing)
                choices = await while_connected(whole, request.receive)
                return JSONResponse(reply.whole(choices, usage), headers=headers)
            return await self._stream(request, coming, len(generations), reply, timing, headers, held)

    async def _stream(
        self,
        request: Request,
        coming: AsyncGenerator[Numbered, None],
        num_choices: int,
        reply: Reply,
        timing: Timing,
        headers: Mapping[str, str],
        held: AsyncExitStack,
    ) -> Response:
        """Begins with the first piece, so that what fails before it is answered by its status."""
        held.push_async_callback(coming.aclose)
        first = await while_connected(anext(coming), request.receive)
        return EventStream(_events(first, coming, num_choices, reply, timing), headers, held.pop_all())

    def _generations(
        self, wanted: CompletionRequest | ChatRequest, prompts: list[list[int]], target: Target
    ) -> list[Generation]:
        """One per prompt and choice, in the order of the choices' indices."""
        generations: list[Generation] = []
        task = task_of(wanted.task_id, self._engine.num_tasks(target.adapter), target.name)
        for ids in prompts:
            one = Generation(
                prompt_ids=tuple(ids),
                adapter=target.adapter,
                max_tokens=self._room(wanted, len(ids), target),
                temperature=1.0 if wanted.temperature is None else wanted.temperature,
                top_p=1.0 if wanted.top_p is None else wanted.top_p,
                seed=wanted.seed,
                stop=wanted.stops,
                logprobs=wanted.top,
                queue=target.name,
                shadow=target.shadow,
                task=task,
            )
            for _ in range(wanted.n or 1):
                # Each choice has a seed of its own, else all would be the same.
                seed = None if wanted.seed is None else (wanted.seed + len(generations)) % 2**63
                generations.append(replace(one, seed=seed))
        return generations

    def _room(self, wanted: CompletionRequest | ChatRequest, num_tokens: int, target: Target) -> int:
        """Tokens of one answer.

        Raises:
            ApiError: the prompt leaves none, or fewer than were asked for.
        """
        room = self._engine.max_context - self._engine.virtual_tokens(target.adapter) - num_tokens
        limit = wanted.token_limit if wanted.token_limit is not None else room
        if room < 1 or limit > room:
            asked = f" and you asked for {limit} more" if wanted.token_limit is not None else ""
            raise ApiError(
                f"This model's maximum context length is {self._engine.max_context} tokens. "
                f"Your prompt has {num_tokens}{asked}. Shorten the prompt or lower max_tokens.",
                param="messages" if isinstance(wanted, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        return limit

    def _fingerprint(self, target: Target) -> str:
        """What an answer depends on beside the request: the base and how it is kept, the version, this program."""
        said = f"{self._catalogue.base.content_hash} {self._kept_as} {target.adapter} {_PROGRAM}"
        return "fp_" + hashlib.sha256(said.encode()).hexdigest()[:10]


async def _beside(size: int, work: Callable[[], list[int]]) -> list[int]:
    """The result of `work` on so many letters: of many in another thread, so that other requests need not wait."""
    return await asyncio.to_thread(work) if size > _LONG else work()


async def _whole(
    coming: AsyncGenerator[Numbered, None], num_choices: int, reply: Reply, timing: Timing
) -> list[Choice]:
    choices = [Choice(index) for index in range(num_choices)]
    taken = [reply.taken() for _ in choices]
    async with aclosing(coming):
        async for index, piece in coming:
            choice, ledger = choices[index], taken[index]
            timing.token(piece.num_tokens)
            choice.text.append(piece.text)
            choice.reason = piece.finish_reason
            if ledger is not None:
                choice.tokens += ledger.push(piece.text, piece.logprobs, piece.finish_reason)
    return choices


async def _events(
    first: Numbered,
    coming: AsyncGenerator[Numbered, None],
    num_choices: int,
    reply: Reply,
    timing: Timing,
) -> AsyncGenerator[bytes, None]:
    """The server-sent events of one answer; left early (the client hangs up), it cancels the engine."""
    taken = [reply.taken() for _ in range(num_choices)]

    def shown(numbered: Numbered) -> list[bytes]:
        index, piece = numbered
        ledger = taken[index]
        timing.token(piece.num_tokens)
        tokens = ledger.push(piece.text, piece.logprobs, piece.finish_reason) if ledger else []
        events = [event(reply.piece(index, piece.text, None, tokens))] if piece.text or tokens else []
        if piece.finish_reason is not None:
            events.append(event(reply.piece(index, "", piece.finish_reason)))
        return events

    try:
        openings = [reply.opening(index) for index in range(num_choices)]
        yield b"".join([*(event(opening) for opening in openings if opening), *shown(first)])
        async for numbered in coming:
            if events := shown(numbered):
                yield b"".join(events)
        if reply.include_usage:
            yield event(reply.counts(timing.usage))
    except Exception as error:
        said = broken_off(error)
        timing.broke = said.status
        yield event(said.body)
    yield DONE


def broken_off(error: Exception) -> ApiError:
    """What a stream says that cannot go on."""
    match error:
        case ApiError():
            return error
        case EngineDead():
            return engine_stopped()
        case ScoresNotFinite():
            return ApiError(str(error), status=500)
        case RaypeftError():
            return ApiError(str(error), status=503)
    _log.error("a stream broke off", exc_info=error)
    return ApiError(f"The answer broke off: {type(error).__name__}.", status=500)
