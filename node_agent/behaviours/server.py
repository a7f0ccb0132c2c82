"""``Server``: a daemon that answers calls and handles casts one at a time, as OTP's gen_server does.

    class Counter(Server):
        @dataclass(frozen=True)
        class Args:
            first: int = 0

        args: Args

        async def init(self) -> None:
            self.count = self.args.first

        @call
        async def add(self, by: int = 1) -> int:
            "Add to the counter and return it."
            if by < 0:
                raise Reject("a counter only goes up", by=by)
            self.count += by
            return self.count

Messages are handled in the order of their arrival, each to its end before the next begins.  A handler that
raises :class:`Reject` answers no; any other exception ends the process, and its
supervisor decides what follows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from node_agent.behaviours.interface import MARK, Interface
from registry.units import parse_duration

_Handler = TypeVar("_Handler", bound=Callable[..., Any])


def call(handler: _Handler) -> _Handler:
    """Offer a method as a call: whoever asks waits for what it returns.

    Its arguments come by name and are checked against its annotations before it runs; the first line of its
    docstring is its description.  With the one argument ``data: bytes``, or a result that is bytes, the body
    is passed as it is instead of as JSON.  A plain ``def`` runs in a thread, so it may block; an ``async
    def`` must not.
    """
    setattr(handler, MARK, "call")
    return handler


def cast(handler: _Handler) -> _Handler:
    """Offer a method as a cast: whoever sends it only learns that it will be handled."""
    setattr(handler, MARK, "cast")
    return handler


class Reject(Exception):
    """Raised by a handler to answer no: the caller gets DAEMON_ERROR with this reason and these details."""

    def __init__(self, reason: str, **details: object) -> None:
        super().__init__(reason)
        self.reason = reason
        self.details = {name: str(value) for name, value in details.items()}


class Timer(Protocol):
    """A message to oneself that is on its way."""

    def cancel(self) -> bool:
        """Take it back; False if it has been handled, or is being handled."""


class Engine(Protocol):
    """What runs a behaviour and serves it."""

    def send_after(self, delay: float, method: str, arguments: dict[str, Any]) -> Timer:
        """Deliver a cast to the daemon itself after ``delay`` seconds."""

    def backend(self, database: str, *, read_only: bool) -> AbstractAsyncContextManager[Any]:
        """Open a fenced transaction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a daemon knows about itself; made by the engine."""

    name: str
    epoch: int
    start: int
    node: str
    host: str
    args: Any
    engine: Engine


class Server:
    """Base of daemons that handle calls and casts; see the module's documentation for the shape of one.

    Set before :meth:`init` runs: ``name`` (the global name, or the id of a node-local child), ``epoch``
    (larger than that of every earlier owner of the name; 0 without a global name), ``start`` (which process
    of that epoch, from 1), ``node``, ``host``, ``args`` (an instance of the nested dataclass ``Args`` if
    there is one, else a dict) and ``log``.

    A daemon may define ``async def handle_call(self, event)`` and ``async def handle_cast(self, event)`` for
    methods that it does not declare; ``event`` is a :class:`node_agent.worker.mailbox.Message`.  Without
    them such a request is refused with NO_SUCH_METHOD.
    """

    name: str
    epoch: int
    start: int
    node: str
    host: str
    args: Any
    log: logging.LoggerAdapter[logging.Logger]

    def __init__(self, context: Context) -> None:
        self.name = context.name
        self.epoch = context.epoch
        self.start = context.start
        self.node = context.node
        self.host = context.host
        self.args = context.args
        self.log = _Log(logging.getLogger(f"pgherd.{context.name}"), {"name": self.name, "epoch": self.epoch})
        self._engine = context.engine

    @classmethod
    def interface(cls) -> Interface:
        """Return what this class offers.  Raises :class:`node_agent.behaviours.interface.BadBehaviour`."""
        return Interface(cls, Server)

    async def init(self) -> None:
        """Prepare; the daemon is *starting* until this returns; an exception means that it cannot start."""

    async def terminate(self, reason: str) -> None:
        """Clean up; called on an orderly stop (``reason`` is "shutdown"), never after a crash."""

    def backend(self, database: str, *, read_only: bool = False) -> AbstractAsyncContextManager[Any]:
        """Open a transaction in ``database`` that commits only while this process is the owner of its name.

        ``database`` is a name in the agent's configuration that the spec lists under ``fence`` or
        ``placement.databases``; another one raises LookupError.
        """
        return self._engine.backend(database, read_only=read_only)

    def send_after(self, delay: float | timedelta | str, method: str, /, **arguments: Any) -> Timer:
        """Handle ``method`` after ``delay`` (seconds, or "60s"), through the mailbox like any message.

        Its result is dropped.  Raises ValueError for an unknown method, TypeError for wrong arguments.
        """
        if isinstance(delay, str):
            delay = parse_duration(delay)
        elif isinstance(delay, timedelta):
            delay = delay.total_seconds()
        return self._engine.send_after(delay, method, arguments)


class _Log(logging.LoggerAdapter[logging.Logger]):
    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[object, MutableMapping[str, Any]]:
        own = dict(self.extra or {})
        kwargs["extra"] = {f"herd_{key}": value for key, value in own.items()} | kwargs.get("extra", {})
        return f"{own['name']} epoch {own['epoch']}: {msg}", kwargs
