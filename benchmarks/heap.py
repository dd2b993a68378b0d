"""The heap of a process that measures steps on a CPU."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""mallopt's names for them (malloc.h)."""


def keep_heap() -> None:
    """Lets glibc's malloc keep what is freed, in blocks of up to 32 MiB, for the next step: else each step fetches anew
    from the system, page by page, what the one before gave back. With another malloc nothing changes."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
