"""Tokenizers and chat templates of the kinds that are found in the wild."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

TINY_LLAMA = Path(__file__).parents[3] / "jobs" / "assets" / "tiny-llama"

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Puts an empty thought before the answer that comes last, and drops it from the turns before (as Qwen3 does).
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say ü twice."},
    {"role": "assistant", "content": "ü ü"},
    {"role": "user", "content": "Again? \U0001f600"},
    {"role": "assistant", "content": "ü ü \U0001f600 ok"},
]


def tokenizer(template: str | None = "", special: tuple[str, ...] = ()) -> Any:
    """The embedded base's tokenizer, with another template (None: none) and further special tokens."""
    fresh = AutoTokenizer.from_pretrained(TINY_LLAMA)
    if template != "":
        fresh.chat_template = template
    if special:
        fresh.add_special_tokens({"additional_special_tokens": [*fresh.all_special_tokens, *special]})
    return fresh


def without_generation_blocks(template: str) -> str:
    """The same template without its `{% generation %}` marks."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
