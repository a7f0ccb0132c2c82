"""The agent's gRPC server: services, one way to say an error, and the ports.

What a handler raises as :class:`~registry.errors.HerdError` reaches the caller as its row of the error table,
whichever service it is; so servicers raise, and know nothing of gRPC codes.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from registry import wire
from registry.clock import Clock
from registry.config import ListenConfig
from registry.directory import Directory
from registry.errors import HerdError, StoreAmbiguous, StoreError, UnknownOutcome, Unreachable
from registry.find_agent import UNIX
from registry.peers import Peers
from registry.router import Router
from registry.security import SERVER_OPTIONS, add_port
from registry.server import health, messages, names
from registry.v1 import names_pb2_grpc

SOCKET_MODE = 0o660
"""Who may speak to the agent on its socket: its user and group."""

Service = tuple[str, Callable[[grpc.aio.Server], None]]
"""A further service: its full name, and what adds its servicer to a server."""


class Server:
    """Messages, Names, health, reflection and the given further ``services`` on a socket and a port.

    ``node()`` is the agent's node id, ``ready()`` whether its session is trusted and its directory in sync,
    ``read_owner`` reads one owner key linearizably.
    """

    def __init__(
        self,
        *,
        router: Router,
        peers: Peers,
        directory: Directory,
        clock: Clock,
        node: Callable[[], str],
        ready: Callable[[], bool],
        read_owner: names.ReadOwner,
        services: Sequence[Service] = (),
    ) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=(_Errors(),))
        self._server.add_generic_rpc_handlers((messages.Messages(router, peers, clock, node).handler(),))
        own: tuple[Service, ...] = (
            (
                names.SERVICE,
                lambda server: names_pb2_grpc.add_NamesServicer_to_server(
                    names.Names(directory, read_owner), server
                ),
            ),
            (
                health.SERVICE,
                lambda server: health_pb2_grpc.add_HealthServicer_to_server(
                    health.Health(directory, ready), server
                ),
            ),
        )
        known = [messages.SERVICE, reflection.SERVICE_NAME]
        for name, add in (*own, *services):
            add(self._server)
            known.append(name)
        reflection.enable_server_reflection(known, self._server)
        self._socket: Path | None = None

    async def start(self, socket_path: Path | None, listen: ListenConfig | None) -> int:
        """Serve; return the port of ``listen``, 0 without it.

        Raises OSError or Denied, naming the address.
        """
        port = 0
        if socket_path is not None:
            await asyncio.to_thread(_make_way, socket_path)
            add_port(self._server, f"{UNIX}{socket_path}")
        if listen is not None:
            port = add_port(self._server, listen.grpc, listen.tls, insecure=listen.insecure)
        await self._server.start()
        if socket_path is not None:
            self._socket = socket_path
            await asyncio.to_thread(socket_path.chmod, SOCKET_MODE)
        return port

    async def stop(self, grace: float = 1.0) -> None:
        """Take no more requests, give running ones ``grace`` seconds, and end the rest."""
        await self._server.stop(grace)
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)
            self._socket = None


def _make_way(path: Path) -> None:
    """Remove the socket of an agent that is gone.  Raises OSError when somebody listens there."""
    if not path.is_socket():
        if path.exists():
            raise OSError(f"cannot listen at {path}: a file that is no socket is in the way")
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise OSError(f"cannot listen at {path}: {error}") from error
    raise OSError(f"cannot listen at {path}: another agent listens there")


class _Errors(grpc.aio.ServerInterceptor):
    """Turns errors of the tree into gRPC statuses."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the handler, with its errors translated."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        codec = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(_one(handler.unary_unary), *codec)
        if handler.unary_stream is not None and inspect.isasyncgenfunction(handler.unary_stream):
            return grpc.unary_stream_rpc_method_handler(_many(handler.unary_stream), *codec)
        if handler.stream_stream is not None and inspect.iscoroutinefunction(handler.stream_stream):
            return grpc.stream_stream_rpc_method_handler(_one(handler.stream_stream), *codec)
        return handler


def _one(behaviour: Callable[..., Awaitable[Any]]) -> Any:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(request, context)
        except (HerdError, StoreError) as error:
            failed = _herd_error(error)
        return await _abort(context, failed)

    return handle


def _many(behaviour: Callable[..., AsyncIterator[Any]]) -> Any:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(request, context):
                yield response
            return
        except (HerdError, StoreError) as error:
            failed = _herd_error(error)
        await _abort(context, failed)

    return handle


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: HerdError) -> None:
    status = wire.status_of(error)
    await context.abort(wire.grpc_code(error), status.message, wire.trailers(error))


def _herd_error(error: HerdError | StoreError) -> HerdError:
    if isinstance(error, HerdError):
        return error
    if isinstance(error, StoreAmbiguous):
        return UnknownOutcome(f"etcd did not confirm the change: {error}", hint="look before you repeat it")
    return Unreachable(f"etcd: {error}", hint="`pgherd doctor` explains what etcd is doing")
