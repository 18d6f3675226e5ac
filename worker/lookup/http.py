"""Lookup over HTTP: GET /v1/slates/{user_id}, /livez, /readyz.

Errors are {"error": ...}: 404 when there is neither a slate nor a popular one, 503 while Redis is unreachable or more
than `serve.max_concurrent_lookups` wait. Their texts name no part of the deployment; the log does. User ids are
percent-decoded.
"""

import contextlib
from collections.abc import AsyncIterator

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from worker import logging
from worker.config import Config
from worker.errors import StoreError, UnknownUser
from worker.lookup.lookup import Lookup

log = logging.get("http")
RETRY_AFTER = {"Retry-After": "1"}
_encode = msgspec.json.Encoder().encode


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return _encode(content)


class SlateEndpoint:
    """Answers lookups, at most `max_concurrent` at a time."""

    def __init__(self, lookup: Lookup, max_concurrent: int) -> None:
        self._lookup = lookup
        self._max_concurrent = max_concurrent
        self._running = 0

    async def get(self, request: Request) -> Response:
        if self._running >= self._max_concurrent:
            log.warning("lookup refused: serve.max_concurrent_lookups are waiting", limit=self._max_concurrent)
            return JsonResponse({"error": "too many lookups at a time; try again"}, 503, RETRY_AFTER)
        self._running += 1
        try:
            return JsonResponse(await self._lookup.slate(request.path_params["user_id"]))
        finally:
            self._running -= 1


def application(config: Config) -> Starlette:
    """Return the ASGI application, which holds its Redis connections from start-up to shutdown."""
    lookup = Lookup(config)
    slates = SlateEndpoint(lookup, config.serve.max_concurrent_lookups)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with lookup:
            yield

    async def livez(_: Request) -> Response:
        return JsonResponse({"status": "alive"})

    async def readyz(_: Request) -> Response:
        await lookup.check()
        return JsonResponse({"status": "ready"})

    return Starlette(
        routes=[Route("/v1/slates/{user_id:path}", slates.get), Route("/livez", livez), Route("/readyz", readyz)],
        lifespan=lifespan,
        exception_handlers={UnknownUser: _not_found, StoreError: _unavailable},
    )


async def _not_found(_: Request, error: Exception) -> Response:
    log.debug("no slate", error=str(error))
    return JsonResponse({"error": "no slate for this user, and no popular one yet"}, 404)


async def _unavailable(_: Request, error: Exception) -> Response:
    log.warning("lookup failed", error=str(error))
    return JsonResponse({"error": "slates cannot be read at present; try again"}, 503, RETRY_AFTER)
