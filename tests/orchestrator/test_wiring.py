"""What joins the service to Ray."""

import ray._private.worker

from orchestrator import wiring


def test_what_rays_daemons_report_does_not_reach_standard_output(monkeypatch, capsys):
    """`(raylet) A worker died ...` beside the JSON of --json. The name is Ray's own: a new Ray may drop it."""
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", ray._private.worker.print_to_stdstream)
    assert "print_to_stdstream" in ray._private.worker.listen_error_messages.__code__.co_names
    wiring._keep_quiet()
    report = {"lines": ["A worker died or was killed"], "pid": "raylet", "is_err": False}
    ray._private.worker.print_to_stdstream(report, ignore_prefix=False)
    assert capsys.readouterr() == ("", "")
