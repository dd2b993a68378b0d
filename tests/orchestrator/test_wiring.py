"""What joins the service to Ray."""

import signal
from dataclasses import replace

import pytest
import ray._private.worker

from orchestrator import wiring
from orchestrator.cluster import cluster_at
from orchestrator.errors import ClusterError


def test_what_rays_daemons_report_does_not_reach_standard_output(monkeypatch, capsys):
    """`(raylet) A worker died ...` beside the JSON of --json. The name is Ray's own: a new Ray may drop it."""
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", ray._private.worker.print_to_stdstream)
    assert "print_to_stdstream" in ray._private.worker.listen_error_messages.__code__.co_names
    wiring._keep_quiet()
    report = {"lines": ["A worker died or was killed"], "pid": "raylet", "is_err": False}
    ray._private.worker.print_to_stdstream(report, ignore_prefix=False)
    assert capsys.readouterr() == ("", "")


def test_connecting_leaves_ctrl_c_and_sigterm_as_they_were(monkeypatch):
    """A Ray that connects takes SIGTERM, and the run would be aborted instead of saving a checkpoint."""

    def init(**asked: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise ConnectionError("nobody is there")

    def ask(number: int, frame: object) -> None: ...

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", None)
    before = signal.signal(signal.SIGTERM, ask)
    try:
        inside = replace(cluster_at("http://127.0.0.1:1"), address="auto")
        with pytest.raises(ClusterError, match="nobody is there"):
            wiring.connect(inside)
        assert signal.getsignal(signal.SIGTERM) is ask
    finally:
        signal.signal(signal.SIGTERM, before)
