"""The chat form of bases that bring none, the same for training, evaluation and serving."""

from __future__ import annotations

from typing import Any

DEFAULT_CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
{{- '### ' + message['role'] | capitalize + ':\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
{%- else %}
{{- message['content'] }}
{%- endif %}
{{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Assistant:\\n' }}
{%- endif %}
"""
"""`### User:` and `### Assistant:` headings in plain text, so that no token has to be added to a base's
vocabulary; an answer ends with the tokenizer's own end of sequence."""

NO_TEMPLATE = "The base brings no chat template: chats have `### User:` and `### Assistant:` headings."


def ensure_chat_template(tokenizer: Any) -> Any:
    """`tokenizer`, with DEFAULT_CHAT_TEMPLATE where it has no template of its own."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer
