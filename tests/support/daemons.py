"""Behaviours that tests run."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from node_agent.behaviours import Reject, Server, Timer, call, cast
from node_agent.worker.mailbox import Message
from registry.errors import Fenced


def wait_at(gate: str) -> str:
    """Return when the test lets one pass."""
    descriptor = os.open(gate, os.O_RDONLY)
    try:
        os.read(descriptor, 1)
    finally:
        os.close(descriptor)
    return "let go"


@dataclass(frozen=True)
class Order:
    """An argument with a shape of its own."""

    item: str
    count: int = 1
    at: datetime | None = None


@dataclass(frozen=True)
class Picky:
    """An argument whose type fails in its own way."""

    value: int

    def __post_init__(self) -> None:
        raise KeyError(self.value)


class Probe(Server):
    """Does whatever a test asks for."""

    @dataclass(frozen=True)
    class Args:
        """Its arguments."""

        journal: str = ""
        gate: str = ""
        names: list[str] = field(default_factory=list)

    args: Args

    async def init(self) -> None:
        self.seen: list[str] = []
        self.timer: Timer | None = None

    async def terminate(self, reason: str) -> None:
        self.note(f"terminate {reason}")

    def note(self, line: str) -> None:
        if self.args.journal:
            with Path(self.args.journal).open("a") as journal:
                journal.write(line + "\n")

    @call
    async def who(self) -> dict[str, object]:
        """Say who it is."""
        return {
            "name": self.name,
            "epoch": self.epoch,
            "start": self.start,
            "node": self.node,
            "host": self.host,
            "pid": os.getpid(),
            "names": self.args.names,
        }

    @call
    async def echo(self, value: Any = None) -> Any:
        return value

    @call
    async def raw(self, data: bytes) -> bytes:
        """Return the bytes backwards."""
        return data[::-1]

    @call
    async def order(self, order: Order, urgent: bool = False) -> Order:
        """Take an order.

        More text that is no description.
        """
        return order

    @cast
    async def remember(self, what: str) -> None:
        self.seen.append(what)
        self.note(f"remember {what}")

    @call
    async def remembered(self) -> list[str]:
        return self.seen

    @call
    async def refuse(self) -> None:
        raise Reject("not today", day="monday", limit=3)

    @call
    async def crash(self, what: str = "broken") -> None:
        raise RuntimeError(what)

    @call
    async def superseded(self) -> None:
        raise Fenced("a newer owner has epoch 8")

    @call
    async def hold(self) -> str:
        """Wait at the gate, without holding the loop."""
        return await asyncio.to_thread(wait_at, self.args.gate)

    @cast
    async def hold_in_cast(self) -> None:
        await asyncio.to_thread(wait_at, self.args.gate)

    @call
    def block_thread(self) -> str:
        return wait_at(self.args.gate)

    @call
    async def block_loop(self) -> str:
        """Wait at the gate, and hold the loop."""
        return wait_at(self.args.gate)

    @call
    async def large(self, size: int) -> bytes:
        return bytes(size)

    @call
    async def unspeakable(self) -> object:
        return object()

    @call
    async def count(self) -> int:
        """Count how often it was executed."""
        self.seen.append("count")
        return len(self.seen)

    @call
    async def later(self, delay: float, what: str) -> None:
        self.timer = self.send_after(delay, "remember", what=what)

    @call
    async def never_mind(self) -> bool:
        assert self.timer is not None
        return self.timer.cancel()

    @call
    async def picky(self, thing: Picky) -> None: ...

    @call
    async def wrong_timer(self) -> None:
        self.send_after("1s", "rember")

    @call
    async def open_database(self, database: str) -> None:
        async with self.backend(database):
            pass


class CatchAll(Server):
    """Handles what it does not declare."""

    async def init(self) -> None:
        self.casts: list[str] = []

    @call
    async def declared(self) -> str:
        return "declared"

    async def handle_call(self, event: Message) -> object:
        return {
            "method": event.method,
            "arguments": repr(event.arguments),
            "sender": event.sender,
            "casts": self.casts,
        }

    async def handle_cast(self, event: Message) -> None:
        self.casts.append(event.method)


class NeverReady(Server):
    """Waits in init for ever."""

    async def init(self) -> None:
        await asyncio.Event().wait()


class BrokenInit(Server):
    """Cannot be initialised."""

    async def init(self) -> None:
        raise LookupError("no such queue")
