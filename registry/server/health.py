"""The health service: ``""`` the process lives, ``ready`` it may serve, ``name/NAME`` that daemon serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from registry.directory import Change, Directory
from registry.errors import NoSuchName
from registry.ownership import WorkerState

SERVICE = "grpc.health.v1.Health"
READY = "ready"
NAME = "name/"
LOOK_EVERY = 0.5
"""Seconds between two looks of a watcher at what the directory does not tell of."""


class Health(health_pb2_grpc.HealthServicer):
    """``ready()`` says whether the session is trusted and the directory in sync."""

    def __init__(self, directory: Directory, ready: Callable[[], bool]) -> None:
        self._directory = directory
        self._ready = ready

    async def Check(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.HealthCheckResponse:
        """Say how it is now.  Raises NoSuchName for a service that is not known."""
        status = self._status(request.service)
        if status is None:
            raise NoSuchName(
                f"no service {request.service!r} to check",
                hint=f'"", "{READY}" or "{NAME}<a daemon>"',
                details={"service": request.service},
            )
        return pb.HealthCheckResponse(status=status)

    async def Watch(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        """Say how it is now and after every change, for ever."""
        changed = asyncio.Event()

        def tell(change: Change) -> None:
            changed.set()

        unsubscribe = self._directory.subscribe(tell)
        told: int | None = None
        try:
            while True:
                changed.clear()
                status = self._status(request.service)
                status = pb.HealthCheckResponse.SERVICE_UNKNOWN if status is None else status
                if status != told:
                    told = status
                    yield pb.HealthCheckResponse(status=status)
                await _within(LOOK_EVERY, changed)
        finally:
            unsubscribe()

    def _status(self, service: str) -> int | None:
        if service == "":
            return pb.HealthCheckResponse.SERVING
        if service == READY:
            return _serving(self._ready())
        if not service.startswith(NAME):
            return None
        name = service.removeprefix(NAME)
        if name not in self._directory.specs and self._directory.lookup(name) is None:
            return None
        status = self._directory.status(name)
        return _serving(status is not None and status.state is WorkerState.READY)


def _serving(is_serving: bool) -> int:
    return pb.HealthCheckResponse.SERVING if is_serving else pb.HealthCheckResponse.NOT_SERVING


async def _within(seconds: float, event: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
