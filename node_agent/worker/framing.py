"""Messages on the worker socket: how they are cut, how large they may be, and the errors in replies.

Both ends use this module: the agent (:mod:`node_agent.attachment`) and the worker
(:mod:`node_agent.worker.uplink`).  It knows bytes and frames, no sockets.  It stands apart from
``registry.wire`` because a worker is forked with this in memory and must not pull in gRPC.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from google.protobuf.message import DecodeError, Message

from registry.errors import HerdError
from registry.frames import head
from registry.v1 import messages_pb2, worker_pb2

MAX_MESSAGE = 16 * 1024 * 1024
"""Bytes in one message on the socket; a longer one ends the connection."""

MAX_BODY = 4 * 1024 * 1024
"""Bytes in the body of one frame."""

BATCH_BYTES = 8 * 1024 * 1024
"""A batch is cut when it gets larger than this: with one more frame it still fits into a message."""

PROTOCOL = 1
"""Version of the protocol on the socket."""

DEFAULT_MS = 5000
"""``remaining_ms`` of a frame that has none."""

_LENGTH = struct.Struct("<I")
_BATCH = worker_pb2.AgentMessage.BATCH_FIELD_NUMBER
assert worker_pb2.WorkerMessage.BATCH_FIELD_NUMBER == _BATCH


class Garbage(Exception):
    """The other side does not speak the protocol, or a message is too long: the connection is of no use."""


def pack(message: Message) -> bytes:
    """Return ``message`` with its length before it."""
    data = message.SerializeToString()
    return _LENGTH.pack(len(data)) + data


def pack_batch(parts: Sequence[bytes], accepted: int) -> bytes:
    """Return either side's message with a batch of frames, encoded by :func:`registry.frames.encode`."""
    batch = b"".join((*parts, messages_pb2.Batch(accepted=accepted).SerializeToString()))
    start = head(_BATCH, len(batch))
    return b"".join((_LENGTH.pack(len(start) + len(batch)), start, batch))


class Unpacker:
    """Cuts a stream of bytes into messages."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the messages that ``data`` completes.  Raises :class:`Garbage` for one that is too long."""
        buffer = self._buffer
        buffer += data
        messages: list[bytes] = []
        at, end = 0, len(buffer)
        while end - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            if length > MAX_MESSAGE:
                raise Garbage(f"a message of {length} bytes was announced, {MAX_MESSAGE} are allowed")
            start = at + _LENGTH.size
            if end - start < length:
                break
            at = start + length
            messages.append(bytes(memoryview(buffer)[start:at]))
        if at:
            del buffer[:at]
        return messages


def worker_message(data: bytes) -> worker_pb2.WorkerMessage:
    """Decode what a worker said.  Raises :class:`Garbage`."""
    try:
        return worker_pb2.WorkerMessage.FromString(data)
    except DecodeError as error:
        raise Garbage(f"{len(data)} bytes that are no WorkerMessage: {error}") from error


def agent_message(data: bytes) -> worker_pb2.AgentMessage:
    """Decode what an agent said.  Raises :class:`Garbage`."""
    try:
        return worker_pb2.AgentMessage.FromString(data)
    except DecodeError as error:
        raise Garbage(f"{len(data)} bytes that are no AgentMessage: {error}") from error


def batches(parts: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Cut encoded frames into batches that fit into a message, in order."""
    if sum(map(len, parts)) <= BATCH_BYTES:
        yield parts
        return
    batch: list[bytes] = []
    taken = 0
    for part in parts:
        batch.append(part)
        taken += len(part)
        if taken > BATCH_BYTES:
            yield batch
            batch, taken = [], 0
    if batch:
        yield batch


def error_of(error: HerdError) -> messages_pb2.Error:
    """Return ``error`` as it travels in a reply."""
    return messages_pb2.Error(
        reason=messages_pb2.Reason.Value(f"REASON_{error.reason}"),
        outcome=messages_pb2.Outcome.Value(f"OUTCOME_{error.outcome.name}"),
        message=error.message,
        hint=error.hint,
        details=error.details,
    )


def failed(request: int, error: HerdError, *, epoch: int = 0, start: int = 0) -> messages_pb2.Frame:
    """Return the reply to the request with the id ``request`` that carries ``error``."""
    return messages_pb2.Frame(
        id=request, kind=messages_pb2.KIND_REPLY, error=error_of(error), epoch=epoch, start=start
    )
