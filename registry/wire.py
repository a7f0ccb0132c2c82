"""What travels: errors and frames in protobuf and gRPC form, and back.  Pure; no I/O, no clock.

Every door says an error the same way: as :class:`pgherd.v1.Error` inside a frame, as ``google.rpc.ErrorInfo``
(domain ``pgherd``) inside a gRPC status.  Time on the wire is what remains, because clocks of hosts differ; a
sender keeps a small part of it for the way back, so that the party that holds a request can say what became
of it before the one that asked gives up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]

from registry.clock import Boottime
from registry.errors import (
    BY_NUMBER,
    BY_REASON,
    DaemonError,
    Denied,
    HerdError,
    Invalid,
    Outcome,
    Overloaded,
    UnknownOutcome,
    Unreachable,
)
from registry.v1 import messages_pb2 as pb

Body: TypeAlias = "str | bytes"
"""JSON text, or bytes that only the daemon understands."""
HasBody: TypeAlias = "pb.Frame | pb.CallRequest | pb.CallResponse"

DOMAIN = "pgherd"
MAX_BODY = 4 << 20
"""Bytes of payload in one frame."""
MAX_HEAD = 64 << 10
"""Bytes of everything else in one frame: name, method, keys, error."""
MAX_BATCH = 16 << 20
"""Bytes of one gRPC message; a sender closes its batches at half of it."""
DEFAULT_TIMEOUT = 5.0
"""Seconds for a request that names no deadline."""
RETRY_AFTER = 0.1
"""Seconds a refused caller is asked to wait when a queue is full."""

_LONGEST_MS = 0xFFFFFFFF
_STATUS_DETAILS = "grpc-status-details-bin"
_STATUS_TEXT = 1000
_OUTCOMES = {
    Outcome.REPLY: pb.OUTCOME_REPLY,
    Outcome.REFUSED: pb.OUTCOME_REFUSED,
    Outcome.UNKNOWN: pb.OUTCOME_UNKNOWN,
}
_FALLBACK: dict[int, type[HerdError]] = {
    pb.OUTCOME_REPLY: DaemonError,
    pb.OUTCOME_REFUSED: Invalid,
    pb.OUTCOME_UNSPECIFIED: UnknownOutcome,
    pb.OUTCOME_UNKNOWN: UnknownOutcome,
}
_FOREIGN: dict[grpc.StatusCode, type[HerdError]] = {
    grpc.StatusCode.UNIMPLEMENTED: Invalid,
    grpc.StatusCode.INVALID_ARGUMENT: Invalid,
    grpc.StatusCode.UNAUTHENTICATED: Denied,
    grpc.StatusCode.PERMISSION_DENIED: Denied,
}


# Errors.


def error_to_pb(error: HerdError) -> pb.Error:
    """Return ``error`` as it travels in a frame."""
    return pb.Error(
        reason=pb.Reason.Value(f"REASON_{error.reason}"),
        outcome=_OUTCOMES[error.outcome],
        message=error.message,
        hint=error.hint,
        details=error.details,
    )


def error_from_pb(error: pb.Error) -> HerdError:
    """Return the exception for an error of a frame; a reason of a newer version keeps its outcome."""
    row = BY_NUMBER.get(error.reason)
    cls = row.error if row else _FALLBACK.get(error.outcome, UnknownOutcome)
    return cls(error.message, hint=error.hint, details=error.details)


def status_of(error: HerdError) -> status_pb2.Status:
    """Return ``error`` as a gRPC status with ErrorInfo, and RetryInfo when a queue was full.

    Texts are cut so that the status fits into HTTP/2 trailers.
    """
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in error.details.items():
        info.metadata[key] = value[:_STATUS_TEXT]
    info.metadata["outcome"] = error.outcome.value
    if error.hint:
        info.metadata["hint"] = error.hint[:_STATUS_TEXT]
    code = code_pb2.Code.Value(BY_REASON[error.reason].grpc)
    status = status_pb2.Status(code=code, message=error.message[:_STATUS_TEXT])
    status.details.add().Pack(info)
    if isinstance(error, Overloaded):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(RETRY_AFTER * 1e9))
        status.details.add().Pack(retry)
    return status


def error_of_status(status: status_pb2.Status) -> HerdError | None:
    """Return the exception a status of :func:`status_of` was made from; None for a foreign one."""
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            details = dict(info.metadata)
            outcome, hint = details.pop("outcome", ""), details.pop("hint", "")
            row = BY_REASON.get(info.reason)
            known = {o.value: number for o, number in _OUTCOMES.items()}
            cls = row.error if row else _FALLBACK[known.get(outcome, pb.OUTCOME_UNKNOWN)]
            return cls(status.message, hint=hint, details=details)
    return None


def trailers(error: HerdError) -> tuple[tuple[str, bytes], ...]:
    """Return the trailing metadata that carries ``error`` beside its gRPC code."""
    return ((_STATUS_DETAILS, status_of(error).SerializeToString()),)


def grpc_code(error: HerdError) -> grpc.StatusCode:
    """Return the gRPC code of ``error``."""
    return grpc.StatusCode[BY_REASON[error.reason].grpc]


def error_of_rpc(error: grpc.aio.AioRpcError, *, read_only: bool = False) -> HerdError:
    """Return what a failed RPC means to its caller.

    Without our details nobody has promised anything: a request that was sent may have been executed, whatever
    the code says, unless it could only read (``read_only``).
    """
    for key, value in error.trailing_metadata() or ():
        if key == _STATUS_DETAILS and isinstance(value, bytes):
            try:
                ours = error_of_status(status_pb2.Status.FromString(value))
            except DecodeError:
                ours = None
            if ours is not None:
                return ours
    cls = _FOREIGN.get(error.code(), Unreachable if read_only else UnknownOutcome)
    return cls(f"{error.code().name}: {error.details() or 'no details'}")


# Frames.


def error_reply(frame: pb.Frame, error: HerdError, *, epoch: int = 0, start: int = 0) -> pb.Frame:
    """Return the reply that answers the request ``frame`` with ``error``."""
    return pb.Frame(id=frame.id, kind=pb.KIND_REPLY, error=error_to_pb(error), epoch=epoch, start=start)


def request(
    kind: pb.Kind.ValueType,
    to: str,
    method: str,
    body: Body,
    *,
    epoch: int = 0,
    idempotency_key: str = "",
    traceparent: str = "",
) -> pb.Frame:
    """Return a request frame; its id and remaining time are set by the link that carries it."""
    frame = pb.Frame(kind=kind, to=to, method=method)
    put_body(frame, body)
    if epoch:
        frame.epoch = epoch
    if idempotency_key:
        frame.idempotency_key = idempotency_key
    if traceparent:
        frame.traceparent = traceparent
    return frame


def call_to_frame(call: pb.CallRequest, kind: pb.Kind.ValueType) -> pb.Frame:
    """Return the frame of a unary request."""
    return request(
        kind,
        call.name,
        call.method,
        body_of(call),
        epoch=call.expect_epoch,
        idempotency_key=call.idempotency_key,
        traceparent=call.traceparent,
    )


def frame_to_response(frame: pb.Frame) -> pb.CallResponse:
    """Return the unary response of a reply frame: a body, or the handler's own error."""
    response = pb.CallResponse(epoch=frame.epoch, start=frame.start)
    if frame.HasField("error"):
        response.error.CopyFrom(frame.error)
    else:
        put_body(response, body_of(frame))
    return response


