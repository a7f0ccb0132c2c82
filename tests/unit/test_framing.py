"""Cutting messages out of bytes, and frames into batches."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent.worker import framing
from registry.errors import Overloaded
from registry.frames import encode
from registry.v1 import messages_pb2, worker_pb2


def message(text: str) -> worker_pb2.WorkerMessage:
    return worker_pb2.WorkerMessage(crashed=worker_pb2.Crashed(why=text))


@given(st.lists(st.text(max_size=50), max_size=10), st.integers(min_value=1, max_value=40))
def test_messages_survive_any_cut_of_the_stream(texts: list[str], step: int) -> None:
    stream = b"".join(framing.pack(message(text)) for text in texts)
    unpacker = framing.Unpacker()
    heard = [
        framing.worker_message(data)
        for at in range(0, len(stream), step)
        for data in unpacker.feed(stream[at : at + step])
    ]
    assert heard == [message(text) for text in texts]


def test_a_message_that_is_too_long_is_garbage_before_it_has_arrived() -> None:
    unpacker = framing.Unpacker()
    with pytest.raises(framing.Garbage, match="16777217 bytes"):
        unpacker.feed(struct.pack("<I", framing.MAX_MESSAGE + 1))


@given(st.binary(max_size=100))
def test_any_bytes_are_a_message_or_garbage(data: bytes) -> None:
    for decode in (framing.worker_message, framing.agent_message):
        with contextlib.suppress(framing.Garbage):
            decode(data)


def test_a_batch_is_cut_so_that_it_fits_into_a_message() -> None:
    parts = [encode(messages_pb2.Frame(id=n, data=bytes(framing.MAX_BODY))) for n in range(6)]
    cut = list(framing.batches(parts))
    assert [part for batch in cut for part in batch] == parts
    for batch in cut:
        assert len(framing.pack_batch(batch, 2**63)) <= framing.MAX_MESSAGE
    assert list(framing.batches(parts[:1])) == [parts[:1]]
    assert list(framing.batches([])) == [[]], "an empty batch carries an acknowledgement"


@given(st.lists(st.binary(max_size=300), max_size=5), st.integers(min_value=0, max_value=2**64 - 1))
def test_a_packed_batch_is_the_message_of_either_side(bodies: list[bytes], accepted: int) -> None:
    frames = [messages_pb2.Frame(id=n, data=body) for n, body in enumerate(bodies)]
    [data] = framing.Unpacker().feed(framing.pack_batch([encode(frame) for frame in frames], accepted))
    batch = messages_pb2.Batch(frames=frames, accepted=accepted)
    assert framing.agent_message(data) == worker_pb2.AgentMessage(batch=batch)
    assert framing.worker_message(data) == worker_pb2.WorkerMessage(batch=batch)


def test_an_error_travels_with_everything_it_says() -> None:
    error = Overloaded("full", hint="wait", details={"limit": "3"})
    assert framing.failed(5, error, epoch=7, start=2) == messages_pb2.Frame(
        id=5,
        kind=messages_pb2.KIND_REPLY,
        epoch=7,
        start=2,
        error=messages_pb2.Error(
            reason=messages_pb2.REASON_OVERLOADED,
            outcome=messages_pb2.OUTCOME_REFUSED,
            message="full",
            hint="wait",
            details={"limit": "3"},
        ),
    )
