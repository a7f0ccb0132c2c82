"""Errors and frames survive every form they travel in."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from registry import wire
from registry.errors import REASONS, DaemonError, HerdError, Invalid, Outcome, Overloaded, UnknownOutcome
from registry.frames import encode
from registry.v1 import messages_pb2 as pb

TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
DETAILS = st.dictionaries(TEXT.filter(lambda key: key not in ("outcome", "hint")), TEXT, max_size=4)
CLASSES = st.sampled_from([row.error for row in REASONS])
BODIES = st.one_of(TEXT, st.binary(max_size=300))


def parts(error: HerdError) -> tuple[type[HerdError], str, str, dict[str, str]]:
    return type(error), error.message, error.hint, error.details


@st.composite
def errors(draw: st.DrawFn) -> HerdError:
    return draw(CLASSES)(draw(TEXT), hint=draw(TEXT), details=draw(DETAILS))


@st.composite
def frames(draw: st.DrawFn) -> pb.Frame:
    frame = wire.request(
        draw(st.sampled_from([pb.KIND_CALL, pb.KIND_CAST])),
        draw(TEXT),
        draw(TEXT),
        draw(BODIES),
        epoch=draw(st.integers(0, 2**62)),
        idempotency_key=draw(TEXT),
        traceparent=draw(TEXT),
    )
    frame.id = draw(st.integers(0, 2**64 - 1))
    return frame


@given(errors())
def test_error_survives_a_frame(error: HerdError) -> None:
    answered = wire.error_reply(pb.Frame(id=7), error, epoch=3, start=2)
    back = pb.Frame.FromString(answered.SerializeToString())
    assert parts(wire.error_from_pb(back.error)) == parts(error)
    assert (back.id, back.kind, back.epoch, back.start) == (7, pb.KIND_REPLY, 3, 2)


@given(errors())
def test_error_survives_a_grpc_status(error: HerdError) -> None:
    [(key, value)] = wire.trailers(error)
    assert key == "grpc-status-details-bin"
    back = wire.error_of_status(status_pb2.Status.FromString(value))
    assert back is not None
    assert parts(back) == parts(error)


@given(st.lists(frames(), max_size=8))
def test_joined_frames_are_a_batch(sent: list[pb.Frame]) -> None:
    joined = b"".join(encode(frame) for frame in sent)
    assert joined == pb.Batch(frames=sent).SerializeToString()
    assert list(wire.decode(joined)) == sent


@pytest.mark.parametrize("size", [0, 100, 126, 127, 128, 1020, 16382, 16383, 16384, 70_000])
def test_frames_of_every_length_are_framed_as_protobuf_does(size: int) -> None:
    frame = pb.Frame(data=b"x" * size)
    assert encode(frame) == pb.Batch(frames=[frame]).SerializeToString()


@given(TEXT, TEXT, BODIES, st.integers(0, 2**62))
def test_unary_request_becomes_the_same_frame(name: str, method: str, body: wire.Body, epoch: int) -> None:
    call = pb.CallRequest(name=name, method=method, expect_epoch=epoch)
    wire.put_body(call, body)
    frame = wire.call_to_frame(call, pb.KIND_CALL)
    assert (frame.to, frame.method, frame.epoch, wire.body_of(frame)) == (name, method, epoch, body)


def test_no_body_means_an_empty_object() -> None:
    assert wire.body_of(wire.call_to_frame(pb.CallRequest(name="a", method="b"), pb.KIND_CALL)) == "{}"


@pytest.mark.parametrize("error", [row.error("text") for row in REASONS if row.grpc != "OK"])
def test_every_reason_has_its_grpc_code(error: HerdError) -> None:
    assert wire.grpc_code(error).value[0] == wire.status_of(error).code


def test_full_queue_says_when_to_try_again() -> None:
    retries = [
        detail
        for detail in wire.status_of(Overloaded("full")).details
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    ]
    retry = error_details_pb2.RetryInfo()
    retries[0].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 100


def test_long_texts_do_not_burst_the_trailers() -> None:
    huge = Invalid("m" * 100_000, hint="h" * 100_000, details={"name": "d" * 100_000})
    [(_, value)] = wire.trailers(huge)
    assert len(value) < 4_000


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (pb.OUTCOME_REFUSED, Outcome.REFUSED),
        (pb.OUTCOME_REPLY, Outcome.REPLY),
        (pb.OUTCOME_UNKNOWN, Outcome.UNKNOWN),
        (pb.OUTCOME_UNSPECIFIED, Outcome.UNKNOWN),
    ],
)
def test_reason_of_a_newer_version_keeps_its_outcome(
    outcome: pb.Outcome.ValueType, expected: Outcome
) -> None:
    newer = pb.Error(outcome=outcome, message="later")
    newer.MergeFromString(b"\x08\xe7\x07")  # reason = 999
    assert wire.error_from_pb(newer).outcome is expected


def rpc_error(code: grpc.StatusCode, *trailing: tuple[str, bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), "details")


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ],
)
def test_bare_status_after_sending_is_unknown(code: grpc.StatusCode) -> None:
    assert isinstance(wire.error_of_rpc(rpc_error(code)), UnknownOutcome)
    assert wire.error_of_rpc(rpc_error(code), read_only=True).outcome is Outcome.REFUSED


def test_garbage_in_the_trailers_is_a_bare_status() -> None:
    error = rpc_error(grpc.StatusCode.NOT_FOUND, ("grpc-status-details-bin", b"\xff\xff"))
    assert isinstance(wire.error_of_rpc(error), UnknownOutcome)


def test_error_info_of_another_domain_is_not_ours() -> None:
    status = status_pb2.Status(code=5)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NO_SUCH_NAME", domain="example.com"))
    assert wire.error_of_status(status) is None


def test_rejection_is_a_response_with_an_error() -> None:
    frame = wire.error_reply(pb.Frame(), DaemonError("no"), epoch=4, start=2)
    response = wire.frame_to_response(frame)
    assert response.error.reason == pb.REASON_DAEMON_ERROR
    assert (response.epoch, response.start, response.WhichOneof("body")) == (4, 2, None)


@given(st.integers(-500, 300_000))
def test_less_time_is_left_at_each_hop(milliseconds: int) -> None:
    left = milliseconds / 1000
    told = wire.remaining_ms(1000.0 + left, 1000.0)
    if milliseconds <= 0:
        assert told == 0
    else:
        assert 0 <= told <= milliseconds
        assert milliseconds - told <= 102


def test_request_without_a_time_has_five_seconds() -> None:
    assert wire.deadline_of(pb.Frame(), 100.0) == 105.0
    assert wire.deadline_of(pb.Frame(remaining_ms=1500), 100.0) == 101.5


@pytest.mark.parametrize("body", ["ä" * (wire.MAX_BODY // 2 + 1), b"x" * (wire.MAX_BODY + 1)])
def test_size_counts_bytes_not_characters(body: wire.Body) -> None:
    with pytest.raises(Invalid) as caught:
        wire.check_body(body)
    assert caught.value.details["limit"] == str(wire.MAX_BODY)
    wire.check_body(body[: len(body) // 2])
