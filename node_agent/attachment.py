"""The agent's end of the worker socket: one :class:`Attachment` for each worker that is attached.

A worker opens the connection and says who it is; ``accept`` (the agent's table of children) says whether it
is wanted.  From then on requests are handed over with :meth:`Attachment.send`, and each is answered exactly
once: by the worker, by its deadline, or by the end of the connection.  A request that was written to the
connection and not answered is *unknown*, one that was still here is *refused*; a cast is answered when the
worker's runtime says that it is in the mailbox.

What is queued in one turn of the loop travels in one write.  There is no task and no timer for a request: one
timer for each connection looks for passed deadlines.  What a worker sends can end its own connection only.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

from node_agent.unanswered import Reply, Request, Unanswered
from node_agent.worker import framing
from registry.clock import SYSTEM_CLOCK, Boottime, Clock
from registry.errors import Invalid, NoOwner, Overloaded, UnknownOutcome
from registry.events import Event, LinkDropped
from registry.frames import encode
from registry.v1 import messages_pb2, names_pb2, worker_pb2

CREDIT = 1024
"""Requests that may be unanswered at once on one connection."""

SYSTEM_CREDIT = 64
"""System messages that get through when there is no credit left for requests."""

BUFFERED_BYTES = 16 * 1024 * 1024
"""Bytes that may wait for a worker that does not read."""

ATTACH_WITHIN = 5.0
"""Seconds a new connection has to say who it is."""

ACKNOWLEDGE_AFTER = 0.1
"""Seconds until replies are acknowledged when no request goes out that could carry it."""

LONGEST_MS = 2**32 - 1
"""The longest time that fits into a frame, in milliseconds."""

KEPT_SHARE, KEPT = 0.1, 0.1
"""Part of a request's time, and seconds at most, that the worker is not told of: when the rest is over it can
still say that it has not begun, before nobody knows."""

SWEEP_EVERY = 0.005
"""Seconds between two looks for passed deadlines, at least."""


class AttachHandler(Protocol):
    """What the agent wants to hear about one worker's connection; called from the loop."""

    def on_attached(self, attachment: Attachment) -> None:
        """It is attached.  What is sent from here reaches the worker before anything sent later."""

    def on_ready(self) -> None:
        """It serves; called once for each connection, at once if it was ready before."""

    def on_crashed(self, why: str, traceback: str) -> None:
        """It is about to exit, and why."""

    def on_late_reply(self, reply: messages_pb2.Frame) -> None:
        """It answered a request of a former agent, or one whose time was up."""

    def on_closed(self, why: str) -> None:
        """The connection is over; every request on it has been answered."""


Accept = Callable[[str, Sequence[names_pb2.Method], bool], "str | AttachHandler"]
"""``accept(worker, methods, ready)``: why the worker is not wanted, or who wants to hear about it."""


class Attachment(asyncio.Protocol):
    """One worker's connection.  Not made by hand: :class:`WorkerSocket` makes one for each connection.

    ``epoch`` and ``start`` (the handler sets them in ``on_attached``) say which process this is; they go into
    the answers that are given here in its place.
    """

    def __init__(self, accept: Accept, emit: Callable[[Event], None], clock: Clock) -> None:
        self.worker = ""
        self.methods: tuple[names_pb2.Method, ...] = ()
        self.ready = False
        self.epoch = 0
        self.start = 0
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._accept = accept
        self._emit = emit
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._handler: AttachHandler | None = None
        self._unpacker = framing.Unpacker()
        self._why_closed = ""
        self._attach_timer: asyncio.TimerHandle | None = None
        # A reply to a request of a former connection must not look like one to a request of this.
        self._requests = Unanswered(first_id=secrets.randbits(31) << 32)
        self._outgoing: list[bytes] = []
        self._outgoing_bytes = 0
        self._flushing = False
        self._received = 0
        self._acknowledged = 0
        self._acknowledge_timer: asyncio.TimerHandle | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._sweep_at: Boottime = 0.0

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self.ended.done()

    def send(self, frame: messages_pb2.Frame, deadline: Boottime, reply: Reply) -> None:
        """Hand ``frame`` (a CALL, CAST or SYSTEM) over; its id and remaining_ms are overwritten.

        ``reply`` is called exactly once, unless this raises: :class:`Overloaded` when the worker has too much
        unanswered, :class:`NoOwner` when it is not connected, :class:`Invalid` for a frame that is too large.
        Nothing was handed over then.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            raise NoOwner(f"the process that serves {frame.to} is not connected", details={"name": frame.to})
        requests, kind, to = self._requests, frame.kind, frame.to
        credit = CREDIT + SYSTEM_CREDIT if kind == messages_pb2.KIND_SYSTEM else CREDIT
        if len(requests) >= credit:
            raise self._overloaded(to)
        frame.id = requests.next_id
        seconds = deadline - self._clock.now()
        seconds -= KEPT if seconds * KEPT_SHARE > KEPT else seconds * KEPT_SHARE
        left = int(seconds * 1000)
        frame.remaining_ms = LONGEST_MS if left > LONGEST_MS else left if left > 1 else 1
        part = encode(frame)
        size = len(part)
        if size > framing.MAX_BODY + 65536:
            raise Invalid(f"a message of {size} bytes for {to}: {framing.MAX_BODY} are allowed")
        if self._outgoing_bytes + transport.get_write_buffer_size() + size > BUFFERED_BYTES:
            raise self._overloaded(to)
        requests.add(Request(to, deadline, reply, kind == messages_pb2.KIND_CAST))
        self._queue(part)
        if not self._sweep_at or deadline < self._sweep_at:
            self._sweep_no_later_than(deadline)

    def _overloaded(self, to: str) -> Overloaded:
        waiting = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return Overloaded(
            f"{to} has {len(self._requests)} unanswered requests ({CREDIT} are allowed), "
            f"{waiting} bytes wait for it ({BUFFERED_BYTES} are allowed)",
            hint="try again after a moment",
            details={"name": to, "limit": str(CREDIT)},
        )

    def stop(self, wait_ms: int) -> None:
        """Ask the worker to stop in order; after ``wait_ms`` something harder will be tried."""
        self._say(worker_pb2.AgentMessage(stop=worker_pb2.Stop(wait_ms=wait_ms)))

    def set_deadline(self, boottime: Boottime) -> None:
        """Tell the worker until when it may act."""
        self._say(worker_pb2.AgentMessage(deadline=worker_pb2.Deadline(boottime=boottime)))

    def close(self, why: str) -> None:
        """End the connection; the worker will attach again if it lives."""
        self._why_closed = self._why_closed or why
        if self._transport is not None:
            self._transport.abort()

    # The way out.

    def _queue(self, part: bytes) -> None:
        self._outgoing.append(part)
        self._outgoing_bytes += len(part)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._transport is None or self._transport.is_closing():
            return
        parts, self._outgoing, self._outgoing_bytes = self._outgoing, [], 0
        self._requests.written()
        self._acknowledged = self._received
        for batch in framing.batches(parts):
            self._transport.write(framing.pack_batch(batch, self._acknowledged))

    def _say(self, message: worker_pb2.AgentMessage) -> None:
        if self._transport is not None and not self._transport.is_closing():
            if self._outgoing:
                self._flush()
            self._transport.write(framing.pack(message))

    def _acknowledge(self) -> None:
        self._acknowledge_timer = None
        if self._acknowledged != self._received:
            self._flush()

    # The way in.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._why_closed:
            # Closed between accept and here.
            self._transport.abort()
            return
        self._attach_timer = self._loop.call_later(
            ATTACH_WITHIN, self._drop, f"it did not say who it is within {ATTACH_WITHIN:g} s"
        )

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._unpacker.feed(data):
                self._hear(framing.worker_message(message))
        except framing.Garbage as garbage:
            self._drop(str(garbage))

    def _drop(self, why: str) -> None:
        self._emit(LinkDropped(peer=f"worker {self.worker or '(not attached)'}", why=why))
        self.close(why)

    def _hear(self, message: worker_pb2.WorkerMessage) -> None:
        if self._why_closed:
            return
        what = message.WhichOneof("is")
        if (what == "attach") != (self._handler is None):
            raise framing.Garbage("it did not say Attach first, or said it twice")
        if what == "attach":
            self._attach(message.attach)
            return
        assert self._handler is not None
        if what == "batch":
            self._take(message.batch, self._handler)
        elif what == "ready":
            self._become_ready(self._handler)
        elif what == "crashed":
            self._handler.on_crashed(message.crashed.why, message.crashed.traceback)
        else:
            raise framing.Garbage("a message of a kind that this version does not know")

    def _attach(self, attach: worker_pb2.Attach) -> None:
        assert self._transport is not None
        if self._attach_timer is not None:
            self._attach_timer.cancel()
        self.worker = attach.worker
        if attach.protocol < framing.PROTOCOL:
            verdict: str | AttachHandler = f"its protocol is {attach.protocol}, not {framing.PROTOCOL}"
        else:
            verdict = self._accept(attach.worker, tuple(attach.methods), attach.ready)
        if isinstance(verdict, str):
            refused = worker_pb2.Attached(protocol=framing.PROTOCOL, refused=verdict)
            self._say(worker_pb2.AgentMessage(attached=refused))
            self._why_closed = f"not wanted: {verdict}"
            self._transport.close()
            return
        self.methods = tuple(attach.methods)
        self._handler = verdict
        attached = worker_pb2.Attached(protocol=framing.PROTOCOL, credit=CREDIT)
        self._say(worker_pb2.AgentMessage(attached=attached))
        verdict.on_attached(self)
        for reply in attach.unacknowledged:
            verdict.on_late_reply(reply)
        if attach.ready:
            self._become_ready(verdict)

    def _become_ready(self, handler: AttachHandler) -> None:
        if not self.ready:
            self.ready = True
            handler.on_ready()

    def _take(self, batch: messages_pb2.Batch, handler: AttachHandler) -> None:
        for frame in batch.frames:
            answered = self._requests.pop(frame.id)
            if answered is None:
                handler.on_late_reply(frame)
            else:
                answered.reply(frame)
        for request_id, request in self._requests.accepted(batch.accepted):
            request.reply(
                messages_pb2.Frame(
                    id=request_id, kind=messages_pb2.KIND_REPLY, epoch=self.epoch, start=self.start
                )
            )
        if batch.frames:
            self._received += len(batch.frames)
            if self._acknowledge_timer is None:
                self._acknowledge_timer = self._loop.call_later(ACKNOWLEDGE_AFTER, self._acknowledge)

    # Deadlines and ends.

    def _sweep_no_later_than(self, deadline: Boottime) -> None:
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self._sweep_at = deadline
        delay = max(SWEEP_EVERY, deadline - self._clock.now())
        self._sweep_timer = self._loop.call_later(delay, self._sweep)

    def _sweep(self) -> None:
        self._sweep_timer, self._sweep_at = None, 0.0
        for request_id, request in self._requests.expired(self._clock.now()):
            self._requests.add_other()
            self._queue(encode(messages_pb2.Frame(id=request_id, kind=messages_pb2.KIND_CANCEL)))
            late = UnknownOutcome(f"{request.to} did not answer in time", details={"name": request.to})
            request.reply(framing.failed(request_id, late, epoch=self.epoch, start=self.start))
        deadline = self._requests.next_deadline()
        if deadline is not None:
            self._sweep_no_later_than(deadline)

    def connection_lost(self, exc: Exception | None) -> None:
        why = self._why_closed or (
            f"the connection broke: {exc}" if exc else "the worker closed the connection"
        )
        for timer in (self._attach_timer, self._acknowledge_timer, self._sweep_timer):
            if timer is not None:
                timer.cancel()
        self._transport = None
        self._outgoing = []
        self.ended.set_result(None)
        for request_id, request in self._requests.drain():
            error = _unanswered(request.to, why, is_written=self._requests.is_written(request))
            request.reply(framing.failed(request_id, error, epoch=self.epoch, start=self.start))
        if self._handler is not None:
            self._handler.on_closed(why)


def _unanswered(to: str, why: str, *, is_written: bool) -> UnknownOutcome | NoOwner:
    details = {"name": to}
    if is_written:
        return UnknownOutcome(f"the process that serves {to} is gone: {why}", details=details)
    return NoOwner(f"the process that serves {to} was gone before it got this: {why}", details=details)


class WorkerSocket:
    """Listens at ``path`` and makes an :class:`Attachment` of every connection."""

    def __init__(
        self, path: Path, accept: Accept, emit: Callable[[Event], None], clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._path = path
        self._accept = accept
        self._emit = emit
        self._clock = clock
        self._server: asyncio.AbstractServer | None = None
        self._attachments: set[Attachment] = set()

    async def start(self) -> None:
        """Listen.  The socket of a former agent is replaced: its workers are waiting for this one."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(self._path.stat().st_mode):
                self._path.unlink()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._connected, str(self._path))
        # Workers may run as other users; who reaches the directory may knock, a worker's id is a secret.
        self._path.chmod(0o666)

    def _connected(self) -> Attachment:
        attachment = Attachment(self._accept, self._emit, self._clock)
        self._attachments.add(attachment)
        attachment.ended.add_done_callback(lambda _: self._attachments.discard(attachment))
        return attachment

    async def close(self) -> None:
        """Stop listening and end every connection; the workers go on and wait for the next agent."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        for attachment in tuple(self._attachments):
            attachment.close("the agent closes its worker socket")
            await attachment.ended
        await server.wait_closed()
