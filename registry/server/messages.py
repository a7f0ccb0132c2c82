"""The Messages service: every door of gRPC into the router.

A client can hurt only itself: what cannot be decoded ends its own stream, a frame that is no request is
answered INVALID, from one that does not read its answers nothing more is taken, and one that asks too much at
once is refused.  A stream that says it is another agent's (metadata ``pgherd-role: peer``) is
answered from this host's children only, and keeps the senders it names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from math import isfinite
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError

from registry import wire
from registry.clock import Boottime, Clock
from registry.errors import HerdError, Invalid, Overloaded, UnknownOutcome
from registry.frames import encode
from registry.link import MAX_UNANSWERED, NODE, PEER, ROLE, Outbox
from registry.peers import Peers
from registry.router import Router
from registry.v1 import messages_pb2 as pb

SERVICE = "pgherd.v1.Messages"
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"

HELD_BACK_BYTES = 16 << 20
"""Bytes of answers that a client leaves unread before no more requests are taken from its stream."""
MAX_ANSWER_BYTES = 128 << 20
"""Bytes of answers that may wait for one stream: to what was taken before it was held back."""
LAST_WORDS = 8 << 20
"""Bytes for saying which answers found no room."""

MAX_UNARY = 4096
"""Calls and casts outside of links that may be unanswered at once; more are refused."""

_REQUESTS = (pb.KIND_CALL, pb.KIND_CAST)


class Messages:
    """Call, Cast and Link.  ``node()`` is this agent's node id, told to everyone who opens a link.

    Messages are taken and given as bytes: a batch is encoded frame by frame when frames are queued, and what
    cannot be decoded is this service's to refuse.
    """

    def __init__(self, router: Router, peers: Peers, clock: Clock, node: Callable[[], str]) -> None:
        self._router = router
        self._peers = peers
        self._clock = clock
        self._node = node
        self._unary = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what a server registers."""
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Call": grpc.unary_unary_rpc_method_handler(self.call),
            "Cast": grpc.unary_unary_rpc_method_handler(self.cast),
            "Link": grpc.stream_stream_rpc_method_handler(self.link),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def call(self, raw: bytes, context: Context) -> bytes:
        """Ask a daemon; a rejection by its handler is an answer, everything else an error status."""
        answer = await self._ask(raw, context, pb.KIND_CALL)
        if answer.HasField("error") and answer.error.reason != pb.REASON_DAEMON_ERROR:
            raise wire.error_from_pb(answer.error)
        return wire.frame_to_response(answer).SerializeToString()

    async def cast(self, raw: bytes, context: Context) -> bytes:
        """Tell a daemon; answered when its runtime has accepted the message."""
        answer = await self._ask(raw, context, pb.KIND_CAST)
        if answer.HasField("error"):
            raise wire.error_from_pb(answer.error)
        return pb.CastResponse(epoch=answer.epoch, start=answer.start).SerializeToString()

    async def _ask(self, raw: bytes, context: Context, kind: pb.Kind.ValueType) -> pb.Frame:
        if self._unary >= MAX_UNARY:
            raise Overloaded(
                f"{self._unary} requests outside of links are unanswered, at most {MAX_UNARY} are allowed",
                hint="a link carries many requests on one stream",
                details={"limit": str(MAX_UNARY)},
            )
        self._unary += 1
        try:
            return await self._ask_router(raw, context, kind)
        finally:
            self._unary -= 1

    async def _ask_router(self, raw: bytes, context: Context, kind: pb.Kind.ValueType) -> pb.Frame:
        try:
            frame = wire.call_to_frame(pb.CallRequest.FromString(raw), kind)
        except DecodeError as error:
            raise Invalid(f"{len(raw)} bytes are not a pgherd.v1.CallRequest: {error}") from error
        wire.check_request(frame)
        frame.sender = sender(context)
        left = context.time_remaining()
        if left is None or not isfinite(left):
            left = wire.DEFAULT_TIMEOUT
        # Said a little early: what is said after the caller's deadline is not heard.
        left = wire.remaining_ms(left, 0.0) / 1000
        answer: asyncio.Future[pb.Frame] = asyncio.get_running_loop().create_future()
        self._router.route(frame, self._clock.now() + left, lambda reply: _resolve(answer, reply))
        try:
            async with asyncio.timeout(left + 0.1):
                return await answer
        except TimeoutError:
            raise UnknownOutcome(f"{frame.to} did not answer in time", details={"name": frame.to}) from None

    async def link(self, _requests: object, context: Context) -> None:
        """Carry one stream until the other side ends it; what it still asks then is answered first."""
        told = dict(context.invocation_metadata() or ())
        from_peer = told.get(ROLE) == PEER
        peer = str(told.get(NODE, "")) if from_peer else ""
        await context.send_initial_metadata(((NODE, self._node()),))
        stream = _Stream(self._router, self._clock, sender(context), from_peer=from_peer)
        heard = partial(self._peers.hear, peer) if peer else None
        failure: HerdError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                guard = group.create_task(stream.broken())
                group.create_task(stream.write(context))
                await stream.read(context, heard)
                await stream.drained()
                guard.cancel()
        except* HerdError as errors:
            failure = next(error for error in errors.exceptions if isinstance(error, HerdError))
        finally:
            stream.end()
        if failure is not None:
            raise _of_the_whole_link(failure) if stream.took_requests else failure


