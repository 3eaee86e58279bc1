"""GET /health, /ready, /version and /v1/models: what there is, and whether it works."""

from __future__ import annotations

import time

from fastapi import APIRouter, Response
from typing_extensions import TypedDict

from duopool import __version__
from duopool.core.errors import ModelNotFound
from duopool.core.types import Role
from duopool.router.generation import Generation
from duopool.router.http.errors import ErrorBody


class Model(TypedDict):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int | None
    """Longest prompt plus output in tokens; unknown until a worker has joined."""


class ModelList(TypedDict):
    object: str
    data: list[Model]


class Version(TypedDict):
    version: str


class Readiness(TypedDict):
    ready: bool
    pools: dict[str, int]
    """Workers of each role that take requests."""


def routes(generation: Generation) -> APIRouter:
    router = APIRouter()
    began_at = int(time.time())

    def model() -> Model:
        members = generation.pools.members
        return {
            "id": generation.model_id,
            "object": "model",
            "created": began_at,
            "owned_by": "duopool",
            "max_model_len": generation.limits().max_model_len if members else None,
        }

    @router.get("/v1/models", tags=["OpenAI"])
    async def models() -> ModelList:
        """The model that is served."""
        return {"object": "list", "data": [model()]}

    @router.get("/v1/models/{name:path}", tags=["OpenAI"], responses={404: {"model": ErrorBody}})
    async def one_model(name: str) -> Model:
        """The model by its name."""
        if name != generation.model_id:
            raise ModelNotFound(f"model {name[:128]!r} is not served; {generation.model_id!r} is")
        return model()

    @router.get("/health", response_class=Response, tags=["Operation"])
    async def health() -> Response:
        """200 as long as the router answers at all."""
        return Response()

    @router.get("/ready", tags=["Operation"], responses={503: {"model": Readiness}})
    async def ready(response: Response) -> Readiness:
        """200 when at least one worker of each role takes requests, else 503."""
        pools = {role.value: generation.pools.num_ready(role) for role in Role}
        if not all(pools.values()):
            response.status_code = 503
        return {"ready": all(pools.values()), "pools": pools}

    @router.get("/version", tags=["Operation"])
    async def version() -> Version:
        return {"version": __version__}

    return router
