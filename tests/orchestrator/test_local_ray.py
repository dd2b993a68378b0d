"""The local Ray: one per home, found again, on loopback, for this user alone; ended whole, and nothing
else is."""

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator import keeper, local_ray
from orchestrator.errors import ClusterError

SMALL = {"num_cpus": 1, "num_gpus": 0, "object_store_bytes": 80_000_000}
DRIVER = """
import os, ray
ray.init(address="ADDRESS", log_to_driver=False)
@ray.remote(num_cpus=0)
def worker(): return os.getpid()
print(ray.get(worker.remote()), ray.util.get_node_ip_address(), flush=True)
input()
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of its own; whatever a test leaves up is ended, and the environment is as before."""
    before = dict(os.environ)
    monkeypatch.setattr(local_ray, "_set_aside", {})
    monkeypatch.delenv(local_ray.ATTACHED, raising=False)
    monkeypatch.setenv("RAYPEFT_HOME", str(tmp_path / "home"))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "home"
    local_ray.down()
    os.environ.clear()
    os.environ.update(before)


def mode(path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def temporary() -> set[Path]:
    return set(Path(local_ray._short_dir()).glob("rp-*"))


def listening(pids) -> set[str]:
    """Addresses that these processes listen on, as /proc/net/tcp has them: hexadecimal, little-endian."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            inodes.add(target.removeprefix("socket:[").rstrip("]"))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.ray
@pytest.mark.slow  # starts and ends a Ray: 15 s
def test_a_local_ray_from_up_to_down(home):
    """One Ray, everything that is promised of it: a start costs five seconds, so it is looked at from all
    sides."""
    assert local_ray.current() is None
    assert not home.exists()  # asking leaves nothing behind
    others = temporary()

    with ThreadPoolExecutor(2) as pool:  # two commands at once start one
        first, second = pool.map(lambda _: local_ray.ensure_up(**SMALL), range(2))
    assert first.id == second.id and first.started + second.started == 1
    assert local_ray.ensure_up(num_cpus=7).num_cpus == 1
    assert local_ray.current().gcs_address == first.gcs_address

    # for this user alone
    assert mode(home / "local-ray.json") == 0o600
    assert mode(first.token_path) == 0o600
    assert mode(first.temp_dir) == 0o700
    assert first.token() not in (home / "local-ray.json").read_text()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{first.dashboard_url}/api/version")
    assert refused.value.code == 401

    # a driver in another process, with the environment that `attach` set here, is answered by a worker
    code = DRIVER.replace("ADDRESS", first.gcs_address)
    driver = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
    worker, address = driver.stdout.readline().split()
    assert address == "127.0.0.1"

    # all its processes are below the keeper, and listen on loopback only
    processes = keeper.descendants(first.keeper_pid)
    assert int(worker) in processes and driver.pid not in processes
    assert {os.getsid(pid) for pid in processes} != {os.getsid(0)}
    addresses = listening(processes)
    assert addresses and addresses <= LOOPBACK

    # its end is the end of all of them, and of nothing else
    bystander = subprocess.Popen(["sleep", "60"])
    assert local_ray.down() is True
    assert bystander.poll() is None
    for process in (bystander, driver):
        process.kill()
        process.communicate()
    assert not [pid for pid in (first.keeper_pid, *processes) if os.path.exists(f"/proc/{pid}")]
    assert list(home.iterdir()) == []
    assert temporary() == others
    assert local_ray.down() is False


@pytest.mark.ray
@pytest.mark.slow  # starts two Rays: 25 s
def test_a_ray_whose_keeper_was_killed_is_cleaned_up_by_the_next_start(home):
    first = local_ray.ensure_up(**SMALL)
    processes = keeper.descendants(first.keeper_pid)
    os.kill(first.keeper_pid, signal.SIGKILL)
    wait_until(lambda: local_ray.current() is None)
    second = local_ray.ensure_up(**SMALL)
    assert second.started and second.id != first.id
    # an orphan that had overwritten its environment is found as a child of one that had not
    assert not [pid for pid in processes if keeper.start_ticks(pid) is not None]
    assert not Path(first.temp_dir).exists()


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def left_behind(home) -> list:
    return [*(home.iterdir() if home.exists() else []), *keeper.marked("")]


def test_a_start_that_fails_leaves_nothing(home, monkeypatch):
    before = temporary()
    monkeypatch.setattr(local_ray, "RAY_HEAD", Path("/nowhere/ray_head.py"))
    with pytest.raises(ClusterError) as caught:
        local_ray.ensure_up(**SMALL)
    assert "the local Ray did not start (exit code 2)" in str(caught.value)
    assert "/nowhere/ray_head.py" in str(caught.value)
    assert (left_behind(home), temporary()) == ([], before)


def test_a_start_that_takes_too_long_is_ended(home, monkeypatch):
    monkeypatch.setattr(local_ray, "_short_dir", lambda: str(home.parent))
    before = temporary()
    monkeypatch.setattr(local_ray, "_head_command", lambda *options: ["sleep", "60"])
    with pytest.raises(ClusterError, match="the local Ray did not start within 1 s: it said nothing"):
        local_ray.ensure_up(**SMALL, timeout_s=1)
    assert (left_behind(home), temporary()) == ([], before)


def test_an_interrupted_start_leaves_nothing(home, monkeypatch):
    monkeypatch.setattr(local_ray, "_short_dir", lambda: str(home.parent))
    before = temporary()
    monkeypatch.setattr(local_ray, "_head_command", lambda *options: ["sleep", "60"])
    monkeypatch.setattr(local_ray, "_listens", lambda address: True)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(local_ray, "_wait_for_start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        local_ray.ensure_up(**SMALL)
    assert (left_behind(home), temporary()) == ([], before)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "id": "x", "keeper_pid": "y"}']
)
def test_a_damaged_state_file_is_no_ray(home, text):
    home.mkdir()
    (home / "local-ray.json").write_text(text)
    assert local_ray.current() is None
    assert local_ray.down() is False
    assert list(home.iterdir()) == []


def test_a_state_whose_pid_belongs_to_somebody_else_ends_nobody(home, tmp_path):
    """Process ids are used again: the time at which the process began tells them apart."""
    bystander = subprocess.Popen(["sleep", "60"])
    ray = local_ray.LocalRay(
        "x", "127.0.0.1:1", "http://127.0.0.1:1", str(tmp_path / "t"), None, 1, 0, bystander.pid, 1
    )
    home.mkdir()
    local_ray._write_state(ray)
    assert local_ray.current() is None
    local_ray.down()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_home_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYPEFT_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ClusterError) as caught:
        local_ray.ensure_up()
    assert "the folder for local state cannot be written" in str(caught.value)
    assert "Name another with RAYPEFT_HOME." in str(caught.value)


def test_a_given_token_is_used_and_an_absent_file_named(tmp_path, monkeypatch):
    monkeypatch.setattr(local_ray, "_set_aside", {})  # another test's Ray may have been joined
    monkeypatch.delenv(local_ray.ATTACHED, raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert Path(local_ray._write_token(tmp_path)).read_text() == "given"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert Path(local_ray._write_token(tmp_path)).read_text() == "given"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
    with pytest.raises(ClusterError, match="the token file '/nowhere' cannot be read"):
        local_ray._write_token(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert local_ray._write_token(tmp_path) is None


def test_attaching_hides_the_users_token_from_ray_alone(home, monkeypatch, tmp_path):
    """The user's token is another cluster's: it must be found again for that one, also by a child process,
    and the local Ray's must be shown to no other."""
    ray = local_ray.LocalRay(
        "x", "127.0.0.1:1", "http://127.0.0.1:1", "t", str(tmp_path / "token"), 1, 0, 1, 1
    )
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the user's")
    ray.attach()
    ray.attach()  # twice: what was set aside stays
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == ray.token_path
    assert local_ray.users_own("RAY_AUTH_TOKEN") == "the user's"
    assert local_ray.users_own("RAY_AUTH_TOKEN_PATH") is None
    local_ray._set_aside.clear()  # as in a child
    assert [local_ray.users_own(name) for name in local_ray.AUTH] == [None, None, None]


def test_the_lock_lets_one_in_and_leaves_no_file(home):
    inside = []

    def enter(_):
        with local_ray._lock():
            inside.append(1)
            assert len(inside) == 1
            time.sleep(0.01)
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(40)))
    assert list(home.iterdir()) == []


