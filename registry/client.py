"""Talk to daemons from Python: calls and casts by name, with the errors of :mod:`registry.errors`.

    async with Client() as herd:
        print(await herd.call("sweeper", "status"))

A façade: :mod:`registry.routes` finds the way, :mod:`registry.link` carries, :mod:`registry.wire` translates.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc

from registry import wire
from registry.clock import SYSTEM_CLOCK, Clock
from registry.config import Tls
from registry.errors import Invalid
from registry.find_agent import find_agent
from registry.routes import Routes
from registry.security import channel
from registry.v1 import cluster_pb2, cluster_pb2_grpc, names_pb2, names_pb2_grpc
from registry.v1 import messages_pb2 as pb

Response = TypeVar("Response")
_STATES = {number: name.removeprefix("NAME_STATE_").lower() for name, number in names_pb2.NameState.items()}
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class Options(TypedDict, total=False):
    """What a request may carry besides its payload.

    ``timeout`` in seconds, 5 when None; ``expect_epoch``: only this ownership may serve it;
    ``idempotency_key``: executed at most once by one process under this key; ``traceparent``: W3C.
    """

    timeout: float | None
    expect_epoch: int
    idempotency_key: str
    traceparent: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a daemon answered, and which process: ``epoch`` and the ``start`` counted within it."""

    value: Any
    epoch: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """A name and its owner.

    ``state`` is unowned, starting, ready, stopping or stopped, ``since`` when it came to be that (Unix
    seconds by the owner's clock); epoch 0 and empty texts when nobody owns it.
    """

    name: str
    state: str
    epoch: int
    start: int
    host: str
    node: str
    address: str
    pid: int
    since: float
    methods: tuple[str, ...]


class Client:
    """A connection to the herd.  Use it as a context manager, or call :meth:`open` and :meth:`close`.

    ``address`` is ``host:port`` or the path of a socket; without one :func:`registry.find_agent.find_agent`
    decides.  It belongs to the event loop it was made in.  Methods raise :class:`registry.errors.HerdError`.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        tls: Tls | None = None,
        insecure: bool = False,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.address = find_agent(address)
        self._clock = clock
        self._routes = Routes(self.address, lambda address: channel(address, tls, insecure=insecure), clock)

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect to the agent.  Raises Unreachable."""
        await self._routes.open()

    async def close(self) -> None:
        """End every link: what was handed over ends as UnknownOutcome, the rest as Unreachable."""
        await self._routes.close()

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel to the agent, for stubs of further services; see :meth:`rpc`."""
        return self._routes.channel

    # Messages.

    async def call(self, name: str, method: str, payload: Any = None, **options: Unpack[Options]) -> Any:
        """Ask a daemon and return what its method returned: a JSON value, or bytes.

        ``payload`` is a JSON value (the members of an object are the method's arguments by name) or bytes.
        Raises Refused (not executed), UnknownOutcome (perhaps executed), DaemonError (the handler rejected).
        """
        return _value(_checked(await self._send(pb.KIND_CALL, name, method, payload, options)))

    async def ask(self, name: str, method: str, payload: Any = None, **options: Unpack[Options]) -> Answer:
        """Like :meth:`call`, and tell which process answered."""
        frame = _checked(await self._send(pb.KIND_CALL, name, method, payload, options))
        return Answer(_value(frame), frame.epoch, frame.start)

    async def cast(self, name: str, method: str, payload: Any = None, **options: Unpack[Options]) -> Answer:
        """Tell a daemon; returns when its runtime has accepted the message.  The value is None."""
        frame = _checked(await self._send(pb.KIND_CAST, name, method, payload, options))
        return Answer(None, frame.epoch, frame.start)

    def _send(
        self, kind: pb.Kind.ValueType, name: str, method: str, payload: Any, options: Options
    ) -> asyncio.Future[pb.Frame]:
        timeout = None
        frame = pb.Frame(kind=kind, to=name, method=method)
        if type(payload) is bytes:
            wire.check_body(payload)
            frame.data = payload
        else:
            frame.json = _json(payload)
        if options:
            timeout = options.get("timeout")
            frame.epoch = options.get("expect_epoch", 0)
            frame.idempotency_key = options.get("idempotency_key", "")
            frame.traceparent = options.get("traceparent", "")
        now = self._clock.now()
        return self._routes.send(frame, now, now + (wire.DEFAULT_TIMEOUT if timeout is None else timeout))

    # Names.

    async def whereis(self, name: str, *, linearizable: bool = False) -> Whereabouts:
        """Find the owner of a name, with ``linearizable`` as etcd has it.  Raises NoSuchName, Unreachable."""
        resolve = names_pb2_grpc.NamesStub(self.channel).Resolve
        answer = await self.rpc(resolve, names_pb2.ResolveRequest(name=name, linearizable=linearizable))
        return _whereabouts(answer.name)

    async def names(self, prefix: str = "") -> tuple[Whereabouts, ...]:
        """List the names that start with ``prefix``, in order."""
        list_names = names_pb2_grpc.NamesStub(self.channel).List
        answer = await self.rpc(list_names, names_pb2.ListNamesRequest(prefix=prefix))
        return tuple(_whereabouts(name) for name in answer.names)

    async def methods(self, name: str) -> tuple[names_pb2.Method, ...]:
        """List what a daemon offers.  Raises NoSuchName, NoOwner, Unreachable."""
        methods = names_pb2_grpc.NamesStub(self.channel).Methods
        return tuple((await self.rpc(methods, names_pb2.MethodsRequest(name=name))).methods)

    async def wait(
        self, name: str, state: str = "ready", *, above_epoch: int = 0, timeout: float = 60.0
    ) -> tuple[int, str]:
        """Return (epoch, host) once a name is ``ready``, ``stopped`` or ``moved``."""
        request = cluster_pb2.WaitRequest(name=name, above_epoch=above_epoch, **{"for": state})
        answer = await self.rpc(cluster_pb2_grpc.ClusterStub(self.channel).Wait, request, timeout=timeout)
        return answer.epoch, answer.host

    async def rpc(
        self,
        method: Callable[..., Awaitable[Response]],
        request: object,
        *,
        timeout: float = 5.0,
        read_only: bool = True,
    ) -> Response:
        """Call a method of a stub on :attr:`channel`, with its errors translated.

        With ``read_only`` a connection that broke is Unreachable, because repeating it does no harm;
        otherwise UnknownOutcome.
        """
        try:
            return await method(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise wire.error_of_rpc(error, read_only=read_only) from error


def _json(payload: Any) -> str:
    if payload is None:
        return "{}"
    try:
        text = _to_json(payload)
    except (TypeError, ValueError) as error:
        raise Invalid(f"the payload is no JSON value: {error}") from error
    wire.check_body(text)
    return text


def _checked(answer: pb.Frame) -> pb.Frame:
    if answer.HasField("error"):
        raise wire.error_from_pb(answer.error)
    return answer


def _value(frame: pb.Frame) -> Any:
    if frame.HasField("data"):
        return frame.data
    return json.loads(frame.json or "{}")


def _whereabouts(name: names_pb2.Name) -> Whereabouts:
    return Whereabouts(
        name=name.name,
        state=_STATES[name.state],
        epoch=name.epoch,
        start=name.start,
        host=name.host,
        node=name.node,
        address=name.address,
        pid=name.pid,
        since=name.since,
        methods=tuple(name.methods),
    )
