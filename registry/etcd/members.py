"""The members of etcd: channels, rotation, deadlines, login, and what follows a failed attempt.

Every request goes to the *current* member, with a deadline of its own: gRPC notices a member that hangs only
after its ping timeout, and never one that lost its quorum.  A member that fails stops being current.  Each
request carries ``hasleader``, so that a member without a leader says so at once, and the token.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import grpc

from registry.clock import Boottime, Clock
from registry.errors import StoreAmbiguous, StoreDenied, StoreUnavailable
from registry.etcd import failures, wire
from registry.etcd.failures import Failure, Kind
from registry.etcd.history import History
from registry.etcd.wire import Message, Stubs
from registry.store import Revision

if TYPE_CHECKING:
    from registry.config import Tls

Metadata: TypeAlias = tuple[tuple[str, str], ...]
Attempt: TypeAlias = Callable[[Stubs, Metadata, float], Awaitable[Message]]
"""One try at one member: its stubs, the metadata to send, the seconds it may take."""

_OPTIONS = (
    # A watch in another part of the process must not share its connection with the lease's keepalive.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    # The end of a lease with 100,000 keys is one response of 4 MiB; gRPC's default limit is just that.
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A backstop below the deadlines; etcd refuses pings more often than every 5 s.  keepalive_timeout_ms has
    # no effect in gRPC core, the ping timeout has.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 1500),
)
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 0.5
_LOGINS = 2


def unary(method: Callable[[Stubs], Callable[..., Awaitable[Message]]], request: Message) -> Attempt:
    """Return the attempt that sends ``request`` to a unary method."""

    def attempt(stubs: Stubs, metadata: Metadata, seconds: float) -> Awaitable[Message]:
        return method(stubs)(request, metadata=metadata, timeout=seconds)

    return attempt


def pause(failed: int, members: int) -> float:
    """Return the seconds to wait after ``failed`` failures in a row: none while another can be asked."""
    rounds, rest = divmod(failed, members)
    return 0.0 if rest else min(_FIRST_PAUSE * 2.0 ** (rounds - 1), _LONGEST_PAUSE)


class Member:
    """One endpoint and its channel."""

    def __init__(self, endpoint: str, tls: Tls | None) -> None:
        self.endpoint = endpoint
        self._tls = tls
        self._identity = _fingerprint(tls)
        self._open()

    def _open(self) -> None:
        scheme, _, target = self.endpoint.partition("://")
        if scheme == "https":
            self.channel = grpc.aio.secure_channel(target, _credentials(self._tls), options=_OPTIONS)
        elif scheme == "http":
            self.channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        else:
            raise ValueError(f"endpoint {self.endpoint!r} does not start with http:// or https://")
        self.stubs = Stubs(self.channel)

    @property
    def connected(self) -> bool:
        return self.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY

    async def reload(self) -> None:
        """Take a renewed certificate into use: it is needed at a reconnect, months after the first."""
        if self.connected or (identity := _fingerprint(self._tls)) == self._identity:
            return
        old = self.channel
        with contextlib.suppress(OSError):  # half renewed: the next failure tries again
            self._open()
            self._identity = identity
            await old.close()


def _fingerprint(tls: Tls | None) -> tuple[int, ...]:
    """Return what changes when the files are replaced; one that is missing for a moment is a change."""
    files = (tls.ca, tls.cert, tls.key) if tls else ()
    return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)


def _credentials(tls: Tls | None) -> grpc.ChannelCredentials:
    if tls is None:
        return grpc.ssl_channel_credentials()
    return grpc.ssl_channel_credentials(tls.ca.read_bytes(), tls.key.read_bytes(), tls.cert.read_bytes())


class Failed(Exception):
    """An attempt, or all of them, failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


