"""The local Ray: started in the background, found again by later commands, ended by `raypeft down`.

It binds to loopback only, asks for a token (another user of the machine must not run code as this one), keeps
its files in a short temporary folder and all its processes below one keeper (`keeper.py`). Nothing here
imports ray: a process that is going to must call `LocalRay.attach` first (`ensure_up` does), since Ray reads
how to authenticate, and which of the machine's addresses it may use, from the environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from . import keeper
from .cluster import ClusterFacts, NodeFacts
from .errors import ClusterError
from .home import home
from .machine import memory_bytes

GIB = 1024**3
START_TIMEOUT_S = 120.0
RAY_HEAD = Path(__file__).parent / "submit" / "ray_head.py"

# Ray takes its node's address from the first network interface and listens on all of them; where clusters of
# several nodes are switched off (as on macOS) it stays on 127.0.0.1. Head, workers and drivers must agree.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Ray Train's controller looks at its workers every 2 s by default: that long, a finished run seems to go on.
QUICK_TRAIN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
# Serve's proxies answer for a replica that went away as OpenAI's clients read it; see serve/proxy/broken_answers.py.
READABLE_ERRORS = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "orchestrator.serve.proxy.broken_answers:middlewares"
}
# Left by a Ray that this process belongs to or was told to use; they would misdirect a new one.
FOREIGN = (
    "RAY_ADDRESS",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_START_HOOK",
    "RAY_NAMESPACE",
    "RAY_RUNTIME_ENV_HOOK",
)


AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
ATTACHED = "RAYPEFT_ATTACHED"
"""Set by `LocalRay.attach` to its token's path, so that this process and its children know whose that is."""
_set_aside: dict[str, str | None] = {}
"""What the user had set of `AUTH` before this process was attached."""


def users_own(name: str) -> str | None:
    """A variable of `AUTH` as the user set it, for clusters other than the local one."""
    if name in _set_aside:
        return _set_aside[name]
    if ATTACHED in os.environ:  # inherited from a process that was attached
        path = os.environ[ATTACHED]
        if (os.environ.get("RAY_AUTH_TOKEN_PATH") or "") == path:
            return None
    return os.environ.get(name)


@dataclass(frozen=True)
class LocalRay:
    """A local Ray that is up."""

    id: str
    gcs_address: str
    """For `ray.init(address=...)`: 127.0.0.1:PORT."""
    dashboard_url: str
    """http://127.0.0.1:PORT, where the Jobs API answers too."""
    temp_dir: str
    token_path: str | None
    """The file (mode 0600) with the token; None where RAY_AUTH_MODE=disabled was set when it was started."""
    num_cpus: int
    num_gpus: int
    keeper_pid: int
    keeper_start: int
    """Clock ticks since boot: with the pid, the keeper's name for good."""
    started: bool = False
    """Whether this call started it."""

    @property
    def environment(self) -> dict[str, str]:
        """What a process has to have set before it imports ray, to be a driver of this Ray."""
        ours = {"RAY_USAGE_STATS_ENABLED": "0", ATTACHED: self.token_path or ""}
        return {**LOOPBACK_ONLY, **QUICK_TRAIN, **_auth(self.token_path), **ours}

    def attach(self) -> None:
        """Makes this process able to connect: `ray.init(address=self.gcs_address)` works afterwards, also
        where ray was imported before (a notebook)."""
        for name in AUTH:
            _set_aside.setdefault(name, users_own(name))
        os.environ.update(self.environment)
        os.environ.pop("RAY_AUTH_TOKEN", None)
        if "ray._private.ray_constants" in sys.modules:
            sys.modules["ray._private.ray_constants"].ENABLE_RAY_CLUSTER = False  # type: ignore[attr-defined]
        if "ray._raylet" in sys.modules:
            raylet = sys.modules["ray._raylet"]
            raylet.Config.initialize("")  # type: ignore[attr-defined]  # reads RAY_AUTH_MODE again
            raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]

    def token(self) -> str | None:
        """The token for the dashboard's and the Jobs API's `Authorization: Bearer`."""
        return Path(self.token_path).read_text().strip() if self.token_path else None

    def is_alive(self) -> bool:
        """Whether its keeper lives and its GCS answers."""
        return keeper.start_ticks(self.keeper_pid) == self.keeper_start and _listens(self.gcs_address)