class _Stream:
    """The answering side of one link.  ``took_requests``: some of what came on it may have been passed on."""

    def __init__(self, router: Router, clock: Clock, sender: str, *, from_peer: bool) -> None:
        self.took_requests = False
        self._router = router
        self._clock = clock
        self._sender = sender
        self._from_peer = from_peer
        self._outbox = Outbox(max_bytes=MAX_ANSWER_BYTES)
        self._written = asyncio.Event()
        self._unanswered = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last = False
        self._ended = False

    async def read(self, context: Context, heard: Callable[[], None] | None) -> None:
        """Take requests until the other side has no more.  Raises Invalid for what cannot be decoded."""
        while True:
            raw = await context.read()
            if not isinstance(raw, bytes):
                return
            if heard is not None:
                heard()
            self._take(raw, self._clock.now())
            while self._outbox.waiting_bytes > HELD_BACK_BYTES:
                self._written.clear()
                await self._written.wait()

    def _take(self, raw: bytes, now: Boottime) -> None:
        is_small = len(raw) <= wire.MAX_HEAD
        frames = wire.decode(raw)
        self.took_requests = True
        for frame in frames:
            if not (is_small and frame.kind in _REQUESTS) and not self._is_request(frame):
                continue
            if self._unanswered >= MAX_UNANSWERED:
                self._put(wire.error_reply(frame, _too_many(self._unanswered)))
                continue
            if not self._from_peer:
                frame.sender = self._sender
            self._unanswered += 1
            reply = partial(self._answer, frame.id)
            self._router.route(frame, wire.deadline_of(frame, now), reply, from_peer=self._from_peer)

    def _is_request(self, frame: pb.Frame) -> bool:
        if frame.kind == pb.KIND_CANCEL:
            # The one who gave up ignores the answer, which costs less than looking for the request.
            return False
        try:
            wire.check_request(frame)
        except Invalid as error:
            self._put(wire.error_reply(frame, error))
            return False
        return True

    def _answer(self, place: int, frame: pb.Frame) -> None:
        self._unanswered -= 1
        frame.id = place
        self._put(frame)
        if not self._unanswered:
            self._idle.set()

    def _put(self, frame: pb.Frame) -> None:
        if self._ended or self._outbox.put(encode(frame)) or self._broken.done():
            return
        full = _unread(len(self._outbox), self._outbox.waiting_bytes)
        lost = UnknownOutcome(f"an answer was lost: {full.message}", hint=full.hint, details=full.details)
        if not self._outbox.put(encode(wire.error_reply(frame, lost)), more=LAST_WORDS):
            self._broken.set_exception(full)

    async def broken(self) -> None:
        """Raise Overloaded once answers are not being read."""
        await asyncio.shield(self._broken)

    async def write(self, context: Context) -> None:
        """Write what is queued, a batch at a time."""
        outbox = self._outbox
        while outbox or not self._last:
            await outbox.filled()
            if outbox:
                await context.write(outbox.take())
                self._written.set()

    async def drained(self) -> None:
        """Return when everything asked is answered; the writer ends after the last batch."""
        while self._unanswered:
            self._idle.clear()
            await self._idle.wait()
        self._last = True
        self._outbox.nudge()

    def end(self) -> None:
        """Drop answers from now on."""
        self._ended = True
        self._broken.cancel()


def sender(context: Context) -> str:
    """Return who is at the other end, as far as the transport has authenticated it."""
    names = context.auth_context().get("x509_common_name")
    if names:
        return "cert:" + next(iter(names)).decode(errors="replace")
    where = context.peer()
    return "unix:" if where.startswith("unix:") else where


def _resolve(answer: asyncio.Future[pb.Frame], reply: pb.Frame) -> None:
    if not answer.done():
        answer.set_result(reply)


def _of_the_whole_link(failure: HerdError) -> UnknownOutcome:
    """Return what the end of a stream says about every request on it that has no answer.

    What ended it concerns one message; others were passed on, and perhaps executed, so it must not read as
    refused.
    """
    return UnknownOutcome(
        f"{failure.message}: requests of this link without an answer may have been executed",
        hint=failure.hint,
        details={**failure.details, "cause": failure.reason},
    )


def _unread(count: int, size: int) -> Overloaded:
    return Overloaded(
        f"answers are not being read: {count} of {size} bytes wait, at most {MAX_UNANSWERED} and "
        f"{MAX_ANSWER_BYTES} bytes may",
        hint="read the stream faster, or ask less at once",
        details={"limit": str(MAX_ANSWER_BYTES)},
    )


def _too_many(unanswered: int) -> Overloaded:
    return Overloaded(
        f"{unanswered} requests of this link are unanswered, at most {MAX_UNANSWERED} are allowed",
        details={"limit": str(MAX_UNANSWERED)},
    )