def put_body(message: HasBody, body: Body) -> None:
    """Set the body of a frame, request or response."""
    if isinstance(body, str):
        message.json = body
    else:
        message.data = body


def body_of(message: HasBody) -> Body:
    """Return the body of a frame, request or response; neither kind set means the JSON text ``{}``."""
    match message.WhichOneof("body"):
        case "data":
            return message.data
        case "json":
            return message.json
        case _:
            return "{}"


def check_body(body: Body) -> None:
    """Raise Invalid for a payload over the limit."""
    if len(body) <= MAX_BODY // 4:
        return
    size = len(body.encode()) if isinstance(body, str) else len(body)
    if size > MAX_BODY:
        raise Invalid(
            f"the payload has {size} bytes, at most {MAX_BODY} are allowed",
            hint="send a reference to the data, or several messages",
            details={"bytes": str(size), "limit": str(MAX_BODY)},
        )


def check_request(frame: pb.Frame) -> None:
    """Raise Invalid for a frame that is not a request, or larger than one may be."""
    if frame.kind not in (pb.KIND_CALL, pb.KIND_CAST):
        raise Invalid(
            f"a frame of kind {kind_name(frame.kind)} is not a request",
            hint="send KIND_CALL or KIND_CAST",
            details={"kind": str(frame.kind)},
        )
    if frame.ByteSize() > MAX_HEAD:
        body = body_of(frame)
        check_body(body)
        head = frame.ByteSize() - (len(body.encode()) if isinstance(body, str) else len(body))
        if head > MAX_HEAD:
            raise Invalid(
                f"name, method and keys of the request have {head} bytes, at most {MAX_HEAD} are allowed",
                details={"bytes": str(head), "limit": str(MAX_HEAD)},
            )


def kind_name(kind: int) -> str:
    """Return the name of a frame kind, or its number when this version does not know it."""
    return next((name for name, number in pb.Kind.items() if number == kind), str(kind))


# Batches.


def decode(raw: bytes) -> Sequence[pb.Frame]:
    """Return the frames of an encoded Batch.  Raises Invalid."""
    try:
        return pb.Batch.FromString(raw).frames
    except DecodeError as error:
        raise Invalid(f"{len(raw)} bytes are not a pgherd.v1.Batch: {error}") from error


# Time.


def deadline_of(frame: pb.Frame, now: Boottime) -> Boottime:
    """Return until when a received request is wanted."""
    return now + (frame.remaining_ms / 1000 if frame.remaining_ms else DEFAULT_TIMEOUT)


def remaining_ms(deadline: Boottime, now: Boottime) -> int:
    """Return what to write into a request for the next hop; 0: nothing is left, do not send it.

    A tenth of it, at most 100 ms, is kept for the answer to come back.
    """
    left = deadline - now
    if left <= 0:
        return 0
    ms = int((left * 0.9 if left < 1 else left - 0.1) * 1000)
    return ms if ms <= _LONGEST_MS else _LONGEST_MS
