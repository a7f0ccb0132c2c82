"""Notices a handler that holds the event loop, and shows where.

While the loop is held, timers, other tasks and the answers that wait in it stand still; the rest of the
runtime goes on, on its own thread, from which :meth:`Stalls.look` is called.  A handler that awaits holds
nothing: what is measured is whether the loop still turns.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from registry.clock import Boottime

PROBE_AFTER = 0.5
"""Seconds a handler may run before the loop is asked for a sign of life, and between two such questions."""

HELD_TOO_LONG = 1.0
"""Seconds without a sign of life that are reported."""


class Stalls:
    """Watches the loop of ``thread`` (its ident); ``ask(answer)`` makes that loop call ``answer``."""

    def __init__(
        self, thread: int, ask: Callable[[Callable[[], None]], object], report: Callable[[str], None]
    ) -> None:
        self._thread = thread
        self._ask = ask
        self._report = report
        self._asked: Boottime | None = None
        self._answered: Boottime = 0.0
        self._reported = False

    def look(self, now: Boottime, running_since: Boottime | None, what: str) -> None:
        """Ask or report, as is due; ``running_since`` is when the handler of ``what`` began, if one runs."""
        if self._asked is not None:
            if now - self._asked > HELD_TOO_LONG and not self._reported:
                self._reported = True
                self._report(f"{what} holds the event loop for {now - self._asked:.1f} s:\n{self._stack()}")
        elif running_since is not None and now - max(running_since, self._answered) > PROBE_AFTER:
            self._asked = now
            self._ask(lambda: self._answer(now))

    def _answer(self, asked: Boottime) -> None:
        self._answered = asked
        self._reported = False
        self._asked = None

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._thread)
        return "".join(traceback.format_stack(frame)) if frame is not None else "(no stack)\n"
