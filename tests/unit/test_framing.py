"""Cutting messages out of bytes, and frames into batches."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent.worker import framing
from registry.errors import Overloaded
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
    frames = [messages_pb2.Frame(id=n, data=bytes(framing.MAX_BODY)) for n in range(6)]
    cut = list(framing.batches(frames, sum(frame.ByteSize() for frame in frames)))
    assert [frame.id for batch in cut for frame in batch] == list(range(6))
    for batch in cut:
        packed = framing.pack(worker_pb2.AgentMessage(batch=messages_pb2.Batch(frames=batch)))
        assert len(packed) <= framing.MAX_MESSAGE
    assert list(framing.batches(frames[:1], 100)) == [frames[:1]]
    assert list(framing.batches([], 0)) == [[]], "an empty batch carries an acknowledgement"


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
