"""What an agent and its warden say to each other, and how that travels.

The two share a SOCK_SEQPACKET socket pair that the warden makes anew for every agent process: one packet is
one message, in order, never cut, and nothing of an older generation can arrive on it.  A message is a frozen
dataclass here and one JSON object there, with its class in ``"is"``.

The agent opens with :class:`Hello`; the warden answers with :class:`Welcome`, everything it keeps (one
message each, so none outgrows a packet) and :class:`HandedOver`.  After that both talk when they have
something to say.  Only :class:`Start` and :class:`Output` have answers.

Both sides ignore fields they do not know and fill in missing ones from the defaults, so version N speaks with
N-1: a new field has a default, a new message is sent only to a partner whose ``protocol`` knows it.
All moments are CLOCK_BOOTTIME in seconds; all pids are those of the host.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

VERSION = 1
MAX_PACKET = 192 * 1024
"""Bytes of one encoded message; below the kernel's default limit for a packet (``net.core.wmem_default``)."""

Containment: TypeAlias = Literal["full", "partial"]
"""``full``: the warden's death is the death of every descendant.  ``partial``: a child that left its parent
behind, or a set-uid program, may live until the next warden kills it."""

StopMode: TypeAlias = Literal["smart", "fast", "immediate"]
"""As in PostgreSQL: SIGTERM, SIGINT and SIGQUIT to the launcher."""

WorkerState: TypeAlias = Literal["starting", "running", "exited", "gone"]
"""``starting``: forked, not yet exec'ed.  ``exited``: the main process has ended, others of it may live."""

Reason: TypeAlias = Literal["own", "deadline", "killed", "shutdown"]
"""Why a process ended: by itself (or by a signal the agent asked for), because its lease passed or was
forgotten, by :class:`Kill`, or because everything stops."""


class ProtocolError(ValueError):
    """A packet is not a message of this protocol."""


