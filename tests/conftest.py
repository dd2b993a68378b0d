"""One home and one local Ray for the whole session; no test touches the user's own."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # no network: a test that needs a hub brings its own stand-in
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["RAYPEFT_TRACKING"] = "off"  # MLflow's start would be paid by every run; its own tests turn it on

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.local_ray import LocalRay, down, ensure_up

ROOT = Path(__file__).parent.parent


_SESSION = pytest.StashKey[pytest.Session]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_SESSION] = session


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends a process that Ray was in without taking the interpreter apart: now and then a thread of Ray's core (2.60)
    still writes its log then, and the process dies of it when all is said."""
    session = config.stash.get(_SESSION, None)
    if session is None or "ray._raylet" not in sys.modules:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(session.exitstatus))


@pytest.fixture(scope="session", autouse=True)
def session_home(tmp_path_factory) -> Iterator[Path]:
    """RAYPEFT_HOME for every test: runs, registry and the local Ray's state."""
    home = tmp_path_factory.mktemp("home")
    before = os.environ.get("RAYPEFT_HOME")
    os.environ["RAYPEFT_HOME"] = str(home)
    os.environ.pop("RAYPEFT_CLUSTER", None)
    yield home
    if before is None:
        os.environ.pop("RAYPEFT_HOME", None)
    else:
        os.environ["RAYPEFT_HOME"] = before


@pytest.fixture(scope="session")
def local_ray(session_home) -> Iterator[LocalRay]:
    """A Ray with two CPUs and 200 MB of object store, with its dashboard, on loopback; ended with the session."""
    yield ensure_up(num_cpus=2, num_gpus=0, object_store_bytes=200_000_000)
    down()


@pytest.fixture(scope="module", autouse=True)
def apart_from_ray() -> Iterator[None]:
    """A file of tests leaves no connection to Ray behind: a command in process keeps its own."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT
