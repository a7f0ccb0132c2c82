"""A link: many requests over one bidirectional stream of batches, and what becomes of them when it breaks.

Whatever is queued in one turn of the event loop travels in one gRPC message.  A request belongs to the link's
user until the batch with it is handed to gRPC: until then it can be taken back and sent another way.  From
then on nobody knows whether it was executed, so when the link breaks every unanswered one of them is answered
UNKNOWN_OUTCOME, and never sent again.

A link is one stream and is used up when it ends; :mod:`registry.peers` and :mod:`registry.client` open the
next one.  Nothing here knows about names.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Mapping
from typing import NoReturn, Protocol, TypeAlias

import grpc

from registry import wire
from registry.alarm import NEVER, Alarm
from registry.clock import Boottime, Clock
from registry.errors import HerdError, Invalid, Overloaded, UnknownOutcome, Unreachable
from registry.frames import encode
from registry.grpc_words import plain
from registry.v1 import messages_pb2 as pb

Reply: TypeAlias = Callable[[pb.Frame], None]
"""Called exactly once with the reply frame; whoever forwards it overwrites its id."""
Stream: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"

METHOD = "/pgherd.v1.Messages/Link"
CONNECT_TIMEOUT = 2.0
"""Seconds until the other side must have answered that it is there."""
MAX_UNANSWERED = 16_384
"""Requests on one link at once."""
MAX_QUEUED_BYTES = 32 << 20
"""Bytes queued on one link; a stream that does not drain is not worth more memory."""
BATCH_BYTES = wire.MAX_BATCH // 2
"""A batch is closed when it has this many bytes."""
BATCH_FRAMES = 48
"""Frames that always travel in one batch; of more, half do, and the rest while these are worked on."""

ROLE = "pgherd-role"
NODE = "pgherd-node"
PEER = "peer"


class Outbox:
    """Encoded frames in order, taken a batch at a time.  ``taken`` counts those that were handed over."""

    def __init__(self, max_frames: int = MAX_UNANSWERED, max_bytes: int = MAX_QUEUED_BYTES) -> None:
        self.taken = 0
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._bytes = 0
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def waiting_bytes(self) -> int:
        """The size of the frames in it."""
        return self._bytes

    def put(self, part: bytes, *, more: int = 0) -> bool:
        """Queue one encoded frame; False when the outbox is full, and then nothing was queued.

        ``more`` are bytes beyond the bound, for what has to be said because of it.
        """
        if len(self._parts) >= self._max_frames or self._bytes >= self._max_bytes + more:
            return False
        if not self._parts:
            self._filled.set()
        self._parts.append(part)
        self._bytes += len(part)
        return True

    def withdraw(self, place: int) -> bool:
        """Remove the ``place``-th frame ever put (from 1); False when it was handed over already."""
        index = place - self.taken - 1
        if index < 0:
            return False
        self._bytes -= len(self._parts[index])
        self._parts[index] = b""
        return True

    async def filled(self) -> None:
        """Return when there is something to take, or after :meth:`nudge`."""
        await self._filled.wait()

    def nudge(self) -> None:
        """Let whoever waits in :meth:`filled` go on, though there may be nothing."""
        self._filled.set()

    def take(self) -> bytes:
        """Return the next batch; from now on its frames are handed over."""
        parts = self._parts
        count = len(parts)
        if count > BATCH_FRAMES:
            # Were all calls in one batch, the client, the agent and the daemon would work in turns.
            count //= 2
        if self._bytes > BATCH_BYTES:
            size, limit, count = 0, count, 0
            while count < limit and size < BATCH_BYTES:
                size += len(parts[count])
                count += 1
        if count == len(parts):
            self._parts = []
            self._filled.clear()
        else:
            parts, self._parts = parts[:count], parts[count:]
        batch = b"".join(parts)
        self._bytes -= len(batch)
        self.taken += count
        return batch


class State(enum.Enum):
    """The life of a link."""

    CONNECTING = "connecting"
    OPEN = "open"
    CLOSED = "closed"


TRANSITIONS: Mapping[State, frozenset[State]] = {
    # Requests queue; nothing was handed over.
    State.CONNECTING: frozenset({State.OPEN, State.CLOSED}),
    # The other side has answered; batches travel.
    State.OPEN: frozenset({State.CLOSED}),
    # Everything is settled; a request is handed back at once.
    State.CLOSED: frozenset(),
}


class Asker(Protocol):
    """Whoever asks: exactly one of the two methods is called, once."""

    deadline: Boottime

    def __call__(self, frame: pb.Frame, /) -> None:
        """Take the reply; its id is the link's."""

    def taken_back(self, why: HerdError) -> None:
        """The request was never handed over, so nothing was executed."""


