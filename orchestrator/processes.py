"""Who holds something: a process that another one, perhaps on another host, can recognise and find dead."""

from __future__ import annotations

import os
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessId:
    """One process of one boot of one host.

    `boot` also names the container's own numbering of processes, where there is one; `started` (clock ticks since
    boot) tells a reused pid apart.
    """

    host: str
    boot: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> ProcessId:
    """The calling process."""
    return ProcessId(socket.gethostname(), _boot_id(), os.getpid(), _stat(os.getpid())[1])


def is_alive(process: ProcessId) -> bool | None:
    """Whether `process` still runs; None where it belongs to another host, so that nobody here can tell."""
    here = this_process()
    if (process.host, process.boot) != (here.host, here.boot):
        return None
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it exists and belongs to another user
    state, started = _stat(process.pid)
    # a zombie holds nothing any more, though its pid still answers
    return state not in ("Z", "X") and started == process.started


def hear_interrupts() -> None:
    """Lets SIGINT end this process where it is a cluster's job that is stopped by it.

    A Ray that was started from a shell's background job ignores SIGINT, and so does all that it starts: what its Jobs
    API sends would not be heard until a run listens for it, and a job that still gets ready would be killed late.
    """
    stopped_by_it = os.environ.get("RAY_JOB_STOP_SIGNAL") == "SIGINT"
    is_deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if stopped_by_it and is_deaf and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _boot_id() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int]:
    """(state, start time in ticks) from /proc; ("?", 0) where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ("X" if Path("/proc/self/stat").exists() else "?"), 0
    return fields[0], int(fields[19])
