"""Lookup over HTTP: GET /v1/slates/{user_id}, /livez, /readyz.

Errors are {"error": ...}: 404 when there is neither a slate nor a popular one, 503 while Redis is unreachable. User ids
are percent-decoded.
"""

import contextlib
from collections.abc import AsyncIterator

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from worker import logging
from worker.config import RedisConfig
from worker.errors import StoreError, UnknownUser
from worker.lookup.lookup import Lookup

log = logging.get("http")
_encode = msgspec.json.Encoder().encode


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return _encode(content)


def application(config: RedisConfig) -> Starlette:
    """Return the ASGI application, which holds its Redis connections from start-up to shutdown."""
    lookup = Lookup(config)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with lookup:
            yield

    async def slate(request: Request) -> Response:
        return JsonResponse(await lookup.slate(request.path_params["user_id"]))

    async def livez(_: Request) -> Response:
        return JsonResponse({"status": "alive"})

    async def readyz(_: Request) -> Response:
        await lookup.check()
        return JsonResponse({"status": "ready"})

    return Starlette(
        routes=[Route("/v1/slates/{user_id:path}", slate), Route("/livez", livez), Route("/readyz", readyz)],
        lifespan=lifespan,
        exception_handlers={UnknownUser: _not_found, StoreError: _unavailable},
    )


async def _not_found(_: Request, error: Exception) -> Response:
    return JsonResponse({"error": str(error)}, 404)


async def _unavailable(_: Request, error: Exception) -> Response:
    log.warning("lookup failed", error=str(error))
    return JsonResponse({"error": str(error)}, 503, {"Retry-After": "1"})