class Link:
    """The asking side of one stream.  ``peer`` names the other side in errors.

    With ``node`` it is an agent's that asks for others: its node id, empty while it is not a member.

    Everything happens on one event loop; :meth:`request` is synchronous and needs no task and no timer.
    ``node`` is the other side's node id once it is open, ``heard`` when it last said anything, ``why`` the
    reason it ended.
    """

    def __init__(
        self, peer: str, channel: grpc.aio.Channel, clock: Clock, *, node: str | None = None
    ) -> None:
        self.peer = peer
        self.state = State.CONNECTING
        self.node = ""
        self.heard: Boottime = 0.0
        self.why = ""
        self.opened = asyncio.Event()
        self._channel = channel
        self._metadata = ((ROLE, PEER), (NODE, node)) if node is not None else ()
        self._clock = clock
        self._outbox = Outbox()
        self._sent = 0
        self._pending: dict[int, Asker] = {}
        self._alarm = Alarm(clock, self._expire)

    def __repr__(self) -> str:
        return f"<Link {self.peer} {self.state.value} unanswered={len(self._pending)}>"

    @property
    def unanswered(self) -> int:
        """How many requests wait for a reply."""
        return len(self._pending)

    def request(self, frame: pb.Frame, asker: Asker, now: Boottime) -> None:
        """Send a request of ``asker``, who may hear what became of it before this returns.

        The frame's id and remaining time are overwritten.
        """
        left = wire.remaining_ms(asker.deadline, now)
        if self.state is State.CLOSED or left == 0:
            asker.taken_back(self._unreachable(self.why or "no time was left to send it"))
            return
        place = self._sent + 1
        frame.id = place
        frame.remaining_ms = left
        if len(self._pending) >= MAX_UNANSWERED or not self._outbox.put(encode(frame)):
            asker(wire.error_reply(frame, self._overloaded()))
            return
        self._sent = place
        self._pending[place] = asker
        self._alarm.note(asker.deadline)

    async def run(self) -> None:
        """Connect and carry requests until the stream ends or this is cancelled; then settle what is left."""
        stream: Stream = self._channel.stream_stream(METHOD)(metadata=self._metadata)
        try:
            await self._connect(stream)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(stream))
                await self._read(stream)
        except* _Ended as ended:
            self.why = str(ended.exceptions[0])
        finally:
            stream.cancel()
            self._settle()

    def _enter(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"{self}: {state}"
        self.state = state

    async def _connect(self, stream: Stream) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                metadata = await stream.initial_metadata()
        except TimeoutError:
            raise _Ended(f"no answer within {CONNECT_TIMEOUT:g} s") from None
        if stream.done():
            await _raise_ended(stream)
        self.node = str(dict(metadata or ()).get(NODE, ""))
        self.heard = self._clock.now()
        self._enter(State.OPEN)
        self.opened.set()

    async def _write(self, stream: Stream) -> None:
        outbox = self._outbox
        while True:
            await outbox.filled()
            if stream.done():
                await _raise_ended(stream)
            try:
                await stream.write(outbox.take())
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await _raise_ended(stream)

    async def _read(self, stream: Stream) -> NoReturn:
        pending = self._pending
        while True:
            try:
                raw = await stream.read()
            except grpc.aio.AioRpcError:
                await _raise_ended(stream)
            if not isinstance(raw, bytes):
                await _raise_ended(stream)
            self.heard = self._clock.now()
            try:
                frames = wire.decode(raw)
            except Invalid as error:
                raise _Ended(f"it sent garbage: {error.message}") from error
            for frame in frames:
                asker = pending.pop(frame.id, None)
                if asker is not None:
                    asker(frame)

    def _expire(self, now: Boottime) -> Boottime:
        due = [place for place, asker in self._pending.items() if asker.deadline <= now]
        for place in due:
            asker = self._pending.pop(place)
            if self._outbox.withdraw(place):
                asker.taken_back(self._unreachable("it was not connected in time"))
            else:
                asker(self._unknown("did not answer in time"))
        return min((asker.deadline for asker in self._pending.values()), default=NEVER)

    def _settle(self) -> None:
        """Answer UNKNOWN_OUTCOME for what was handed over, and give back the rest, in order."""
        self._enter(State.CLOSED)
        self.why = self.why or "closed"
        self.opened.set()
        self._alarm.stop()
        pending, self._pending = self._pending, {}
        for place, asker in pending.items():
            if place <= self._outbox.taken:
                asker(self._unknown(f"had it when the link ended ({self.why})"))
            else:
                asker.taken_back(self._unreachable(self.why))

    def _unreachable(self, why: str) -> Unreachable:
        return Unreachable(f"agent {self.peer}: {why}", details={"peer": self.peer})

    def _overloaded(self) -> Overloaded:
        return Overloaded(
            f"{len(self._pending)} requests to agent {self.peer} wait for an answer, or its queue is full",
            hint="wait for some answers before asking again",
            details={"peer": self.peer, "limit": str(MAX_UNANSWERED)},
        )

    def _unknown(self, why: str) -> pb.Frame:
        error = UnknownOutcome(
            f"agent {self.peer} {why}: the request may have been executed", details={"peer": self.peer}
        )
        return pb.Frame(kind=pb.KIND_REPLY, error=wire.error_to_pb(error))


class _Ended(Exception):
    """The stream is over; the text says why."""


async def _raise_ended(stream: Stream) -> NoReturn:
    stream.cancel()
    code, details = await stream.code(), await stream.details()
    raise _Ended(plain(details or "") or code.name)
