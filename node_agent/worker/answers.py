"""What a worker answers: made here, collected for one turn of the loop, sent in one write."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from node_agent.behaviours.interface import to_json
from node_agent.worker.framing import MAX_BODY, failed
from node_agent.worker.mailbox import Message, Results
from registry.clock import SYSTEM_CLOCK
from registry.errors import DaemonError, HerdError
from registry.frames import encode
from registry.v1 import messages_pb2

Body: TypeAlias = "str | bytes"
"""JSON text, or bytes as they are."""

AT_ONCE = 256 * 1024
"""An answer with a larger body does not wait for others to travel with."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which process this is: global name (or node-local child id), epoch (0 without a name) and start."""

    name: str
    epoch: int
    start: int

    def failed(self, request: int, error: HerdError) -> messages_pb2.Frame:
        """Return the reply to ``request`` that carries ``error`` and says who answers."""
        error.details.setdefault("name", self.name)
        if self.epoch:
            error.details.setdefault("epoch", str(self.epoch))
        return failed(request, error, epoch=self.epoch, start=self.start)

    def answered(self, request: int, body: Body) -> messages_pb2.Frame:
        """Return the reply to ``request`` with ``body``."""
        frame = messages_pb2.Frame(
            id=request, kind=messages_pb2.KIND_REPLY, epoch=self.epoch, start=self.start
        )
        _put_body(frame, body)
        return frame


def _put_body(frame: messages_pb2.Frame, body: Body) -> None:
    if isinstance(body, bytes):
        frame.data = body
    else:
        frame.json = body


def again(answer: messages_pb2.Frame, request: int) -> messages_pb2.Frame:
    """Return ``answer`` as the reply to another request."""
    copy = messages_pb2.Frame()
    copy.CopyFrom(answer)
    copy.id = request
    return copy


class Answers:
    """Sends the answers of one process, encoded, through ``post``.

    They are given on the event loop's thread.  ``soon`` makes the loop call :meth:`flush` in its next turn;
    the uplink's thread calls it too, when the loop does not turn.
    """

    def __init__(
        self,
        identity: Identity,
        results: Results,
        post: Callable[[Sequence[bytes]], None],
        soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self._identity = identity
        self._results = results
        self._post = post
        self._soon = soon
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        # Used again for each ordinary answer: a new message costs more than all the rest of one.
        self._ordinary = identity.answered(0, b"")

    def done(self, message: Message, result: Any) -> None:
        """Answer ``message`` with what its handler returned; TypeError for what JSON cannot say."""
        if not message.is_call:
            result = None
        if not message.key and not (message.is_call and message.request):
            return
        if isinstance(result, (bytes, bytearray, memoryview)):
            body: Body = bytes(result)
        else:
            body = to_json(message.method, result)
        if len(body) > MAX_BODY:
            why = f"{message.method} returned {len(body)} bytes, more than the {MAX_BODY} a message may carry"
            self.rejected(message, why, {"limit": str(MAX_BODY)})
        elif message.key:
            self._remember(message, self._identity.answered(message.request, body))
        else:
            self._ordinary.id = message.request
            _put_body(self._ordinary, body)
            self._queue([encode(self._ordinary)])
        if len(body) > AT_ONCE:
            # Whether there is room for the next one is known only when this one is written.
            self.flush()

    def rejected(self, message: Message, reason: str, details: Mapping[str, str]) -> None:
        """Answer that the handler of ``message`` ran and said no."""
        rejection = self._identity.failed(message.request, DaemonError(reason, details=details))
        if message.key:
            self._remember(message, rejection)
        elif message.requests:
            self._queue([encode(rejection)])

    def _remember(self, message: Message, frame: messages_pb2.Frame) -> None:
        frame.idempotency_key = message.key
        self._results.answered(message, frame, SYSTEM_CLOCK.now())
        self._queue([encode(again(frame, request)) for request in message.requests])

    def failed(self, message: Message, error: HerdError) -> None:
        """Answer ``message`` with ``error``; its handler did not run or did not end; its key is new again."""
        if message.key:
            self._results.forget(message)
        self._queue([encode(self._identity.failed(request, error)) for request in message.requests])

    def refused(self, message: Message, error: HerdError) -> None:
        """As :meth:`failed`, and at once, from any thread."""
        if message.key:
            self._results.forget(message)
        self._post([encode(self._identity.failed(request, error)) for request in message.requests])

    def _queue(self, parts: Sequence[bytes]) -> None:
        if not parts:
            return
        with self._lock:
            if not self._waiting:
                self._soon(self.flush)
            self._waiting += parts

    def flush(self) -> None:
        """Send what was collected."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        if waiting:
            self._post(waiting)
