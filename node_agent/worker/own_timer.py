"""A message that a daemon sends to itself after a while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from node_agent.worker.mailbox import Mailbox, Message, Put

POSTPONED = 0.1
"""Seconds until a timer is tried again that came while the daemon may not act."""

log = logging.getLogger("pgherd.worker")


class OwnTimer:
    """A message of the daemon to itself; see :class:`node_agent.behaviours.server.Timer`.

    It is not dropped while the daemon may not act, but tried again: nobody else would repeat it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        mailbox: Mailbox,
        delay: float,
        message: Message,
        wake: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._mailbox = mailbox
        self._message = message
        self._wake = wake
        self._handle: asyncio.TimerHandle | None = loop.call_later(max(0.0, delay), self._fire)
        self._postponed = False
        message.postpone = self._postpone

    def _postpone(self) -> None:
        if not self._postponed:
            self._postponed = True
            log.warning("the timer for %s waits: this process may not act now", self._message.method)
        self._handle = self._loop.call_later(POSTPONED, self._fire)

    def _fire(self) -> None:
        self._handle = None
        if self._mailbox.put(self._message, bounded=False) is Put.TAKEN and self._mailbox.must_wake():
            self._wake()

    def cancel(self) -> bool:
        """Take the message back; False if it has been handled, or is being handled."""
        if self._handle is None:
            return self._mailbox.discard(self._message)
        self._handle.cancel()
        self._handle = None
        return True