def ensure_up(
    num_cpus: int | None = None,
    *,
    num_gpus: int | None = None,
    object_store_bytes: int | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> LocalRay:
    """The local Ray, started where none is up, and this process attached to it.

    Args:
        num_cpus: what Ray shall count with; the CPUs that this process may use where None.
        num_gpus: likewise; those that are visible to this process where None.
        object_store_bytes: shared memory for objects; 200 MB, on machines above 32 GiB of memory 1 GiB.
        timeout_s: how long the start may take.

    Raises:
        ClusterError: it did not start. Nothing is left behind then.
    """
    with _lock():
        ray = _read_state()
        if ray is None or not ray.is_alive():
            _clean_up(ray)
            ray = _start(
                num_cpus or visible_cpus(),
                visible_gpus() if num_gpus is None else num_gpus,
                object_store_bytes or (200_000_000 if memory_bytes() <= 32 * GIB else GIB),
                timeout_s,
            )
        _use(ray)
    ray.attach()
    return ray


def current() -> LocalRay | None:
    """The local Ray that is up, or None. This process is not attached to it."""
    ray = _read_state()
    return ray if ray is not None and ray.is_alive() else None


def down() -> bool:
    """Ends the local Ray: its processes and nothing else, its temporary folder, its state. Returns whether
    there was one.

    Raises:
        ClusterError: processes are left that cannot be ended.
    """
    with _lock():
        ray = _read_state()
        _clean_up(ray)
        return ray is not None


def release() -> None:
    """Says that this process uses the local Ray no more."""
    while _users:
        os.close(_users.popitem()[1])


def leave() -> bool:
    """As `down`, unless other processes use it: the last of them then ends it (`is_left`). Returns whether it is gone.

    Raises:
        ClusterError: as `down`.
    """
    release()
    with _lock():
        ray = _read_state()
        if ray is not None and _is_used(ray):
            (Path(ray.temp_dir) / _LEFT).touch()
            return False
        _clean_up(ray)
        return True


def is_left() -> bool:
    """Whether the command that started the local Ray has ended before others that use it."""
    ray = _read_state()
    return ray is not None and (Path(ray.temp_dir) / _LEFT).exists()


_USERS, _LEFT = "users", "left"
"""Files in its folder: which its users hold a shared lock on, and which says that its last user is to end it."""
_users: dict[str, int] = {}
"""The descriptor of that lock, by the Ray's id."""


def _use(ray: LocalRay) -> None:
    if ray.id not in _users and Path(ray.temp_dir).is_dir():
        _users[ray.id] = os.open(Path(ray.temp_dir) / _USERS, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(_users[ray.id], fcntl.LOCK_SH)


def _is_used(ray: LocalRay) -> bool:
    try:
        with open(Path(ray.temp_dir) / _USERS, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def visible_cpus() -> int:
    """CPUs that this process may use: its affinity, or a container's share of time where that is less."""
    cpus = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    return cpus


def visible_gpus() -> int:
    """NVIDIA GPUs that this process may use: its device files, fewer where CUDA_VISIBLE_DEVICES says so."""
    devices = sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return devices
    named = [part for part in chosen.split(",") if part.strip() not in ("", "-1", "NoDevFiles")]
    return min(devices, len(named))


def facts() -> ClusterFacts:
    """What the local Ray has, or would have if it were started now."""
    ray = current()
    cpus = ray.num_cpus if ray else visible_cpus()
    gpus = ray.num_gpus if ray else visible_gpus()
    node = NodeFacts(cpus=cpus, gpus=gpus, memory=memory_bytes())
    return ClusterFacts(nodes=(node,), max_cpus=cpus, max_gpus=gpus, source="this machine")


def _start(num_cpus: int, num_gpus: int, object_store_bytes: int, timeout_s: float) -> LocalRay:
    name = secrets.token_hex(6)
    # mode 0700; Ray opens its own folder to everybody
    folder = Path(tempfile.mkdtemp(prefix="rp-", dir=_short_dir()))
    log, ray_dir, scratch = folder / "start.log", folder / "r", folder / "t"
    try:
        ray_dir.mkdir()
        scratch.mkdir()  # what its processes leave behind when they are killed goes with the folder
        token_path = _write_token(folder)
        head = _head_command(num_cpus, num_gpus, object_store_bytes, str(ray_dir))
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-S", "-E", keeper.__file__, str(folder), *head],
                env=_daemon_environment(name, token_path) | {"TMPDIR": str(scratch)},
                cwd=ray_dir,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        address, url = _wait_for_start(process, log, ray_dir, timeout_s)
        ray = LocalRay(
            id=name,
            gcs_address=address,
            dashboard_url=url,
            temp_dir=str(folder),
            token_path=token_path,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            keeper_pid=process.pid,
            keeper_start=keeper.start_ticks(process.pid) or 0,
            started=True,
        )
        _write_state(ray)
    except BaseException:  # Ctrl-C too: half a Ray must not stay
        keeper.end(lambda: keeper.marked(name))
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _daemons.append(process)
    return ray


_daemons: list[subprocess.Popen[bytes]] = []
"""Keepers that this process started: referenced, so that Popen does not complain that they live on."""


def _head_command(num_cpus: int, num_gpus: int, object_store_bytes: int, temp_dir: str) -> list[str]:
    options = {
        "--node-ip-address": "127.0.0.1",
        "--port": "0",
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": "0",
        "--dashboard-agent-listen-port": "0",
        "--include-dashboard": "true",
        "--include-log-monitor": "false",
        "--num-cpus": str(num_cpus),
        "--num-gpus": str(num_gpus),
        "--object-store-memory": str(object_store_bytes),
        "--temp-dir": temp_dir,
    }
    flags = [f"{option}={value}" for option, value in options.items()]
    return [
        sys.executable,
        "-P",
        str(RAY_HEAD),
        "start",
        "--head",
        *flags,
        "--no-monitor",
        "--disable-usage-stats",
    ]


def _daemon_environment(name: str, token_path: str | None) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key not in (*FOREIGN, "RAY_AUTH_TOKEN")}
    ours = {"RAY_USAGE_STATS_ENABLED": "0", "NO_COLOR": "1", keeper.MARKER: name}
    return {**READABLE_ERRORS, **inherited, **LOOPBACK_ONLY, **QUICK_TRAIN, **_auth(token_path), **ours}


def _auth(token_path: str | None) -> dict[str, str]:
    if token_path is None:
        return {"RAY_AUTH_MODE": "disabled"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_path}


def _write_token(folder: Path) -> str | None:
    """Writes the token file, mode 0600: RAY_AUTH_TOKEN, or the content of RAY_AUTH_TOKEN_PATH, or a new one.
    None where the user switched authentication off."""
    if (users_own("RAY_AUTH_MODE") or "").lower() == "disabled":
        return None
    token = (users_own("RAY_AUTH_TOKEN") or "").strip()
    given = users_own("RAY_AUTH_TOKEN_PATH")
    if not token and given:
        try:
            token = Path(given).expanduser().read_text().strip()
        except OSError as error:
            raise ClusterError(
                f"the token file '{given}' cannot be read ({error.strerror}).",
                where="RAY_AUTH_TOKEN_PATH",
                hint="Name a file that holds the token, or unset the variable: a token is made then.",
            ) from error
    path = folder / "token"
    _write_private(path, token or secrets.token_hex(32))
    return str(path)


def _wait_for_start(
    process: subprocess.Popen[bytes], log: Path, ray_dir: Path, timeout_s: float
) -> tuple[str, str]:
    """GCS address and dashboard URL, once `ray start` has come back."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        said = log.read_text(errors="replace")
        url = re.search(r"RAY_API_SERVER_ADDRESS='(http://[^']+)'", said)
        address = ray_dir / "ray_current_cluster"
        if "Ray runtime started" in said and url and address.exists() and address.read_text():
            return address.read_text().strip(), url.group(1)
        if process.poll() is not None:
            raise ClusterError(
                f"the local Ray did not start (exit code {process.returncode}): {_last_lines(said)}",
                hint="Check memory, /dev/shm and the temporary folder, then: raypeft up",
            )
        time.sleep(0.05)
    said = _last_lines(log.read_text(errors="replace"))
    raise ClusterError(
        f"the local Ray did not start within {timeout_s:.0f} s: {said}",
        hint="Try again when the machine is less busy: raypeft up",
    )


def _clean_up(ray: LocalRay | None) -> None:
    """Ends what is left of `ray`, alive or not, and removes its folder and state."""
    if ray is None:
        _state_path().unlink(missing_ok=True)
        return
    if keeper.start_ticks(ray.keeper_pid) == ray.keeper_start:
        keeper.send(signal.SIGTERM, [ray.keeper_pid])
        _wait_for_end(ray)
    if left := keeper.end(lambda: keeper.marked(ray.id)):
        raise ClusterError(
            f"processes of the local Ray could not be ended: {', '.join(map(str, left))}.",
            hint="They are held by the kernel; look at them with: ps -o pid,stat,args -p PID",
        )
    shutil.rmtree(ray.temp_dir, ignore_errors=True)
    _state_path().unlink(missing_ok=True)


def _wait_for_end(ray: LocalRay) -> None:
    deadline = time.monotonic() + keeper.GRACE_S + 7
    while keeper.start_ticks(ray.keeper_pid) == ray.keeper_start and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in _daemons:  # where this process started it, it is ours to reap
        process.poll()


def _read_state() -> LocalRay | None:
    """What the state file says; None where there is none, or none that this version wrote."""
    try:
        stored = json.loads(_state_path().read_text())
        return LocalRay(
            **{field.name: stored[field.name] for field in fields(LocalRay) if field.name != "started"}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_state(ray: LocalRay) -> None:
    state = {"format": 1, **asdict(ray)}
    del state["started"]
    aside = _state_path().with_name(f".local-ray-{os.getpid()}.json")
    try:
        _write_private(aside, json.dumps(state, indent=1))
        os.replace(aside, _state_path())
    finally:
        aside.unlink(missing_ok=True)


def _write_private(path: Path, text: str) -> None:
    """Writes a file that only this user can read, from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def _state_path() -> Path:
    return home() / "local-ray.json"


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One command at a time starts or ends the local Ray. The file is gone when nobody holds it."""
    path = home() / "local-ray.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _hold(path)
    except OSError as error:
        raise ClusterError(
            f"the folder for local state cannot be written ({error.strerror}).",
            where=str(path.parent),
            hint="Name another with RAYPEFT_HOME.",
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _hold(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)  # its last holder removed the file while we waited


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return True
    except OSError:
        return False


def _short_dir() -> str:
    """Ray's sockets lie about 60 characters below its folder, and a socket's path has at most 107."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 30 or not os.access("/tmp", os.W_OK) else "/tmp"


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:]) or "it said nothing"
