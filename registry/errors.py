"""What can go wrong, as one tree and one table.

    HerdError                       every error a caller of pgherd may see
    ├── Refused                     not executed: safe to try again elsewhere or later
    │   ├── Fenced ── CallInFence
    │   ├── NoSuchName, NoOwner, NoSuchMethod
    │   ├── WrongEpoch, Overloaded
    │   ├── Denied, Invalid
    │   └── Unreachable
    ├── UnknownOutcome              may have been executed: only the caller can decide
    └── DaemonError                 executed; the handler rejected the request
    StoreError                      what the etcd adapter reports to the registry, never to callers
    ├── StoreUnavailable            nothing was executed, or a read failed
    ├── StoreAmbiguous              a write may have been executed
    ├── StoreCompacted              the wanted revision is gone: read everything again
    ├── StoreDenied                 etcd refused the credentials
    ├── LeaseNotFound               the lease has expired or was revoked
    └── StoreRestored               cluster id changed, or revisions went backwards

Two questions decide what a caller may do, and every :class:`HerdError` answers both: ``retryable`` (may the
same request be tried again without asking anybody?) and ``delivered`` (can it have reached a handler?).

``REASONS`` is the only place where reason, outcome, gRPC status, SQLSTATE, exit code and class are related.
``python -m registry.errors --write`` copies it into the proto comments and the documentation.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


class Outcome(enum.Enum):
    """The three ways a call can end."""

    REPLY = "reply"
    REFUSED = "refused"
    UNKNOWN = "unknown"


class HerdError(Exception):
    """An error with a reason; ``details`` are the thing, the value and the limit, as strings."""

    reason: ClassVar[str]
    outcome: ClassVar[Outcome]
    retryable: ClassVar[bool] = False
    delivered: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", details: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details: dict[str, str] = dict(details or {})


class Refused(HerdError):
    """The party that held the request did not pass it on: nothing was executed."""

    outcome = Outcome.REFUSED


class Fenced(Refused):
    """A newer owner exists, or this one may not act any more."""

    reason = "FENCED"
    retryable = True


class CallInFence(Fenced):
    """A call from inside a fenced transaction would hold the fence across the network."""

    reason = "CALL_IN_FENCE"
    retryable = False


class NoSuchName(Refused):
    """No daemon of that name is declared or owned."""

    reason = "NO_SUCH_NAME"


class NoOwner(Refused):
    """The name is declared, and nobody owned it in time."""

    reason = "NO_OWNER"
    retryable = True


class NoSuchMethod(Refused):
    """The daemon offers no such method."""

    reason = "NO_SUCH_METHOD"


class WrongEpoch(Refused):
    """The receiver does not own the name at the expected epoch."""

    reason = "WRONG_EPOCH"
    retryable = True


class Overloaded(Refused):
    """A bound on queued messages was reached; try again after a moment."""

    reason = "OVERLOADED"
    retryable = True


class Denied(Refused):
    """The caller may not do this."""

    reason = "DENIED"


class Invalid(Refused):
    """The request itself is wrong: name, method, payload, size or deadline."""

    reason = "INVALID"


class Unreachable(Refused):
    """No agent could be reached, or it cannot see the registry; nothing was sent."""

    reason = "UNREACHABLE"
    retryable = True


class UnknownOutcome(HerdError):
    """The request was handed over and no answer came: it may have been executed."""

    reason = "UNKNOWN_OUTCOME"
    outcome = Outcome.UNKNOWN
    delivered = True


class DaemonError(HerdError):
    """The handler ran and said no (``raise Reject(...)``)."""

    reason = "DAEMON_ERROR"
    outcome = Outcome.REPLY
    delivered = True


class StoreError(Exception):
    """etcd, or the way to it, did not do what was asked."""


class StoreUnavailable(StoreError):
    """No member answered in time, or there is no quorum; nothing was written."""


class StoreAmbiguous(StoreError):
    """A write timed out: it may have been committed."""


class StoreCompacted(StoreError):
    """The revision is gone; take a new snapshot.  ``revision`` is the oldest one left, or 0."""

    def __init__(self, message: str, revision: int = 0) -> None:
        super().__init__(message)
        self.revision = revision


class StoreDenied(StoreError):
    """etcd refused user, password or certificate."""


class LeaseNotFound(StoreError):
    """The lease has expired or was revoked."""


class StoreRestored(StoreError):
    """etcd answers as another cluster, or from an older revision than one already seen."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the error table."""

    number: int
    error: type[HerdError]
    grpc: str
    sqlstate: str
    exit_code: int

    @property
    def reason(self) -> str:
        return self.error.reason


REASONS: tuple[Row, ...] = (
    Row(1, Fenced, "ABORTED", "PH001", 1),
    Row(2, CallInFence, "FAILED_PRECONDITION", "PH002", 1),
    Row(3, NoSuchName, "NOT_FOUND", "PH010", 1),
    Row(4, NoOwner, "UNAVAILABLE", "PH011", 1),
    Row(5, NoSuchMethod, "UNIMPLEMENTED", "PH012", 1),
    Row(6, WrongEpoch, "FAILED_PRECONDITION", "PH013", 1),
    Row(7, Overloaded, "RESOURCE_EXHAUSTED", "PH014", 1),
    Row(8, Denied, "PERMISSION_DENIED", "42501", 1),
    Row(9, Invalid, "INVALID_ARGUMENT", "22023", 2),
    Row(10, UnknownOutcome, "UNKNOWN", "PH020", 3),
    Row(11, DaemonError, "OK", "PH030", 5),
    Row(12, Unreachable, "UNAVAILABLE", "08001", 4),
)

BY_REASON: Mapping[str, Row] = {row.reason: row for row in REASONS}
BY_NUMBER: Mapping[int, Row] = {row.number: row for row in REASONS}


def exit_code(error: HerdError) -> int:
    """Return the exit code of the command line for ``error``."""
    return BY_REASON[error.reason].exit_code


def _table() -> list[str]:
    rows = [("reason", "outcome", "gRPC", "SQLSTATE", "exit", "registry.errors")]
    rows += [
        (row.reason, row.error.outcome.value, row.grpc, row.sqlstate, str(row.exit_code), row.error.__name__)
        for row in REASONS
    ]
    return ["| " + " | ".join(row) + " |" for row in (rows[0], ("---",) * 6, *rows[1:])]


def _proto_enum() -> list[str]:
    lines = ["  // Not an error.", "  REASON_UNSPECIFIED = 0;"]
    for row in REASONS:
        doc = (row.error.__doc__ or "").strip().splitlines()[0]
        code = "in the reply" if row.grpc == "OK" else f"gRPC {row.grpc}"
        lines.append(f"  // {doc} Outcome {row.error.outcome.value}; {code}; SQLSTATE {row.sqlstate}.")
        lines.append(f"  REASON_{row.reason} = {row.number};")
    return lines


def _between(text: str, begin: str, end: str, lines: list[str]) -> str:
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return head + begin + "\n" + "\n".join(lines) + "\n" + end + tail


def _write_copies() -> None:
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    copies = (
        (root / "proto/registry/v1/messages.proto", "  // table:begin", "  // table:end", _proto_enum()),
        (root / "registry/README.md", "<!-- table:begin -->", "<!-- table:end -->", _table()),
    )
    for path, begin, end, lines in copies:
        path.write_text(_between(path.read_text(), begin, end, lines))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m registry.errors --write")
    _write_copies()
