"""A local S3 server for tests: moto behind one lock, on a free loopback port.

moto looks at `If-None-Match` and writes in two steps on its threads; S3 does both at once, and so does this.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.server import ThreadedMotoServer
from werkzeug.serving import make_server


class _OneAtATime(DomainDispatcherApplication):
    def __init__(self) -> None:
        super().__init__(create_backend_app)
        self.alone = threading.Lock()

    def __call__(self, environ, start_response):
        with self.alone:
            return super().__call__(environ, start_response)


class S3Server(ThreadedMotoServer):
    """moto's server with requests one after the other."""

    def _server_entry(self) -> None:
        self._server = make_server(
            self._ip_address, self._port, _OneAtATime(), True, request_handler=MotoRequestHandler
        )
        self._server_ready_event.set()
        self._server.serve_forever()


@dataclass(frozen=True)
class Bucket:
    """A bucket and a plain client to look into it with."""

    name: str
    endpoint: str
    client: object

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def keys(self) -> list[str]:
        return sorted(
            item["Key"] for item in self.client.list_objects_v2(Bucket=self.name).get("Contents", ())
        )


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of one server for the whole session."""
    server = S3Server(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new bucket; the environment points every client at the server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    name = f"bucket-{os.urandom(6).hex()}"
    client.create_bucket(Bucket=name)
    return Bucket(name, s3_endpoint, client)


def run_together(program: str, *argument_lists: list[str]) -> list[str]:
    """Runs `program` in one fresh interpreter per list of arguments, all at once; what each printed."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in argument_lists
    ]
    outputs = []
    for child in children:
        out, err = child.communicate(timeout=240)
        assert child.returncode == 0, err
        outputs.append(out)
    return outputs
