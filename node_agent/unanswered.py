"""The requests of one connection that have not been answered: matched, acknowledged, expired.

Pure bookkeeping, no clock and no transport.  Frames are counted in the order in which they are queued, which
is that in which they are written, because a worker acknowledges casts by that count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from registry.clock import Boottime
from registry.v1 import messages_pb2

Reply = Callable[[messages_pb2.Frame], None]


@dataclass(slots=True)
class Request:
    """One of them; ``place`` is its number among the frames of the connection."""

    to: str
    deadline: Boottime
    reply: Reply
    is_cast: bool
    place: int = 0


class Unanswered:
    """Requests by id.  An id is never used twice, not even by the next connection of the same worker."""

    def __init__(self, first_id: int) -> None:
        self.next_id = first_id + 1
        self._requests: dict[int, Request] = {}
        self._casts: dict[int, Request] = {}
        self._queued = 0
        self._written = 0

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        """Count a request that is queued now; its id is ``next_id``."""
        self._queued += 1
        request.place = self._queued
        self._requests[self.next_id] = request
        if request.is_cast:
            self._casts[self.next_id] = request
        self.next_id += 1

    def add_other(self) -> None:
        """Count a frame that is queued now and is no request."""
        self._queued += 1

    def written(self) -> None:
        """Everything that was queued is written now."""
        self._written = self._queued

    def is_written(self, request: Request) -> bool:
        """Return whether the worker may have got it."""
        return request.place <= self._written

    def pop(self, request_id: int) -> Request | None:
        """Remove and return a request; None if it was removed before, or belongs to another connection."""
        request = self._requests.pop(request_id, None)
        if request is not None and request.is_cast:
            self._casts.pop(request_id, None)
        return request

    def accepted(self, place: int) -> Iterator[tuple[int, Request]]:
        """Remove and yield the casts among the first ``place`` frames, of those that were written."""
        place = min(place, self._written)
        while self._casts:
            # They are in the order in which they were queued.
            request_id, request = next(iter(self._casts.items()))
            if request.place > place:
                return
            del self._casts[request_id], self._requests[request_id]
            yield request_id, request

    def expired(self, now: Boottime) -> Iterator[tuple[int, Request]]:
        """Remove and yield the requests whose deadline is not after ``now``."""
        late = [request_id for request_id, request in self._requests.items() if request.deadline <= now]
        for request_id in late:
            if (request := self.pop(request_id)) is not None:
                yield request_id, request

    def next_deadline(self) -> Boottime | None:
        """Return the earliest deadline."""
        return min((request.deadline for request in self._requests.values()), default=None)

    def drain(self) -> Iterator[tuple[int, Request]]:
        """Remove and yield every request."""
        while self._requests:
            request_id = next(iter(self._requests))
            request = self._requests.pop(request_id)
            yield request_id, request
        self._casts.clear()
