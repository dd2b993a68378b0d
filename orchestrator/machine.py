"""The memory of this machine; in a container, what the container may have of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
GROUP, OLD_GROUP = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
"""Where the limits of control groups are read, of version 2 and of version 1."""
_UNKNOWN_BYTES = 2**30
"""What counts as free where nothing tells."""


def memory_bytes() -> int:
    """All of it, bytes."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(limit for limit, _ in _groups())])


def free_bytes() -> int:
    """What may still be taken, bytes: of a container's limit what it does not hold, caches of files aside."""
    left = [limit - held for limit, held in _groups()]
    available = _table(MEMINFO).get("MemAvailable:")
    if available is not None:
        left.append(available * 1024)
    return max(0, min(left, default=_UNKNOWN_BYTES))


def _groups() -> Iterator[tuple[int, int]]:
    """Limit and memory held, bytes, of each version of control groups that sets a limit here."""
    for folder, limit, current, files in (
        (GROUP, "memory.max", "memory.current", ("inactive_file", "active_file")),
        (
            OLD_GROUP,
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_inactive_file", "total_active_file"),
        ),
    ):
        try:
            bound, held = (int((folder / name).read_text()) for name in (limit, current))
        except (OSError, ValueError):  # there is no such group, or its limit is "max"
            continue
        cached = _table(folder / "memory.stat")
        yield bound, held - sum(cached.get(name, 0) for name in files)


def _table(path: Path) -> dict[str, int]:
    """The file's lines `NAME NUMBER ...`; none where it cannot be read."""
    try:
        rows = (line.split() for line in path.read_text().splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
    except OSError:
        return {}
