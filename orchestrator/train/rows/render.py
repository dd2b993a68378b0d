"""Records -> token ids and labels. Only answers are trained: every assistant turn with its end of turn, a
completion or an Alpaca output with the end of sequence, all of a plain text.

Which characters of a rendered chat are the answers is what the template's `{% generation %}` blocks say;
where it has none, each answer is what the rendering gains over the rendering of the turns before it with a
generation prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from orchestrator.chat_template import ensure_chat_template
from orchestrator.errors import DataError

from .chunks import chunks
from .outline import IGNORED, Outline
from .records import Message, Record

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Example:
    """One rendered row. `labels[i]` is `input_ids[i]`, or IGNORED; the model shifts them by one itself."""

    input_ids: list[int]
    labels: list[int]
    prompt_len: int
    """`input_ids[:prompt_len]` asks for the last answer; 0 for a plain text."""
    row_hash: str
    prompt: str | list[Message]
    """What comes before the last answer: messages, or text."""
    answer: str
    """The last answer as it stands in the data, never cut."""
    where: str = ""
    full_length: int = 0
    """Tokens before truncation."""
    task_id: int = 0

    @property
    def num_targets(self) -> int:
        """Trained tokens; the first token of a row has nothing before it to be predicted from."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def is_truncated(self) -> bool:
        """Whether tokens were cut off at the end."""
        return self.full_length > len(self.input_ids)

    def outline(self) -> Outline:
        """What `raypeft inspect` shows of it."""
        return Outline(
            self.input_ids, [label != IGNORED for label in self.labels], prompt_len=self.prompt_len
        )


def render(records: Iterable[Record], tokenizer: Any, sequence_len: int) -> Iterator[Example]:
    """Yields the example of each record, in order, cut at `sequence_len` tokens; the same for the same
    input."""
    ensure_chat_template(tokenizer)
    for batch in chunks(records):
        rendered: dict[int, Example] = {}
        chats = [i for i, record in enumerate(batch) if record.messages is not None]
        texts = [i for i, record in enumerate(batch) if record.messages is None]
        rendered.update(zip(chats, _chats([batch[i] for i in chats], tokenizer, sequence_len), strict=True))
        rendered.update(zip(texts, _texts([batch[i] for i in texts], tokenizer, sequence_len), strict=True))
        yield from (rendered[i] for i in range(len(batch)))


# ---- prompts with an answer, and plain texts


def _texts(records: Sequence[Record], tokenizer: Any, sequence_len: int) -> Iterator[Example]:
    """A prompt is tokenized by itself, as a server will tokenize it, and so is its answer."""
    if not records:
        return
    prompts = _ids(tokenizer, [record.prompt for record in records], add_special_tokens=True)
    answers = _ids(tokenizer, [record.answer for record in records], add_special_tokens=False)
    end = tokenizer.eos_token_id
    for record, prompt, answer in zip(records, prompts, answers, strict=True):
        if end is not None and prompt and prompt[-1] == end:
            prompt = prompt[:-1]  # some tokenizers end every text by themselves
        ids = [*prompt, *answer] + ([end] if end is not None else [])
        start = len(prompt)
        labels = [IGNORED] * start + ids[start:]
        yield Example(
            input_ids=ids[:sequence_len],
            labels=labels[:sequence_len],
            prompt_len=min(start, sequence_len) if record.prompt else 0,
            row_hash=record.row_hash,
            prompt=record.prompt,
            answer=record.answer,
            where=record.where,
            full_length=len(ids),
        )