def test_facts_of_a_machine_whose_ray_is_down(home, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = local_ray.facts()
    assert facts.max_cpus <= 3 and facts.max_gpus == 0
    assert facts.nodes[0].memory > 0 and not facts.several_nodes


def test_nothing_of_it_imports_ray():
    code = "import sys, orchestrator.local_ray, orchestrator.submit.facts; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_keeper_ends_its_whole_tree_also_what_left_its_session(tmp_path):
    """A grandchild in a session of its own whose parent has gone: the keeper has adopted it."""
    note, folder = tmp_path / "pid", tmp_path / "folder"
    folder.mkdir()
    script = f"setsid sh -c 'echo $$ > {note}; exec sleep 60' & exit 0"
    running = subprocess.Popen([sys.executable, "-S", "-E", keeper.__file__, str(folder), "sh", "-c", script])
    wait_until(lambda: note.exists() and note.read_text())
    grandchild = int(note.read_text())
    assert grandchild in keeper.descendants(running.pid)
    running.terminate()
    assert running.wait(10) == 0
    assert keeper.start_ticks(grandchild) is None
    assert not folder.exists()


def test_the_keeper_goes_when_nothing_is_left(tmp_path):
    command = [sys.executable, "-S", "-E", keeper.__file__, str(tmp_path)]
    assert subprocess.run([*command, "false"], timeout=20).returncode == 1
    assert tmp_path.exists()  # for whoever asks why
    assert subprocess.run([*command, "true"], timeout=20).returncode == 0
    assert not tmp_path.exists()


def test_what_ignores_sigterm_is_killed(tmp_path):
    stubborn = "trap '' TERM; while :; do sleep 0.1; done"
    process = subprocess.Popen(["sh", "-c", stubborn])
    time.sleep(0.2)  # until the trap is set
    assert keeper.end(lambda: [process.pid] if process.poll() is None else [], grace_s=0.3) == []
    assert process.wait(5) == -signal.SIGKILL


def test_what_only_waits_for_others_is_not_waited_for():
    """Serve's controller and its proxies sit out the grace, in long polls that nobody will end."""
    names = [name.encode() for name in ("ray::ServeController", "ray::ProxyActor")]
    stubborn = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    stubborn += "open('/proc/self/comm', 'wb').write(sys.argv[1].encode()); print(flush=True); signal.pause()"
    processes = [
        subprocess.Popen([sys.executable, "-S", "-c", stubborn, name], stdout=subprocess.PIPE)
        for name in names
    ]
    for process in processes:
        process.stdout.readline()  # its name and its signals are set
    began = time.monotonic()
    left = keeper.end(lambda: [each.pid for each in processes if each.poll() is None], grace_s=60)
    assert left == [] and time.monotonic() - began < 30
    assert {each.wait(5) for each in processes} == {-signal.SIGKILL}


def test_the_state_file_has_a_format(home):
    home.mkdir()
    local_ray._write_state(local_ray.LocalRay("x", "a:1", "u", "t", None, 1, 0, 1, 1))
    assert json.loads((home / "local-ray.json").read_text())["format"] == 1


def test_a_ray_that_another_command_uses_is_left_to_it(home, tmp_path, monkeypatch):
    """A run that waited on it for room ended with it, without a word."""
    ray = local_ray.LocalRay("rp-x", "127.0.0.1:1", "", str(tmp_path), None, 1, 0, 1, 1)
    ended = []
    monkeypatch.setattr(local_ray, "_read_state", lambda: ray)
    monkeypatch.setattr(local_ray, "_clean_up", ended.append)
    local_ray._use(ray)
    with open(tmp_path / "users") as other:  # as another process has it
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not local_ray.leave() and local_ray.is_left() and not ended
    local_ray._use(ray)
    assert local_ray.leave() and ended == [ray]
