"""Which requests get into the mailbox: decided for each frame when it arrives, before anything is queued.

A frame is taken, or answered at once: no such method, wrong arguments, wrong epoch, mailbox full, stopping,
or answered before (idempotency key).  So a cast can be acknowledged as soon as it is in the mailbox, and
nothing in the mailbox is refused later for what it says.  Runs on the runtime's I/O thread.
"""

from __future__ import annotations

import math

from node_agent.behaviours.interface import Interface
from node_agent.worker.answers import Identity, again
from node_agent.worker.framing import DEFAULT_MS
from node_agent.worker.mailbox import Mailbox, Message, Put, Results
from registry.clock import Boottime
from registry.errors import HerdError, Invalid, NoOwner, Overloaded, WrongEpoch
from registry.v1 import messages_pb2

_REQUESTS = (messages_pb2.KIND_CALL, messages_pb2.KIND_CAST)


class Intake:
    """Puts the requests of an agent into the mailbox."""

    def __init__(self, identity: Identity, interface: Interface, mailbox: Mailbox, results: Results) -> None:
        self._identity = identity
        self._interface = interface
        self._mailbox = mailbox
        self._results = results

    def take(self, frame: messages_pb2.Frame, now: Boottime) -> messages_pb2.Frame | None:
        """Put what is acceptable into the mailbox; return the answer to everything else."""
        kind = frame.kind
        try:
            if kind in _REQUESTS:
                return self._request(frame, kind == messages_pb2.KIND_CALL, now)
            if kind == messages_pb2.KIND_CANCEL:
                self._cancel(frame.id)
                return None
            raise Invalid(f"a frame of kind {kind} is no request")
        except HerdError as error:
            return self._identity.failed(frame.id, error)

    def _request(self, frame: messages_pb2.Frame, is_call: bool, now: Boottime) -> messages_pb2.Frame | None:
        identity, epoch = self._identity, frame.epoch
        if epoch and epoch != identity.epoch:
            raise WrongEpoch(f"{identity.name} has epoch {identity.epoch} here, the request wants {epoch}")
        message = Message(
            frame.method,
            is_call,
            self._interface.arguments(frame),
            # The sender of a cast waits for its acceptance only; after that it is ours to handle.
            now + (frame.remaining_ms or DEFAULT_MS) / 1000 if is_call else math.inf,
            frame.sender,
            frame.traceparent,
            frame.idempotency_key,
            frame.id,
            frame.ByteSize(),
        )
        if message.key:
            seen = self._results.seen(message, now)
            if seen is True:
                return None
            if isinstance(seen, messages_pb2.Frame):
                return again(seen, frame.id) if message.is_call else None
        put = self._mailbox.put(message)
        if put is Put.TAKEN:
            return None
        if message.key:
            self._results.forget(message)
        if put is Put.CLOSED:
            raise NoOwner(f"{identity.name} is stopping")
        mailbox = self._mailbox
        raise Overloaded(
            f"{identity.name} has {len(mailbox)} messages of {mailbox.waiting_bytes} bytes in its mailbox, "
            f"{mailbox.messages} and {mailbox.size} bytes are allowed",
            hint="try again after a moment",
            details={"limit": str(mailbox.messages)},
        )

    def _cancel(self, request: int) -> None:
        message = self._mailbox.cancel(request)
        if message is not None and message.key:
            self._results.forget(message)
