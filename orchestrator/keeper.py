"""The process under which the local Ray lives, and the one thing that `raypeft down` has to end.

Ray's own processes outlive the command that starts them and would be adopted by the machine's init, out of
anyone's sight. The keeper makes itself their reaper (Linux `PR_SET_CHILD_SUBREAPER`): whatever Ray starts,
and whatever that starts in turn, stays below the keeper in the tree of processes, also in sessions of its
own. Told to end, it ends its whole tree and nothing else.

Run by path with `python -S -E`: the standard library only, about 9 MB. Exits with the starting command's code
where that fails, and with 0 once nothing is left below it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

PR_SET_CHILD_SUBREAPER = 36
MARKER = "RAYPEFT_LOCAL_RAY"
"""Environment variable that every process of one local Ray inherits; its value names that Ray."""
GRACE_S = 3.0
"""Between SIGTERM and SIGKILL. Nothing of Ray's own needs longer; a run saves before Ray is taken down."""
DAEMONS = ("gcs_server", "raylet", "ray::RuntimeEnv", "ray::ServeContr", "ray::ProxyActor")
"""Ray's own, as the kernel names them: they have nothing to save, and on SIGTERM wait for each other; Serve's for the
end of their long polls. What endpoints shall serve stands in the registry."""


def start_ticks(pid: int) -> int | None:
    """When process `pid` began, in clock ticks since boot; None where there is none, or only its zombie.
    Together with the id it names a process for good, since ids are used again."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def descendants(root: int) -> list[int]:
    """Every live process below `root` in the tree, in no order."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        fields = _stat(pid)
        if fields is not None and fields[0] not in "ZX":
            children.setdefault(int(fields[1]), []).append(pid)
    found, frontier = [], [root]
    while frontier:
        below = children.get(frontier.pop(), [])
        found += below
        frontier += below
    return found


def marked(name: str) -> list[int]:
    """Every live process of this user whose environment says `RAYPEFT_LOCAL_RAY=name`, and all below them.

    A process that has written its title over its environment (Ray's workers do) is found as a descendant.
    """
    line = f"{MARKER}={name}".encode()
    found: set[int] = set()
    for pid in _pids():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            if line in file.read().split(b"\0") and start_ticks(pid) is not None:
                found.update((pid, *descendants(pid)))
    return sorted(found - {os.getpid()})


def end(find: Callable[[], list[int]], grace_s: float = GRACE_S) -> list[int]:
    """Ends every process that `find()` lists, those that appear meanwhile too: SIGTERM, and SIGKILL after
    `grace_s` seconds, or as soon as none but Ray's daemons is left. Returns those that are still there (none, unless
    the kernel holds them)."""
    asked: set[int] = set()
    deadline = time.monotonic() + grace_s
    while left := find():
        late = time.monotonic() > deadline or all(_is_daemon(pid) for pid in left)
        if time.monotonic() > deadline + 5:
            return left
        send(signal.SIGKILL if late else signal.SIGTERM, left if late else set(left) - asked)
        asked.update(left)
        time.sleep(0.05)
    return []


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Signals each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def main(folder: str, *command: str) -> int:
    """Starts `command`, adopts what it leaves behind, and waits for all of it to end.

    Args:
        folder: its files, removed at the end; where it did not start, whoever started it reads them first.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    me, started = os.getpid(), False
    try:
        code = subprocess.call(command)
        started = code == 0
        while started and _wait():
            pass
        return code
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end(lambda: descendants(me))
        _reap()
        if started:
            shutil.rmtree(folder, ignore_errors=True)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(0)


def _wait() -> bool:
    """Waits for one child to end; False where none is left."""
    try:
        os.wait()
    except ChildProcessError:
        return False
    return True


def _reap(timeout_s: float = 2.0) -> None:
    """Takes in the dead until none is left: what dies unreaped stays a zombie where init does not care."""
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_daemon(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip() in DAEMONS
    except OSError:
        return True  # it has ended


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name: state, parent, group, session, ... (see proc(5))."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
