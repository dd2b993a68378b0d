"""A base that is no longer where the adapter's lineage says: what is said, before anything on a cluster moves."""

import socket

import pytest

from orchestrator.errors import ModelError
from orchestrator.identity import BaseIdentity
from orchestrator.registry import Registry
from orchestrator.serve.endpoints import RayEndpoints
from orchestrator.spec.job import DeploySpec

from ..adapters import lineage, make_adapter


@pytest.mark.parametrize(
    ("source", "came"),
    [
        (
            "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/base",
            "It came with the job of run docs-12345678, and went with it. ",
        ),
        ("/nowhere/base", ""),
    ],
)
def test_it_is_said_where_it_was_looked_for_and_what_to_do(tmp_path, source, came):
    registry = Registry(tmp_path / "registry")
    base = BaseIdentity("small", None, "b" * 64, source)
    version = registry.register(
        "docs", make_adapter(tmp_path / "a"), lineage(base=base, run_id="docs-12345678")
    )
    with pytest.raises(ModelError) as caught:
        RayEndpoints(registry, local=False).deploy(version, source, "main", DeploySpec())
    assert str(caught.value) == (
        f"the base 'small' of docs@1 was looked for in {source} on {socket.gethostname()}, and is not there. "
        f"{came}Put the base where every node finds it (PLACE: s3://..., a folder that all mount, a hub id) and "
        "register the adapter on it: raypeft pull docs@1 DIR, then raypeft register DIR --name docs --base PLACE"
    )
    assert registry.endpoint_names() == [] and registry.holders("docs@1") == []
