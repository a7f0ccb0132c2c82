"""A handler that holds the event loop is noticed; one that waits is not."""

from __future__ import annotations

import threading
from collections.abc import Callable

from node_agent.worker.stalls import Stalls


class Loop:
    """A loop that turns when it is told to."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], None]] = []
        self.reports: list[str] = []
        self.stalls = Stalls(threading.get_ident(), self.asked.append, self.reports.append)

    def turn(self) -> None:
        while self.asked:
            self.asked.pop()()


def test_a_quick_handler_is_not_asked_about() -> None:
    loop = Loop()
    loop.stalls.look(10.0, None, "work")
    loop.stalls.look(10.4, 10.0, "work")
    assert (loop.asked, loop.reports) == ([], [])


def test_a_handler_that_lets_the_loop_turn_is_not_reported() -> None:
    loop = Loop()
    for now in (10.6, 12.0, 13.0, 14.0):
        loop.stalls.look(now, 10.0, "work")
        loop.turn()
    assert loop.reports == []


def test_a_handler_that_holds_the_loop_is_reported_once_with_its_stack() -> None:
    loop = Loop()
    for now in (10.6, 11.5, 11.7, 12.0, 13.0):
        loop.stalls.look(now, 10.0, "sweeper: work")
    [report] = loop.reports
    assert report.startswith("sweeper: work holds the event loop for 1.1 s:\n")
    assert "test_a_handler_that_holds_the_loop" in report


def test_the_next_one_is_reported_again() -> None:
    loop = Loop()
    for since in (10.0, 20.0):
        loop.stalls.look(since + 0.6, since, "work")
        loop.stalls.look(since + 2.0, since, "work")
        loop.turn()
    assert len(loop.reports) == 2
