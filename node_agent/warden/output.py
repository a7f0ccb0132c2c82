"""What the workers write: the read ends of their pipes, and the last part of it.

The warden holds these pipes so that workers survive their agent: a pipe without a reader is a SIGPIPE.  It
reads a bounded amount a turn, so a child that floods its output cannot delay a deadline, and keeps a bounded
tail per child, over all its processes.
"""

from __future__ import annotations

import contextlib
import os
import selectors
from collections.abc import Callable
from dataclasses import dataclass, field

from node_agent.warden.protocol import OutputPart

KEPT = 1 << 20
READ_A_TURN = 64 * 1024
_READ_AT_LEAST = 4096
_PART = 64 * 1024


@dataclass(slots=True)
class _Tail:
    data: bytearray = field(default_factory=bytearray)
    written: int = 0
    followed: bool = False
    unsent: int = 0

    def append(self, piece: bytes) -> None:
        self.data += piece
        self.written += len(piece)
        if len(self.data) > KEPT:
            del self.data[: len(self.data) - KEPT]


class Outputs:
    """All pipes and tails.  ``tell`` sends a message; ``busy`` says that a follower's message must wait."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        tell: Callable[[OutputPart], None],
        busy: Callable[[], bool],
    ) -> None:
        self._selector = selector
        self._tell = tell
        self._busy = busy
        self._tails: dict[str, _Tail] = {}
        self._share = READ_A_TURN

    def divide(self, ready: int) -> None:
        """Share this turn's reading among ``ready`` pipes."""
        self._share = max(READ_A_TURN // max(ready, 1), _READ_AT_LEAST)

    def attach(self, fd: int, child: str) -> None:
        """Read ``fd`` from now on."""
        os.set_blocking(fd, False)
        self._tails.setdefault(child, _Tail())
        self._selector.register(fd, selectors.EVENT_READ, lambda: self._read(fd, child))

    def detach(self, fd: int, child: str) -> None:
        """Read what is left in ``fd``, whose writers are dead, and close it."""
        if fd not in self._selector.get_map():
            return
        self._share = KEPT
        self._read(fd, child)
        if fd in self._selector.get_map():
            self._close(fd)

    def drop(self, child: str) -> None:
        """Forget what ``child`` wrote."""
        self._tails.pop(child, None)

    def follow(self, child: str, on: bool) -> None:
        """Send what ``child`` writes as it comes, or stop doing so."""
        tail = self._tails.setdefault(child, _Tail()) if on else self._tails.get(child)
        if tail is not None:
            tail.followed, tail.unsent = on, 0

    def unfollow_all(self) -> None:
        """There is nobody to send anything to."""
        for tail in self._tails.values():
            tail.followed = False

    def answer(self, request: int, child: str, limit: int) -> None:
        """Send the last ``limit`` bytes of ``child``, in parts."""
        tail = self._tails.get(child, _Tail())
        data = bytes(tail.data[max(len(tail.data) - limit, 0) :])
        dropped = tail.written - len(data)
        parts = [data[at : at + _PART] for at in range(0, len(data), _PART)] or [b""]
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            self._tell(OutputPart(request=request, child=child, data=part, dropped=dropped, last=last))

    def _read(self, fd: int, child: str) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(fd, self._share)
            if data:
                self._take(child, data)
            else:
                self._close(fd)

    def _take(self, child: str, data: bytes) -> None:
        tail = self._tails.setdefault(child, _Tail())
        tail.append(data)
        if not tail.followed:
            return
        if self._busy():
            tail.unsent += len(data)
            return
        for at in range(0, len(data), _PART):
            part = data[at : at + _PART]
            self._tell(OutputPart(request=0, child=child, data=part, dropped=tail.unsent, last=False))
            tail.unsent = 0

    def _close(self, fd: int) -> None:
        self._selector.unregister(fd)
        os.close(fd)
