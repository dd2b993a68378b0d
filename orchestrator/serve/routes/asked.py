"""A request that was read: who asks, and for what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from starlette.requests import Request

from ..rollouts.sticky import Sticky
from .admission import Admission
from .body import read_body
from .key_check import Tenant
from .openai_api import Ask, parse

Wanted = TypeVar("Wanted", bound=Ask)


@dataclass(frozen=True)
class Asked(Generic[Wanted]):
    """One request to a route that answers with a model."""

    request: Request
    tenant: Tenant
    wanted: Wanted
    """What the body says."""
    sticky: Sticky


async def asked(request: Request, kind: type[Wanted], admission: Admission) -> Asked[Wanted]:
    """Reads a request.

    Args:
        kind: what its body may say.

    Raises:
        ApiError: 401 for a key that opens nothing, before the body is read; 413; 400 for what may not be said.
        ClientGone: the client hung up before the end.
    """
    tenant = await admission.tenant(request.headers.get("authorization"))
    body = await read_body(request)
    return Asked(request, tenant, parse(kind, body), Sticky(request.headers, body))
