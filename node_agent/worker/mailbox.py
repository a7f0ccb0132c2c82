"""The bounded queue of a worker, and its memory of what it has answered.

The runtime's I/O thread puts requests in, the main thread takes them out one at a time.  A full mailbox
refuses: what is in it will be handled, so nothing is ever dropped silently.  Both classes are safe to use
from both threads and never block for longer than a few instructions.
"""

from __future__ import annotations

import enum
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from registry.clock import Boottime
from registry.v1 import messages_pb2

MESSAGES = 1000
"""Messages in a mailbox, by default."""

MAILBOX_BYTES = 16 * 1024 * 1024
"""Bytes of messages in a mailbox, by default."""

RESULT_TTL = 3600.0
"""Seconds for which the answer to a request with an idempotency key is remembered."""

RESULTS = 10_000
"""Answers that are remembered, at most."""

RESULT_BYTES = 64 * 1024 * 1024
"""Bytes of answers that are remembered, at most."""


@dataclass(slots=True, eq=False)
class Message:
    """One request for a daemon; what ``handle_call`` and ``handle_cast`` are given.

    ``arguments`` are the method's arguments by name, or, for a method that the daemon does not declare, the
    decoded JSON value or the bytes of the body.  ``deadline`` is in seconds of CLOCK_BOOTTIME; an accepted
    cast has none.  ``postpone`` is set for the daemon's own timers: what to do when it may not act now.
    """

    method: str
    is_call: bool
    arguments: Any
    deadline: Boottime
    sender: str = ""
    traceparent: str = ""
    key: str = ""
    request: int = 0
    size: int = 0
    joined: tuple[int, ...] = ()
    postpone: Callable[[], None] | None = None

    @property
    def requests(self) -> list[int]:
        """The ids of the requests that wait for its answer; none for a cast or a timer."""
        return [self.request, *self.joined] if self.is_call and self.request else []

    @property
    def identity(self) -> tuple[bool, str, str]:
        """What makes it the same request as another one: its idempotency key belongs to its method."""
        return self.is_call, self.method, self.key


class Put(enum.Enum):
    """What happened to a message that was put into a mailbox."""

    TAKEN = "it will be handled"
    FULL = "a bound is reached"
    CLOSED = "the daemon is stopping"


class Mailbox:
    """First in, first out, bounded by ``messages`` and by ``size`` bytes."""

    def __init__(self, messages: int = MESSAGES, size: int = MAILBOX_BYTES) -> None:
        self.messages = messages
        self.size = size
        self._lock = threading.Lock()
        self._queue: deque[Message] = deque()
        self._bytes = 0
        self._closed = False
        self._taker_sleeps = False

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def waiting_bytes(self) -> int:
        """The size of the messages in it."""
        return self._bytes

    def put(self, message: Message, *, bounded: bool = True) -> Put:
        """Append ``message``.  The daemon's own timers are not ``bounded``: it has asked for each of them."""
        with self._lock:
            if self._closed:
                return Put.CLOSED
            if bounded and (len(self._queue) >= self.messages or self._bytes + message.size > self.size):
                return Put.FULL
            self._queue.append(message)
            self._bytes += message.size
            return Put.TAKEN

    def must_wake(self) -> bool:
        """Return whether the taker found nothing and there is something now; true once for each time."""
        with self._lock:
            if not (self._taker_sleeps and self._queue):
                return False
            self._taker_sleeps = False
            return True

    def take(self) -> Message | None:
        """Remove and return the oldest message.  None: :meth:`must_wake` will say when there is one."""
        with self._lock:
            if not self._queue:
                self._taker_sleeps = True
                return None
            message = self._queue.popleft()
            self._bytes -= message.size
            return message

    def cancel(self, request: int) -> Message | None:
        """Remove and return the message of that request, if it waits and nobody else has joined it."""
        with self._lock:
            for message in self._queue:
                if message.request == request and not message.joined:
                    return self._remove(message)
        return None

    def expired(self, now: Boottime) -> list[Message]:
        """Remove and return what nobody waits for any more; looks at every message."""
        with self._lock:
            late = [message for message in self._queue if message.deadline < now]
            if late:
                self._queue = deque(message for message in self._queue if message.deadline >= now)
                self._bytes -= sum(message.size for message in late)
            return late

    def discard(self, message: Message) -> bool:
        """Remove ``message``; returns whether it was still waiting."""
        with self._lock:
            if message not in self._queue:
                return False
            self._remove(message)
            return True

    def _remove(self, message: Message) -> Message:
        self._queue.remove(message)
        self._bytes -= message.size
        return message

    def close(self) -> list[Message]:
        """Take no more messages; returns those that will not be handled."""
        with self._lock:
            self._closed = True
            left = list(self._queue)
            self._queue.clear()
            self._bytes = 0
            return left


@dataclass(frozen=True, slots=True)
class _Answer:
    until: Boottime
    size: int
    frame: messages_pb2.Frame


class Results:
    """Requests with an idempotency key: which are on their way, and what was answered.

    A key belongs to a method.  The memory lives as long as the process: a key that is repeated after a
    restart is executed again.
    """

    def __init__(self, ttl: float = RESULT_TTL, count: int = RESULTS, size: int = RESULT_BYTES) -> None:
        self._ttl = ttl
        self._count = count
        self._size = size
        self._lock = threading.Lock()
        self._running: dict[tuple[bool, str, str], Message] = {}
        self._answers: OrderedDict[tuple[bool, str, str], _Answer] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def seen(self, message: Message, now: Boottime) -> messages_pb2.Frame | bool:
        """Return the answer given before, or True if ``message`` joined one on its way, or False: it is new.

        A new one counts as on its way from here on, until :meth:`answered` or :meth:`forget`.
        """
        key = message.identity
        with self._lock:
            self._expire(now)
            if (answer := self._answers.get(key)) is not None:
                return answer.frame
            if (first := self._running.get(key)) is not None:
                if message.is_call:
                    first.joined += (message.request,)
                first.deadline = max(first.deadline, message.deadline)
                return True
            self._running[key] = message
            return False

    def answered(self, message: Message, frame: messages_pb2.Frame, now: Boottime) -> None:
        """Remember ``frame`` as the answer; after this nobody joins ``message`` any more."""
        key = message.identity
        size = frame.ByteSize() + len(message.method) + len(message.key)
        with self._lock:
            self._running.pop(key, None)
            self._answers[key] = _Answer(now + self._ttl, size, frame)
            self._bytes += size
            self._expire(now)

    def forget(self, message: Message) -> None:
        """``message`` was not executed: its key is new again; after this nobody joins it any more."""
        with self._lock:
            self._running.pop(message.identity, None)

    def _expire(self, now: Boottime) -> None:
        answers = self._answers
        while answers:
            oldest = next(iter(answers.values()))
            if oldest.until > now and len(answers) <= self._count and self._bytes <= self._size:
                return
            answers.popitem(last=False)
            self._bytes -= oldest.size
