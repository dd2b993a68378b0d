"""Ray's dashboard over HTTP: the Jobs API, the package store and what the cluster says about itself.

Plain HTTP instead of Ray's own client: a command that asks for a job's status must not import ray (1 to 3 s),
and the client's Ray need not even be installed.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import local_ray
from ..cluster import check_address
from ..errors import ClusterError

ANSWER_S = 5.0
"""A dashboard that lives answers a question in well under a second."""
UPLOAD_S = 600.0


@dataclass(frozen=True)
class Token:
    """A token and where it came from, for messages; never its value."""

    value: str = field(repr=False)
    source: str


def find_token(address: str) -> Token | None:
    """The token for `address`, by Ray's rules: `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH`, and with
    `RAY_AUTH_MODE=token` also `~/.ray/auth_token`. The local Ray has a token of its own.

    Raises:
        ClusterError: `RAY_AUTH_TOKEN_PATH` names a file that cannot be read.
    """
    local = local_ray.current()
    if local is not None and local.token_path and address.rstrip("/") == local.dashboard_url:
        return Token(local.token() or "", local.token_path)
    mode = (local_ray.users_own("RAY_AUTH_MODE") or "").lower()
    if mode == "disabled":
        return None
    if value := (local_ray.users_own("RAY_AUTH_TOKEN") or "").strip():
        return Token(value, "RAY_AUTH_TOKEN")
    if path := local_ray.users_own("RAY_AUTH_TOKEN_PATH"):
        try:
            return Token(Path(path).expanduser().read_text().strip(), path)
        except OSError as error:
            raise ClusterError(
                f"the token file '{path}' cannot be read ({error.strerror}).",
                where="RAY_AUTH_TOKEN_PATH",
                hint="Name a file that holds the cluster's token.",
            ) from error
    usual = Path("~/.ray/auth_token").expanduser()
    if mode == "token" and usual.is_file():
        return Token(usual.read_text().strip(), str(usual))
    return None


class Dashboard:
    """One cluster's dashboard, such as http://HOST:8265.

    Raises:
        SpecError: the address is not of that form.
    """

    def __init__(self, address: str) -> None:
        check_address(address)
        self.address = address.rstrip("/")
        self._token = find_token(self.address)
        host = urllib.parse.urlsplit(self.address).hostname or ""
        # A proxy for the outside world must not be asked for this machine's own ports.
        proxies = [urllib.request.ProxyHandler({})] if host in ("localhost", "127.0.0.1", "::1") else []
        self._open = urllib.request.build_opener(*proxies).open

    def get(self, path: str, timeout_s: float = ANSWER_S) -> Any:
        """The JSON at `path`; None where the cluster says 404."""
        return self._json(self._ask("GET", path, timeout_s=timeout_s))

    def post(self, path: str, body: Any = None, timeout_s: float = 60.0) -> Any:
        """Posts JSON; the JSON that comes back, None at 404."""
        data = None if body is None else json.dumps(body).encode()
        return self._json(self._ask("POST", path, data or b"", "application/json", timeout_s))

    def delete(self, path: str) -> bool:
        """Whether something was there to delete."""
        return self._ask("DELETE", path) is not None

    def has_package(self, name: str) -> bool:
        """Whether the cluster's store holds the package; keeps it there for ten minutes more."""
        return self._ask("GET", f"/api/packages/gcs/{name}", timeout_s=30.0) is not None

    def put_package(self, name: str, content: bytes) -> None:
        """Stores `gcs://NAME`. Raises ClusterError above Ray's upload limit."""
        path = f"/api/packages/gcs/{name}"
        self._ask("PUT", path, content, "application/octet-stream", UPLOAD_S)
        if not self.has_package(name):
            raise ClusterError(
                f"the package {name} ({len(content)} bytes) was sent, but the cluster does not have it.",
                where=self.address,
                hint="Look at the cluster's dashboard log, dashboard_JobHead.log.",
            )

    def _ask(
        self,
        method: str,
        path: str,
        data: bytes | None = None,
        content_type: str | None = None,
        timeout_s: float = ANSWER_S,
    ) -> bytes | None:
        """The answer's body; None at 404. Everything else that is no answer raises ClusterError."""
        request = urllib.request.Request(self.address + path, data=data, method=method)
        if content_type:
            request.add_header("Content-Type", content_type)
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token.value}")
        try:
            with self._open(request, timeout=timeout_s) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise self._refused(error) from error
        except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors
            raise self._silent(error) from error

    def _json(self, body: bytes | None) -> Any:
        if body is None:
            return None
        try:
            return json.loads(body)
        except ValueError as error:
            raise ClusterError(
                "something answers there, but it is not a Ray dashboard.",
                where=self.address,
                hint="Give the address that `ray start --head` printed, usually http://HOST:8265.",
            ) from error

    def _refused(self, error: urllib.error.HTTPError) -> ClusterError:
        if error.code == 401:
            return ClusterError(
                "the cluster asks for a token.",
                where=self.address,
                hint="Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's.",
            )
        if error.code == 403:
            source = self._token.source if self._token else "this machine"
            return ClusterError(
                f"the cluster refuses the token from {source}.",
                where=self.address,
                hint="Print the right one on the head node with: ray get-auth-token",
            )
        said = error.read().decode(errors="replace").strip()
        last = said.splitlines()[-1] if said else str(error.reason)
        return ClusterError(f"the cluster answered {error.code}: {last[:500]}", where=self.address)

    def _silent(self, error: OSError | ValueError) -> ClusterError:
        reason = getattr(error, "reason", error)
        said = getattr(reason, "strerror", None) or str(reason) or type(error).__name__
        return ClusterError(
            f"the cluster does not answer ({said}).",
            where=self.address,
            hint="Is it up, and its dashboard's port open to this machine? From outside, forward the port: "
            "ray dashboard CLUSTER.yaml, or kubectl port-forward service/HEAD 8265.",
        )
