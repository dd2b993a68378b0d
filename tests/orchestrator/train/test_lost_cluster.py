"""Ray's head is gone: the run says so, and not what that did to its workers."""

from __future__ import annotations

import pytest
from ray.exceptions import RaySystemError

from orchestrator.errors import ClusterError, DataError, NotFiniteError, TrainingError
from orchestrator.train.driver.launch import RayRunner

from .tiny import job, request


@pytest.mark.parametrize(
    ("before", "told"),
    [
        (None, ClusterError),
        (RaySystemError("gone"), ClusterError),
        (TrainingError("what leads the workers was lost: RpcError"), ClusterError),
        (DataError("row 3 lacks a completion."), DataError),
        (NotFiniteError("the loss of step 3 is nan."), NotFiniteError),
    ],
)
def test_a_lost_cluster_goes_before_what_it_did_to_the_workers(tmp_path, before, told):
    runner = RayRunner()
    runner._request, runner._error = request(tmp_path, job(tmp_path)), before
    runner._lose_cluster()
    with pytest.raises(told) as caught:
        runner.outcome()
    if told is ClusterError:
        assert str(caught.value) == (
            "run run: the Ray cluster was lost while the run was on it. Run the same command again: it goes on from "
            "the last checkpoint."
        )