class Members:
    """All members, one of them current."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: Tls | None,
        user: str,
        password: str,
        canary: str,
        attempt: float,
        clock: Clock,
    ) -> None:
        if not endpoints:
            raise ValueError("no etcd endpoint")
        self.all = tuple(Member(endpoint, tls) for endpoint in endpoints)
        self.history = History()
        self.clock = clock
        self.attempt = attempt
        self.closed = False
        self._current = 0
        self._user = user
        self._password = password
        self._canary = canary
        self._token: str | None = None if user else ""
        self._logging_in = asyncio.Lock()
        self._tasks: set[asyncio.Task[Message]] = set()

    @property
    def current(self) -> Member:
        return self.all[self._current]

    def failed(self, member: Member) -> None:
        """Let the next member be current if ``member`` still is."""
        if member is self.current:
            self._current = (self._current + 1) % len(self.all)

    def metadata(self, token: str) -> Metadata:
        return (("hasleader", "true"), ("token", token)) if token else (("hasleader", "true"),)

    def own(self, task: asyncio.Task[Message]) -> asyncio.Task[Message]:
        """Keep a task that reads a stream; :meth:`close` ends it."""
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Message]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited for it knows; else nobody wants to

    async def close(self) -> None:
        """Close every connection; running calls fail."""
        self.closed = True
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        for member in self.all:
            await member.channel.close()
        if tasks:
            await asyncio.wait(tasks)

    async def call(self, attempt: Attempt, *, timeout: float, once: bool = False) -> Message:
        """Make attempts until one succeeds.

        With ``once`` (a write) an attempt that may have been executed is the last: StoreAmbiguous.  Raises
        also StoreUnavailable, StoreDenied, LeaseNotFound, StoreCompacted, StoreRestored, StoreError.
        """
        deadline = self.clock.now() + timeout
        for logins in range(_LOGINS + 1):
            token = await self.token(deadline)
            floor = self.history.highest
            try:
                response = await self._rounds(attempt, token, deadline, once)
            except Failed as refused:
                again = refused.failure.kind is Kind.TOKEN and logins < _LOGINS
                if not (again and self.forget(token)):
                    raise failures.error(refused.failure) from refused
                continue
            try:
                await self.admit(response.header, floor, deadline)
            except StoreUnavailable as error:
                if once:
                    raise StoreAmbiguous(f"done, perhaps by an etcd that was restored: {error}") from error
                raise
            return response
        raise AssertionError("unreachable")

    async def admit(self, header: Message, floor: Revision, deadline: Boottime) -> None:
        """Check a response's header, with a linearizable read if need be.

        Raises StoreRestored, and StoreUnavailable if that read got no answer.
        """
        if self.history.admit(header, floor):
            return
        read = unary(lambda stubs: stubs.kv.Range, wire.count(self._canary))
        try:
            response = await self._rounds(read, await self.token(deadline), deadline, once=False)
        except Failed as refused:
            raise StoreUnavailable(f"cannot tell whether etcd was restored: {refused}") from refused
        self.history.confirm(response.header, floor)

    async def token(self, deadline: Boottime) -> str:
        """Return the token to send, after a login if there is none; empty where none is needed.

        Raises StoreDenied, StoreUnavailable.
        """
        if self._token is not None:
            return self._token
        async with self._logging_in:
            if self._token is None:
                self._token = await self._log_in(deadline)
        return self._token

    async def _log_in(self, deadline: Boottime) -> str:
        login = unary(lambda stubs: stubs.auth.Authenticate, wire.login(self._user, self._password))
        try:
            response = await self._rounds(login, "", deadline, once=False)
        except Failed as refused:
            if failures.AUTH_NOT_ENABLED in refused.failure.text:
                return ""
            raise StoreDenied(f"etcd user {self._user!r}: {refused}") from refused
        return str(response.token)

    def forget(self, token: str) -> bool:
        """Log in again before the next request, unless somebody has done so since ``token`` was used.

        Return False if there is nobody to log in as.
        """
        if self._token == token and self._user:
            self._token = None
        return bool(self._user)

    async def _rounds(self, attempt: Attempt, token: str, deadline: Boottime, once: bool) -> Message:
        """Ask member after member until one answers.  Raises Failed, StoreAmbiguous, StoreUnavailable."""
        metadata = self.metadata(token)
        failed, why = 0, "there was no time to ask"
        while (left := deadline - self.clock.now()) > 0:
            self.usable()
            member = self.current
            try:
                if once and not member.connected:
                    await self._reach(member, metadata, min(left, self.attempt))
                    continue
                return await attempt(member.stubs, metadata, min(left, self.attempt))
            except (grpc.aio.AioRpcError, asyncio.CancelledError, Failed) as error:
                failure = judge(error)
            if failure.kind not in (Kind.NOT_DONE, Kind.UNCLEAR):
                raise Failed(failure)
            self.failed(member)
            why = f"{member.endpoint}: {failure.text}"
            if once and failure.kind is Kind.UNCLEAR:
                raise StoreAmbiguous(why)
            await member.reload()
            failed += 1
            if wait := pause(failed, len(self.all)):
                await self.clock.sleep_until(min(self.clock.now() + wait, deadline))
        raise StoreUnavailable(why)

    async def _reach(self, member: Member, metadata: Metadata, seconds: float) -> None:
        """Make sure there is a connection before a write is sent, else its failure would leave all open."""
        try:
            await member.stubs.maintenance.Status(wire.status(), metadata=metadata, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            if not member.connected:
                raise Failed(Failure(Kind.NOT_DONE, judge(error).text)) from error

    def usable(self) -> None:
        """Raise StoreUnavailable after :meth:`close`, StoreRestored after a restore."""
        if self.closed:
            raise StoreUnavailable("the connection was closed")
        self.history.check()


def judge(error: BaseException) -> Failure:
    """Return what the exception of an attempt means; one that is none of gRPC's doing is raised again."""
    match error:
        case grpc.aio.AioRpcError():
            return failures.judge(error.code(), error.details() or "")
        case Failed():
            return error.failure
        case asyncio.CancelledError() if not _cancelling():
            return Failure(Kind.UNCLEAR, "the connection was closed")
        case _:
            raise error


def _cancelling() -> bool:
    """Tell a cancelled task from a call that was cancelled because its channel was closed."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def exchange(call: grpc.aio.StreamStreamCall[Message, Message], request: Message) -> Message:
    """Send one request on a stream and return the next response.  Raises AioRpcError, Failed."""
    with contextlib.suppress(asyncio.InvalidStateError):  # it has ended already: read() says how
        await call.write(request)
    return await following(call)


async def following(call: grpc.aio.StreamStreamCall[Message, Message]) -> Message:
    """Return the next response of a stream.  Raises AioRpcError, Failed."""
    if (response := await call.read()) is grpc.aio.EOF:
        raise Failed(Failure(Kind.UNCLEAR, "the member ended the stream"))
    return response