def _ids(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


# ---- chats


def _chats(records: Sequence[Record], tokenizer: Any, sequence_len: int) -> Iterator[Example]:
    if not records:
        return
    template = ChatTemplate(tokenizer)
    texts, spans = [], []
    for record in records:
        assert record.messages is not None
        try:
            text, found = template.answers(list(record.messages))
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(
                f"does not fit the base's chat template: {error}.",
                where=record.where,
                hint="The template, a file of the base, decides which roles may follow one another.",
            ) from error
        texts.append(text)
        spans.append(found)
    for record, (ids, trained) in zip(records, _tokens(tokenizer, texts, spans), strict=True):
        messages = list(record.messages or ())
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        last = answers[-1] if answers else len(messages)
        yield Example(
            input_ids=ids[:sequence_len],
            labels=[token if is_trained else IGNORED for token, is_trained in zip(ids, trained, strict=True)][
                :sequence_len
            ],
            prompt_len=min(_last_run(trained), sequence_len),
            row_hash=record.row_hash,
            prompt=messages[:last],
            answer=messages[last]["content"] if answers else "",
            where=record.where,
            full_length=len(ids),
        )


def _last_run(trained: Sequence[bool]) -> int:
    """Where the last run of trained tokens begins; the length where there is none."""
    end = len(trained)
    while end and not trained[end - 1]:
        end -= 1
    start = end
    while start and trained[start - 1]:
        start -= 1
    return start if end else len(trained)


class ChatTemplate:
    """A tokenizer's chat template: messages -> text and the spans of its answers."""

    def __init__(self, tokenizer: Any) -> None:
        self.source: str = tokenizer.get_chat_template()
        self.has_generation_blocks = "generation" in _block_names(self.source)
        self._special = [token for token in tokenizer.all_special_tokens if token]
        self._tokens = tokenizer.special_tokens_map

    def text(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        """The rendered conversation."""
        return self._rendered(messages, add_generation_prompt=add_generation_prompt)[0]

    def answers(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """(the rendered conversation, the spans of characters that are answers, in order)."""
        if self.has_generation_blocks:
            text, spans = self._rendered(messages, return_assistant_tokens_mask=True)
            return text, [(start, end) for start, end in spans if end > start]
        return self._by_difference(messages)

    def _rendered(self, messages: list[Message], **options: Any) -> tuple[str, list[Span]]:
        rendered: Any = render_jinja_template(
            [messages], chat_template=self.source, **self._tokens, **options
        )
        texts, spans = rendered
        return texts[0], spans[0] if spans else []

    def _by_difference(self, messages: list[Message]) -> tuple[str, list[Span]]:
        whole = self.text(messages)
        spans: list[Span] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            past = spans[-1][1] if spans else 0
            span = self._gained(messages, i, whole) or self._found(message["content"], whole, past)
            if span is not None and span[0] >= past and span[1] > span[0]:
                spans.append(span)
        return whole, spans

    def _gained(self, messages: list[Message], i: int, whole: str) -> Span | None:
        """The span of answer `i` in `whole`, or None where the template renders earlier turns differently
        later on."""
        try:
            before = self.text(messages[:i], add_generation_prompt=True) if i else ""
            until = self.text(messages[: i + 1])
        except jinja2.TemplateError:  # a template may want a user's turn, or a last one
            return None
        if not whole.startswith(until):
            return None
        start = _shared(before, until) if i else until.find(messages[0]["content"])
        bare = until.rstrip()
        end = len(bare) if bare.endswith(tuple(self._special)) and len(bare) > start else len(until)
        content = messages[i]["content"].strip()
        return (start, end) if content in until[start:end] else None

    def _found(self, content: str, whole: str, past: int) -> Span | None:
        """The span of `content` itself with a special token right behind it: for templates that rewrite
        turns."""
        start = whole.find(content.strip(), past)
        if start < 0 or not content.strip():
            return None
        end = start + len(content.strip())
        for token in self._special:
            if whole.startswith(token, end):
                return start, end + len(token)
        return start, end


def _shared(a: str, b: str) -> int:
    """How many characters `a` and `b` begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _block_names(template: str) -> set[str]:
    """The names that open the template's `{% ... %}` blocks."""
    parts = template.split("{%")[1:]
    return {part.lstrip("-+ \n\t").split("%}")[0].strip("-+ \n\t").split(" ")[0] for part in parts}


def _tokens(
    tokenizer: Any, texts: list[str], spans: list[list[Span]]
) -> Iterator[tuple[list[int], list[bool]]]:
    """(ids, whether each is trained) of each text: a token is trained when any of its characters is in a
    span."""
    if not tokenizer.is_fast:
        yield from (_pieces(tokenizer, text, found) for text, found in zip(texts, spans, strict=True))
        return
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for ids, offsets, found in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
        trained = [False] * len(ids)
        token = 0
        for start, end in found:
            while token < len(ids) and offsets[token][1] <= start:
                token += 1
            while token < len(ids) and offsets[token][0] < end:
                trained[token] = offsets[token][1] > start
                token += 1
        yield ids, trained


def _pieces(tokenizer: Any, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
    """For tokenizers without offsets: the text cut at the spans' borders, each piece tokenized by itself."""
    ids: list[int] = []
    trained: list[bool] = []
    at = 0
    for start, end in [*spans, (len(text), len(text))]:
        for piece, is_answer in ((text[at:start], False), (text[start:end], True)):
            if piece:
                found = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                ids += found
                trained += [is_answer] * len(found)
        at = end
    return ids, trained
