"""/v1/embeddings, /v1/classify, /v1/token-classify and /v1/question-answering: what a base with a head answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..api_error import ApiError
from ..engines.engine import AdapterRefused
from ..engines.heads import Classified, Embedded, Found, Heads, Input, NoTokens, Tagged, Terms, TooLong
from .admission import Admission
from .asked import Asked, asked
from .asked_task import task_of
from .catalogue import Catalogue
from .completions import ANSWERED_BY
from .event_stream import while_connected
from .head_api import (
    ClassifyRequest,
    EmbeddingRequest,
    QuestionAnsweringRequest,
    TokenClassifyRequest,
    classes,
    embeddings,
    entities,
    spans,
)
from .measured import timing_of
from .metrics import Metrics

Answer = TypeVar("Answer", Embedded, Classified, Tagged, Found)

_BYTES_A_TOKEN = 3
"""Roughly, of texts in whose tokens nobody has looked yet; what a request truly took is known when it is answered."""


class HeadRoutes:
    """The routes of task heads; one answers, the others say which."""

    def __init__(self, heads: Heads, catalogue: Catalogue, admission: Admission, metrics: Metrics) -> None:
        self._heads, self._catalogue = heads, catalogue
        self._admission, self._metrics = admission, metrics

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        read = await asked(request, EmbeddingRequest, self._admission)
        inputs, form = read.wanted.inputs, read.wanted.encoding_format
        self._check_ids(inputs)
        return await self._answer(
            read,
            inputs,
            lambda adapter, terms: self._heads.embed(inputs, adapter, terms),
            lambda answers: embeddings(answers, form),
        )

    async def classify(self, request: Request) -> Response:
        """POST /v1/classify."""
        read = await asked(request, ClassifyRequest, self._admission)
        inputs, top_k = read.wanted.inputs, read.wanted.top_k
        return await self._answer(
            read,
            inputs,
            lambda adapter, terms: self._heads.classify(inputs, adapter, terms),
            lambda answers: classes(answers, top_k),
        )

    async def token_classify(self, request: Request) -> Response:
        """POST /v1/token-classify."""
        read = await asked(request, TokenClassifyRequest, self._admission)
        inputs = read.wanted.inputs
        return await self._answer(
            read,
            inputs,
            lambda adapter, terms: self._heads.tag(inputs, adapter, terms),
            lambda answers: entities(answers, inputs),
        )

    async def question_answering(self, request: Request) -> Response:
        """POST /v1/question-answering."""
        read = await asked(request, QuestionAnsweringRequest, self._admission)
        questions, top_k = read.wanted.questions, read.wanted.top_k
        if questions is None:
            raise ApiError(
                "Give 'question' and 'context', or several of them as 'input'.",
                param="question" if read.wanted.input is None else "input",
            )
        return await self._answer(
            read,
            [Input(*each) for each in questions],
            lambda adapter, terms: self._heads.find(questions, adapter, top_k, terms),
            lambda answers: spans(answers, questions),
        )

    def _check_ids(self, inputs: Sequence[Input]) -> None:
        for each in inputs:
            if each.ids is not None and not 0 <= min(each.ids) <= max(each.ids) < self._heads.vocab_size:
                raise ApiError(f"Token ids go from 0 to {self._heads.vocab_size - 1}.", param="input")
            if each.ids is None and not each.text:
                raise ApiError("A text is empty.", param="input")

    async def _answer(
        self,
        read: Asked[Any],
        inputs: Sequence[Input],
        ask: Callable[[str | None, Terms], Awaitable[list[Answer]]],
        rows: Callable[[list[Answer]], list[dict[str, Any]]],
    ) -> Response:
        request, tenant, model = read.request, read.tenant, read.wanted.model
        timing = timing_of(request)
        timing.tenant = tenant.name
        tenant.check_model(model)
        await self._admission.know(tenant)
        num_tokens = sum(map(_guess, inputs))
        async with self._catalogue.acquire(model, read.sticky, tenant.may_use) as target:
            task = task_of(read.wanted.task_id, self._heads.num_tasks(target.adapter), target.name)
            with self._admission.admitted(tenant, target.name, 1, num_tokens, timing.usage):
                self._metrics.begin(timing, target.name)
                self._heads.check()

                async def run() -> list[Answer]:
                    return await ask(target.adapter, Terms(target.name, target.shadow, task))

                try:
                    answers = await while_connected(run(), request.receive)
                except TooLong as error:
                    raise ApiError(
                        f"This model's maximum context length is {error.max_tokens} tokens, and input "
                        f"{error.index} has {error.num_tokens}. Shorten it.",
                        param="input",
                        code="context_length_exceeded",
                    ) from error
                except NoTokens as error:
                    raise ApiError(f"Input {error.index} has no tokens.", param="input") from error
                except AdapterRefused as error:
                    raise ApiError(str(error), param="model", code="adapter_refused") from error
                timing.usage.prompt_tokens = sum(answer.num_tokens for answer in answers)
        tokens = timing.usage.prompt_tokens
        whole = {
            "object": "list",
            "data": rows(answers),
            "model": target.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return JSONResponse(whole, headers={ANSWERED_BY: target.name})


def _guess(one: Input) -> int:
    if one.ids is not None:
        return len(one.ids)
    return 2 + (len(one.text) + len(one.pair or "")) // _BYTES_A_TOKEN


def other_task(base: str, route: str) -> Callable[[Request], Awaitable[Response]]:
    """What a route says whose task the base does not have.

    Args:
        route: the one that it answers.
    """

    async def refuse(request: Request) -> Response:
        raise ApiError(
            f"The base '{base}' of this endpoint does not answer {request.url.path}; it answers {route}.",
            status=404,
            code="wrong_task",
        )

    return refuse