# ---- agent to warden


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First of all.

    The agent is killed when it has not petted for ``hang_limit`` seconds; a stop asked of the launcher may
    take ``stop_within`` seconds before everything left is killed.
    """

    protocol: int = VERSION
    hang_limit: float = 5.0
    stop_within: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pet:
    """The agent's main loop turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaiseDeadline:
    """Workers of ``lease`` may live until ``deadline``.  Never lowers; does nothing once it has passed."""

    lease: int
    deadline: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """``lease`` is over now: what still runs under it is killed, and it can never be raised again."""

    lease: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Start one process of ``child``: ``command``, or else ``behaviour``.

    ``worker`` is a uuid in hex, new for every process; ``lease`` is 0 for a child without a global ``name``.
    ``start`` must be the last counted one of this (name, epoch) + 1, or of the child where there is no name,
    and nothing of the process before may be left.
    ``env`` is all the process gets besides PATH, HOME, LANG, TZ, PGHERD_WORKER and PGHERD_WARDEN.
    ``args``, ``path``, ``databases`` (conninfo by name), ``socket`` (the agent's worker socket), ``node``,
    ``host`` and ``cluster`` are for the runtime of a behaviour only.
    """

    worker: str
    child: str
    name: str = ""
    lease: int = 0
    epoch: int = 0
    start: int = 1
    command: tuple[str, ...] | None = None
    behaviour: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    user: str = ""
    databases: Mapping[str, str] = field(default_factory=dict)
    socket: str = ""
    node: str = ""
    host: str = ""
    cluster: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """Send ``signum`` to the main process of ``worker``, with ``group`` to its whole process group."""

    worker: str
    signum: int
    group: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """SIGKILL ``worker`` and everything that belongs to it."""

    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Remember:
    """Keep ``value`` for the next agent; None removes the key.  Also how the warden hands a value over."""

    key: str
    value: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Answer with the last ``limit`` bytes that ``child`` has written, over all its processes."""

    request: int
    child: str
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Follow:
    """Send (``on``) or no longer send what ``child`` writes from now on: :class:`OutputPart` of request 0."""

    child: str
    on: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """``child`` is not wanted any more: forget its output, its last end and its count of starts."""

    child: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """Kill what is left, end warden and launcher; the launcher exits with ``code``."""

    code: int = 0


# ---- warden to agent


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The answer to :class:`Hello`; what follows it ends with :class:`HandedOver`."""

    protocol: int = VERSION
    generation: int
    """Counts the agents of this warden, from 1."""
    containment: Containment
    warden: str
    """A uuid in hex, new for every warden."""
    launcher_pid: int
    warden_pid: int
    agent_pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One lease that has not passed."""

    lease: int
    deadline: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """One worker of the table.

    One that is ``gone`` stays until its child is started again or dropped: an agent that died between the end
    of a worker and its own decision about it leaves that decision to the next one.  For a worker that is not
    running any more :class:`Exited` and :class:`Gone` are said again after :class:`HandedOver`.
    """

    worker: str
    child: str
    name: str
    lease: int
    epoch: int
    start: int
    pid: int
    state: WorkerState
    since: float
    """When it was forked."""
    code: int | None = None
    signal: int | None = None
    reason: Reason = "own"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """``start`` processes of the owner ``name`` at ``epoch`` (or of a child without a name) were made."""

    name: str
    epoch: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOver:
    """Everything kept from earlier agents has been sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The process exists and has called exec (a behaviour: is about to run its runtime)."""

    worker: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFailed:
    """There is no such process.  ``refused``: none was forked; else it could not be made what was asked for.

    Neither is counted as a start; ``counted`` is the number of those so far for this owner or child.
    """

    worker: str
    why: str
    refused: bool
    counted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """The main process of ``worker`` has ended, with an exit ``code`` or by a ``signal``."""

    worker: str
    child: str
    name: str
    epoch: int
    start: int
    pid: int
    code: int | None
    signal: int | None
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """Nothing of ``worker`` is left; only now may a successor run."""

    worker: str
    child: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputPart:
    """A piece of what ``child`` wrote.  ``dropped`` bytes before the first piece are not kept any more."""

    request: int
    child: str
    data: bytes
    dropped: int
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The launcher was asked to stop; the agent answers with :class:`Shutdown` when it is done."""

    mode: StopMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Reload:
    """The launcher got SIGHUP."""


FromAgent: TypeAlias = (
    Hello
    | Pet
    | RaiseDeadline
    | Forget
    | Start
    | Signal
    | Kill
    | Remember
    | Output
    | Follow
    | Drop
    | Shutdown
)
FromWarden: TypeAlias = (
    Welcome
    | Lease
    | WorkerRow
    | Counted
    | Remember
    | HandedOver
    | Started
    | StartFailed
    | Exited
    | Gone
    | OutputPart
    | Stop
    | Reload
)
Message: TypeAlias = FromAgent | FromWarden

_FROM_AGENT = {c.__name__: c for c in FromAgent.__args__}
_FROM_WARDEN = {c.__name__: c for c in FromWarden.__args__}
_SCALARS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "bool": (bool,),
}


def encode(message: Message) -> bytes:
    """Return ``message`` as a packet.  Raises :class:`ProtocolError` when it is larger than MAX_PACKET."""
    body: dict[str, Any] = {"is": type(message).__name__}
    for each in dataclasses.fields(message):
        value = getattr(message, each.name)
        body[each.name] = base64.b64encode(value).decode() if each.type == "bytes" else value
    packet = json.dumps(body, separators=(",", ":"), ensure_ascii=False, default=_plain).encode(
        errors="surrogateescape"
    )
    if len(packet) > MAX_PACKET:
        raise ProtocolError(f"{body['is']} of {len(packet)} bytes: at most {MAX_PACKET} fit into a packet")
    return packet


def from_agent(packet: bytes) -> FromAgent:
    """Return the message an agent has sent.  Raises :class:`ProtocolError`."""
    message: FromAgent = _decode(packet, _FROM_AGENT)
    return message


def from_warden(packet: bytes) -> FromWarden:
    """Return the message a warden has sent.  Raises :class:`ProtocolError`."""
    message: FromWarden = _decode(packet, _FROM_WARDEN)
    return message


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise ProtocolError(f"{type(value).__name__} has no place in JSON: {value!r}")


def _decode(packet: bytes, kinds: Mapping[str, Any]) -> Any:
    try:
        body = json.loads(packet.decode(errors="surrogateescape"))
        kind = kinds[body["is"]]
        values = {f.name: _value(f, body[f.name]) for f in dataclasses.fields(kind) if f.name in body}
        return kind(**values)
    except (KeyError, TypeError, ValueError) as why:
        raise ProtocolError(f"not a message: {packet[:200]!r}: {why!r}") from why


def _value(of: dataclasses.Field[Any], value: Any) -> Any:
    declared = str(of.type)
    if declared == "bytes":
        return base64.b64decode(value, validate=True)
    if declared in _SCALARS and (
        not isinstance(value, _SCALARS[declared]) or (isinstance(value, bool) and declared != "bool")
    ):
        raise TypeError(f"{of.name} must be {declared}, not {value!r}")
    return tuple(value) if isinstance(value, list) and declared.startswith("tuple") else value
