"""How many workers merge at once: what the work, the processors and the memory allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import PlacementError

TENSORS_HELD = 3
"""What a worker holds at most beside itself: the largest tensor so many times (its weight, its change, their sum)."""
DEFAULT_WORKERS = 4
_SPARE = 0.1
"""The share of free memory that is left alone."""


@dataclass(frozen=True)
class Crew:
    """How many workers there are, and why not more; None where nothing kept it from what was asked."""

    num_workers: int
    reason: str | None = None


def crew(
    asked: int | None, *, num_steps: int, num_cpus: int, idle_bytes: int, largest_bytes: int, free_bytes: int
) -> Crew:
    """Decides the number of workers.

    Args:
        asked: None: as many as there are processors, at most `DEFAULT_WORKERS`.
        num_steps: parts into which the work can be cut.
        idle_bytes: of a worker before it works; one is there already.
        largest_bytes: of the largest tensor. free_bytes: of memory now.

    Raises:
        PlacementError: there is no memory for one worker.
    """
    wanted = asked or min(num_cpus, DEFAULT_WORKERS)
    each = idle_bytes + TENSORS_HELD * largest_bytes
    fitting = int((free_bytes * (1 - _SPARE) + idle_bytes) // each)
    if fitting < 1:
        raise PlacementError(
            f"merging takes {gigabytes(each - idle_bytes)} of memory beside an idle worker, three times the largest "
            f"tensor, and {gigabytes(free_bytes)} are free.",
            hint="Free some, or merge on a larger machine.",
        )
    limits = {
        f"each takes {gigabytes(each)} of memory, and {gigabytes(free_bytes)} are free": fitting,
        f"Ray has {num_cpus} CPUs": num_cpus,
        f"there are {num_steps} layers to write": num_steps,
    }
    reason, number = min(limits.items(), key=lambda limit: limit[1])
    if number < wanted:
        return Crew(max(number, 1), f"{max(number, 1)} workers instead of {wanted}: {reason}.")
    return Crew(wanted)


def shares(sizes: Sequence[int], num_workers: int) -> list[list[int]]:
    """The steps of each worker, in their order: neighbours together, and about as many bytes for each."""
    total = sum(sizes)
    made: list[list[int]] = [[] for _ in range(num_workers)]
    done = 0
    for number, size in enumerate(sizes):
        middle = done + size / 2
        made[min(int(middle * num_workers / max(total, 1)), num_workers - 1)].append(number)
        done += size
    return [share for share in made if share]


def own_bytes(pid: int | str = "self", kinds: tuple[str, ...] = ("RssAnon", "RssShmem")) -> int:
    """What a process, this one by default, holds of memory that no other has: anonymous and shared, mapped files aside.

    Args:
        kinds: the lines of /proc/PID/status that are added up.

    Raises:
        OSError: there is no such process.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))


def gigabytes(size: float) -> str:
    """`1.25 GB`."""
    return f"{size / 1e9:.2f} GB"
