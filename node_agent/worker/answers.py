"""What a worker answers: made here, collected for one turn of the loop, sent in one write."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from node_agent.behaviours.interface import to_json
from node_agent.worker.framing import MAX_BODY, failed
from node_agent.worker.mailbox import Message, Results
from registry.clock import SYSTEM_CLOCK
from registry.errors import DaemonError, HerdError
from registry.v1 import messages_pb2


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

    def answered(self, request: int, body: str | bytes) -> messages_pb2.Frame:
        """Return the reply to ``request`` with ``body``: JSON text, or bytes as they are."""
        frame = messages_pb2.Frame(
            id=request, kind=messages_pb2.KIND_REPLY, epoch=self.epoch, start=self.start
        )
        if isinstance(body, bytes):
            frame.data = body
        else:
            frame.json = body
        return frame


def again(answer: messages_pb2.Frame, request: int) -> messages_pb2.Frame:
    """Return ``answer`` as the reply to another request."""
    copy = messages_pb2.Frame()
    copy.CopyFrom(answer)
    copy.id = request
    return copy


class Answers:
    """Sends the answers of one process through ``post``.

    ``soon`` makes the event loop call :meth:`flush` in its next turn; the uplink's thread calls it too, when
    the loop does not turn.
    """

    def __init__(
        self,
        identity: Identity,
        results: Results,
        post: Callable[[Sequence[messages_pb2.Frame]], None],
        soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self._identity = identity
        self._results = results
        self._post = post
        self._soon = soon
        self._lock = threading.Lock()
        self._waiting: list[messages_pb2.Frame] = []

    def done(self, message: Message, result: Any) -> None:
        """Answer ``message`` with what its handler returned; TypeError for what JSON cannot say."""
        if not message.is_call:
            result = None
        if not message.requests and not message.key:
            return
        if isinstance(result, bytes | bytearray | memoryview):
            body: str | bytes = bytes(result)
        else:
            body = to_json(message.method, result)
        if len(body) > MAX_BODY:
            why = f"{message.method} returned {len(body)} bytes, more than the {MAX_BODY} a message may carry"
            self.rejected(message, why, {"limit": str(MAX_BODY)})
        else:
            self._answer(message, self._identity.answered(message.request, body))

    def rejected(self, message: Message, reason: str, details: Mapping[str, str]) -> None:
        """Answer that the handler of ``message`` ran and said no."""
        error = DaemonError(reason, details=details)
        self._answer(message, self._identity.failed(message.request, error))

    def _answer(self, message: Message, frame: messages_pb2.Frame) -> None:
        if message.key:
            frame.idempotency_key = message.key
            self._results.answered(message, frame, SYSTEM_CLOCK.now())
        requests = message.requests
        if requests:
            copies = [again(frame, request) for request in requests[1:]]
            self._queue([frame, *copies])

    def failed(self, message: Message, error: HerdError) -> None:
        """Answer ``message`` with ``error``; its handler did not run or did not end; its key is new again."""
        if message.key:
            self._results.forget(message)
        frames = [self._identity.failed(request, error) for request in message.requests]
        if frames:
            self._queue(frames)

    def _queue(self, frames: list[messages_pb2.Frame]) -> None:
        with self._lock:
            if not self._waiting:
                self._soon(self.flush)
            self._waiting += frames

    def flush(self) -> None:
        """Send what was collected."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        if waiting:
            self._post(waiting)
