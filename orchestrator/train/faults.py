"""What an error's own words say of its cause, for errors that have no class of their own."""

from __future__ import annotations

_BROKEN_LINK = ("connection closed", "connection reset", "broken pipe", "gloo", "nccl", "timed out", "socket")
_OUT_OF_MEMORY = (
    "out of memory",
    "outofmemory",
    "can't allocate memory",
    "cannot allocate memory",
    "oom-kill",
    "memory usage threshold",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the process, its node or its GPU."""
    return isinstance(error, MemoryError) or any(word in _text(error) for word in _OUT_OF_MEMORY)


def is_broken_link(error: BaseException) -> bool:
    """Whether the other ranks were lost: a consequence of their own failure as a rule."""
    return isinstance(error, RuntimeError | OSError) and any(word in _text(error) for word in _BROKEN_LINK)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__} {error}".lower()
