"""Delivery on this host: is the name ours, may we still act, and who serves it?

Every request for a name of this host passes here, from a client or from another agent.  It is refused, or
handed to the child's process; nothing waits here: the router that first took the request in care keeps it and
asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial

from node_agent.attachment import AttachHandler, Attachment
from node_agent.lifecycle import Child
from node_agent.spec.child import Command
from node_agent.states import State
from node_agent.supervisor import Supervisor
from registry.clock import Boottime
from registry.errors import Fenced, HerdError, NoOwner, NoSuchMethod, UnknownOutcome, WrongEpoch
from registry.link import Reply
from registry.v1 import messages_pb2, names_pb2
from registry.wire import error_reply


class Local:
    """Implements :class:`registry.router.Local` for the children of a supervisor.

    ``trusted()`` says whether the session lets named workers act; it is asked for every request and reply.
    ``declared`` are the global names of the cluster.
    """

    def __init__(self, supervisor: Supervisor, trusted: Callable[[], bool], declared: Container[str]) -> None:
        self._declared = declared
        self._supervisor = supervisor
        self._children = supervisor.children
        self._trusted = trusted
        self._methods: dict[str, tuple[names_pb2.Method, ...]] = {}

    def owns(self, name: str) -> bool:
        """Return whether a child of this host has that name; a node-local id gives way to a declared name."""
        child = self._children.get(name)
        return child is not None and (child.ownership is not None or name not in self._declared)

    def deliver(self, frame: messages_pb2.Frame, deadline: Boottime, reply: Reply) -> None:
        """Hand a request to its child's process, or refuse it."""
        child = self._children.get(frame.to)
        if child is not None and child.ownership is not None:
            if not self._trusted():
                self._refuse(frame, reply, child, _untrusted(frame.to))
                return
            if frame.epoch and frame.epoch != child.epoch:
                self._refuse(frame, reply, child, _wrong_epoch(frame, child))
                return
            reply = partial(self._answer, child, reply)
        if child is None or child.state is not State.READY or child.attachment is None:
            self._refuse(frame, reply, child, _not_serving(frame.to, child))
            return
        try:
            child.attachment.send(frame, deadline, reply)
        except HerdError as error:
            self._refuse(frame, reply, child, error)

    @staticmethod
    def _refuse(frame: messages_pb2.Frame, reply: Reply, child: Child | None, error: HerdError) -> None:
        epoch, start = (child.epoch, child.start) if child else (0, 0)
        reply(error_reply(frame, error, epoch=epoch, start=start))

    def _answer(self, child: Child, reply: Reply, answered: messages_pb2.Frame) -> None:
        """Call an answer unknown which comes when this host may not act any more."""
        if self._trusted() or answered.error.outcome in (
            messages_pb2.OUTCOME_REFUSED,
            messages_pb2.OUTCOME_UNKNOWN,
        ):
            reply(answered)
        else:
            unknown = UnknownOutcome(
                f"{child.key} answered when this host's lease was not certain any more",
                details={"name": child.key, "epoch": str(child.epoch)},
            )
            reply(error_reply(answered, unknown, epoch=child.epoch, start=child.start))

    # Workers' connections.

    def accept(self, worker: str, methods: Sequence[names_pb2.Method], ready: bool) -> str | AttachHandler:
        """Decide about a worker that attaches: who wants to hear of it, or why it is not wanted."""
        child = self._supervisor.child_of(worker)
        if child is None:
            return "this agent runs no such worker"
        self._methods[child.key] = tuple(methods)
        return _Connection(child, worker)

    def methods(self, key: str) -> tuple[names_pb2.Method, ...]:
        """Return what a child of this host offers; nothing for a plain command."""
        return self._methods.get(key, ())


class _Connection:
    """Tells a child what becomes of one process's connection."""

    def __init__(self, child: Child, worker: str) -> None:
        self._child, self._worker = child, worker
        self._attachment: Attachment | None = None

    def on_attached(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._child.attached(attachment)

    def on_ready(self) -> None:
        self._child.ready(self._worker)

    def on_crashed(self, why: str, traceback: str) -> None:
        self._child.crashed(self._worker, why)

    def on_late_reply(self, reply: messages_pb2.Frame) -> None:
        """Nobody waits for it: its caller was told that the outcome is unknown."""

    def on_closed(self, why: str) -> None:
        self._child.detached(self._attachment)


def _untrusted(name: str) -> Fenced:
    return Fenced(
        f"{name}: this host's lease is not certain, so it may not act for the name",
        hint=f"when the lease ends the name moves; `pgherd why {name}` says how far that is",
        details={"name": name},
    )


def _wrong_epoch(frame: messages_pb2.Frame, child: Child) -> WrongEpoch:
    return WrongEpoch(
        f"{frame.to} has epoch {child.epoch}, the request is for {frame.epoch}",
        details={"name": frame.to, "epoch": str(child.epoch)},
    )


def _not_serving(name: str, child: Child | None) -> HerdError:
    details = {"name": name}
    if child is None:
        return NoOwner(f"{name} is not on this host", details=details)
    if isinstance(child.spec.run, Command):
        return NoSuchMethod(f"{name} is a plain command: it offers no methods", details=details)
    obstacle = f": {child.obstacle}" if child.obstacle else ""
    match child.state:
        case State.BACKOFF:
            how = f"waits before its next start on {child.host} ({child.waits:.1f} s left)"
        case State.FENCING:
            how = f"is being fenced on {child.host}{obstacle}"
        case State.READY:
            how = f"is not connected to the agent of {child.host}"
        case state:
            how = f"is {state.value} on {child.host}"
    return NoOwner(f"{name} {how}", hint=f"pgherd why {name}", details=details)
