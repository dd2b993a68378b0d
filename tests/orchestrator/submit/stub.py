"""A dashboard that answers as it is told: the parts of Ray's HTTP that `submit` uses, in this process."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NODE = {
    "state": "ALIVE",
    "resources_total": {"CPU": 4.0, "GPU": 1.0, "memory": 8e9},
    "labels": {"ray.io/accelerator-type": "L4"},
}


def nodes(*listed: dict[str, Any]) -> dict[str, Any]:
    """The answer of `/api/v0/nodes`."""
    return {"data": {"result": {"result": list(listed)}}}


class Stub:
    """Answers by path (without the query): JSON values, (code, text), or a function of the request's body that
    gives one of the two. A path that ends with `*` stands for all that begin so. Keeps the requests."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """What it was told to say."""
        for asked in (f"{method} {path}", path):
            for key, found in self.answers.items():
                if key == asked or (key.endswith("*") and asked.startswith(key[:-1])):
                    return found(body) if callable(found) else found
        return 404, "not there"

    def sent(self, method: str) -> list[tuple[str, bytes]]:
        """Path and body of the requests of one method."""
        return [(path, body) for kind, path, _, body in self.requests if kind == method]


@contextlib.contextmanager
def dashboard(answers: dict[str, Any]) -> Iterator[Stub]:
    """A stub that listens on a free port of loopback while the block runs."""
    stub = Stub(answers)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            stub.requests.append((self.command, path, dict(self.headers), body))
            found = stub.answer(self.command, path, body)
            code, text = found if isinstance(found, tuple) else (200, json.dumps(found))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


def cluster(ray: str, python: str, *listed: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Answers of a cluster with these versions and nodes, and no jobs yet."""
    return {
        "/api/v0/cluster_metadata": {"data": {"rayVersion": ray, "pythonVersion": python}},
        "/api/v0/nodes": nodes(*(listed or (NODE,))),
        "/api/cluster_status": {"data": {"clusterStatus": None}},
        "/api/jobs/": [],
        **more,
    }
