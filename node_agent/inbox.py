"""What a child is told: the messages in its inbox (:mod:`node_agent.lifecycle`)."""

from __future__ import annotations

from dataclasses import dataclass

from node_agent.warden import protocol


@dataclass(frozen=True, slots=True)
class Exited:
    """The warden has reaped the main process."""

    how: protocol.Exited


@dataclass(frozen=True, slots=True)
class Gone:
    """Nothing of the process is left."""

    worker: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The process says that it serves."""

    worker: str


@dataclass(frozen=True, slots=True)
class Crashed:
    """The process says why it is about to exit."""

    worker: str
    why: str


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The owner key still says that an adopted process is ours."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop it, or kill it at once; with ``again`` go on with a new process."""

    why: str
    kill: bool = False
    again: bool = False


Message = Exited | Gone | Ready | Crashed | Confirmed | Stop
