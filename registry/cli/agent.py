"""The agent that a command asks: found, reached, asked, its errors understood.

Connecting comes first and by hand, so that "no agent" (nothing was sent) is told from "no answer" (it may
have been executed), and so that the reason is the kernel's and not gRPC's.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import Message

from registry import security
from registry.cli.invocation import Invocation
from registry.errors import HerdError, UnknownOutcome, Unreachable
from registry.find_agent import UNIX, find_agent, find_config
from registry.units import format_duration
from registry.v1.cluster_pb2_grpc import ClusterStub
from registry.v1.messages_pb2_grpc import MessagesStub
from registry.v1.names_pb2_grpc import NamesStub
from registry.v1.supervision_pb2_grpc import SupervisionStub
from registry.wire import DEFAULT_TIMEOUT, error_of_rpc

if TYPE_CHECKING:
    from registry.config import ListenConfig

_CONNECT_SECONDS = 3.0

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)


class NoAnswer(Unreachable):
    """A question that only reads was not answered in time."""


class Agent:
    """A connection to one agent, with the stubs of its services; made by :func:`connect`."""

    def __init__(self, runner: asyncio.Runner, channel: grpc.aio.Channel, seconds: float) -> None:
        self._runner = runner
        self._seconds = seconds
        self.names = NamesStub(channel)
        self.messages = MessagesStub(channel)
        self.supervision = SupervisionStub(channel)
        self.cluster = ClusterStub(channel)

    def ask(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        *,
        changes: bool = False,
        seconds: float | None = None,
    ) -> _Response:
        """Return the answer within ``seconds`` (default: those of the connection).

        Raises HerdError; ``changes`` says that the request does more than read, so that a lost answer leaves
        its outcome unknown.
        """
        limit = self._seconds if seconds is None else seconds

        async def answer() -> _Response:
            try:
                return await method(request, timeout=limit)
            except grpc.aio.AioRpcError as error:
                raise _meaning(error, changes=changes, seconds=limit) from error

        return self._runner.run(answer())

    def follow(
        self, method: grpc.aio.UnaryStreamMultiCallable[_Request, _Response], request: _Request
    ) -> Iterator[_Response]:
        """Yield answers until the agent ends them; without a time limit.  Raises HerdError."""
        answers = aiter(method(request))

        async def following() -> _Response | None:
            try:
                return await anext(answers, None)
            except grpc.aio.AioRpcError as error:
                raise _meaning(error, changes=False, seconds=0.0) from error

        while (answer := self._runner.run(following())) is not None:
            yield answer


def asking_user() -> str:
    """Return who runs this command, for `why`: what people call the account, or its number."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def _meaning(error: grpc.aio.AioRpcError, *, changes: bool, seconds: float) -> HerdError:
    meant = error_of_rpc(error, read_only=not changes)
    if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
        return meant
    limit = format_duration(seconds)
    if changes:
        return UnknownOutcome(
            f"no answer within {limit}", hint="--timeout waits longer; look before you repeat it"
        )
    return NoAnswer(f"the agent did not answer within {limit}", hint="pgherd doctor")


@contextmanager
def connect(invocation: Invocation) -> Iterator[Agent]:
    """Connect to the agent the options, the environment or this directory name.

    Raises Unreachable when none listens there, Denied when the connection would not be safe.
    """
    address = find_agent(invocation.agent)
    identity = _identity(address)
    _knock(address)
    with asyncio.Runner() as runner:
        channel = runner.run(_open(address, identity))
        try:
            yield Agent(runner, channel, invocation.seconds(DEFAULT_TIMEOUT))
        finally:
            runner.run(channel.close())


async def _open(address: str, identity: ListenConfig | None) -> grpc.aio.Channel:
    if identity is None:
        return security.channel(address)
    return security.channel(address, identity.tls, insecure=identity.insecure)


def _identity(address: str) -> ListenConfig | None:
    """Return how this host speaks to others: with a certificate, which we show if we may read it."""
    path = find_config()
    if security.is_private(address) or not path.exists():
        return None
    from registry.config import load

    return load(path).listen


def _knock(address: str) -> None:
    """Find out whether anybody listens at ``address``."""
    try:
        if address.startswith(UNIX):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(_CONNECT_SECONDS)
                probe.connect(address.removeprefix(UNIX))
        else:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), port), _CONNECT_SECONDS).close()
    except OSError as error:
        raise Unreachable(
            f"no agent at {address.removeprefix(UNIX)}: {(error.strerror or str(error)).lower()}",
            hint="pgherd doctor looks for the reason; --agent or PGHERD_AGENT names another agent",
            details={"address": address},
        ) from error
