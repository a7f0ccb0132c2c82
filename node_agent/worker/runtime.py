"""Runs one behaviour: takes messages out of the mailbox, one at a time, and sends the answers.

Two threads.  The :class:`~node_agent.worker.uplink.Uplink` thread hears the agent: requests go through
:class:`~node_agent.worker.intake.Intake` into the mailbox, system messages are answered there, whatever a
handler does. The main thread's event loop runs init, the handlers and terminate.  Before each handler the
runtime asks whether the request is still wanted and whether this process may still act; while too many
answers wait for the agent to read them, no handler is begun.

The life of it (:class:`Phase`):

    STARTING ──init() returned──▶ SERVING ──Stop or SIGTERM──▶ STOPPING ──terminate() returned──▶ ended
        └────────────── an exception that is not Reject, in any phase ─────────────▶ ended (crashed)
"""

from __future__ import annotations

import asyncio
import enum
import functools
import inspect
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, NoReturn

from node_agent.behaviours.interface import Interface, did_you_mean, to_json
from node_agent.behaviours.server import Context, Reject, Server
from node_agent.restarts import SUPERSEDED_CODE
from node_agent.warden.protocol import Start
from node_agent.worker.answers import Answers, Identity
from node_agent.worker.intake import Intake
from node_agent.worker.mailbox import Mailbox, Message, Results
from node_agent.worker.own_timer import OwnTimer
from node_agent.worker.stalls import Stalls
from node_agent.worker.uplink import Uplink
from registry.clock import SYSTEM_CLOCK, Boottime
from registry.errors import (
    CallInFence,
    Fenced,
    HerdError,
    NoOwner,
    NoSuchMethod,
    Overloaded,
    UnknownOutcome,
)
from registry.v1 import messages_pb2, worker_pb2

if TYPE_CHECKING:
    from node_agent.postgres.backend import Databases

EXIT_STOPPED = 0
EXIT_CRASHED = 1
EXIT_SUPERSEDED = SUPERSEDED_CODE

FAREWELL = 1.0
"""Seconds to tell the agent the last things before the process exits."""

TURN = 0.005
"""Seconds of handling messages after which the loop gets a turn, however many wait."""

BUSY_TICK = 0.05
"""Seconds between two looks at a running handler, and until an answer goes out that the loop still holds."""

IDLE_TICK = 1.0
"""Seconds between two looks at a daemon that does nothing."""

log = logging.getLogger("pgherd.worker")


class Phase(enum.Enum):
    """Where a worker stands; see the module's documentation."""

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"


class Runtime:
    """The engine of one behaviour in this process."""

    def __init__(self, start: Start, interface: Interface, args: Any) -> None:
        """Called on the main thread with its loop running."""
        self._start = start
        self._interface = interface
        self._phase = Phase.STARTING
        self._may_act_until: Boottime = float("inf")
        self._loop = asyncio.get_running_loop()
        self._identity = Identity(start.name or start.child, start.epoch, start.start)
        self._context = Context(
            name=self._identity.name,
            epoch=start.epoch,
            start=start.start,
            node=start.node,
            host=start.host,
            args=args,
            engine=self,
        )
        self._mailbox = Mailbox()
        results = Results()
        self._intake = Intake(self._identity, interface, self._mailbox, results)
        self._uplink = Uplink(start.socket, start.worker, self._hear, self._tick)
        self._answers = Answers(self._identity, results, self._uplink.post, self._loop.call_soon)
        self._stalls = Stalls(threading.get_ident(), self._loop.call_soon_threadsafe, log.warning)
        self._behaviour: Server
        self._init: asyncio.Task[None] | None = None
        self._something: asyncio.Future[None] | None = None
        self._pausing = False
        self._running: Message | None = None
        self._running_since: Boottime | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._databases: Databases | None = None

    async def run(self, behaviour: type[Server]) -> int:
        """Live from init to the end; returns the exit code."""
        self._loop.add_signal_handler(signal.SIGTERM, self._stop)
        self._uplink.start(self._interface.describe())
        try:
            self._behaviour = behaviour(self._context)
            if await self._initialise():
                await self._serve()
                await self._behaviour.terminate("shutdown")
            if self._databases is not None:
                await self._databases.close()
        except BaseException as error:  # noqa: BLE001 - let it crash: whatever it is ends the process
            return self._crash(error)
        self._answers.flush()
        self._uplink.close(FAREWELL)
        return EXIT_STOPPED

    async def _initialise(self) -> bool:
        """Run init(); returns False if a stop came first."""
        self._init = self._loop.create_task(self._behaviour.init())
        try:
            await self._init
        except asyncio.CancelledError:
            if self._phase is not Phase.STOPPING:
                raise
            return False
        if self._phase is not Phase.STOPPING:
            self._phase = Phase.SERVING
            self._uplink.ready()
        return True

    # Handling messages.

    async def _serve(self) -> None:
        turn_ends = SYSTEM_CLOCK.now() + TURN
        while self._phase is not Phase.STOPPING:
            now = SYSTEM_CLOCK.now()
            if now > turn_ends:
                await asyncio.sleep(0)
                turn_ends = SYSTEM_CLOCK.now() + TURN
                continue
            if self._uplink.clogged:
                await self._until_answers_leave()
                continue
            message = self._mailbox.take()
            if message is None:
                # Now, not in the loop's next turn: somebody waits for it.
                self._answers.flush()
                self._something = self._loop.create_future()
                await self._something
                turn_ends = SYSTEM_CLOCK.now() + TURN
                continue
            refusal = self._too_late(message, now)
            if refusal is None:
                self._running, self._running_since = message, now
                await self._handle(message)
                self._running = self._running_since = None
            else:
                self._skip(message, refusal)

    async def _until_answers_leave(self) -> None:
        """Return when the agent has read, or another one has come: a handler makes one more answer.

        What comes meanwhile fills the mailbox, and a full mailbox refuses.
        """
        self._something = self._loop.create_future()
        self._pausing = True
        # The uplink's thread wakes us when it finds this set; what it wrote just before, it has not.
        if self._uplink.clogged:
            await self._something
        self._pausing = False

    def _skip(self, message: Message, why: HerdError) -> None:
        if message.postpone is not None:
            message.postpone()
            return
        if not message.is_call:
            log.warning("%s drops the cast %s: %s", self._identity.name, message.method, why)
        self._answers.failed(message, why)

    def _too_late(self, message: Message, now: Boottime) -> HerdError | None:
        """Return why ``message`` must not be handled any more, if so."""
        if now > self._may_act_until:
            late = now - self._may_act_until
            return Fenced(f"{self._identity.name} may not act since {late:.3f} s: its host lost the lease")
        if now > message.deadline:
            late = now - message.deadline
            return Overloaded(f"{message.method}: the deadline passed {late:.3f} s before it started")
        return None

    async def _handle(self, message: Message) -> None:
        """Run the handler of ``message`` and answer; any exception but Reject is left to the caller."""
        method = self._interface.methods.get(message.method)
        try:
            if method is None or method.kind != ("call" if message.is_call else "cast"):
                catch_all = self._interface.handle_call if message.is_call else self._interface.handle_cast
                assert catch_all is not None
                result = await catch_all(self._behaviour, message)
            elif method.is_async:
                result = await method.function(self._behaviour, **message.arguments)
            else:
                result = await self._in_thread(method.function, message.arguments)
        except Reject as reject:
            if not message.is_call:
                log.warning("%s rejected the cast %s: %s", self._identity.name, message.method, reject)
            self._answers.rejected(message, reject.reason, reject.details)
        else:
            self._answers.done(message, result)

    async def _in_thread(self, function: Any, arguments: dict[str, Any]) -> Any:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="pgherd-handler")
        work = functools.partial(function, self._behaviour, **arguments)
        return await self._loop.run_in_executor(self._executor, work)

    # The ends.

    def _stop(self) -> None:
        """Finish the running handler, refuse the rest."""
        if self._phase is Phase.STOPPING:
            return
        if self._phase is Phase.STARTING and self._init is not None:
            self._init.cancel()
        self._phase = Phase.STOPPING
        for message in self._mailbox.close():
            self._answers.failed(message, NoOwner(f"{self._identity.name} is stopping"))
        self._wake()

    def _crash(self, error: BaseException) -> int:
        """Tell callers and agent what is known, and return the exit code."""
        superseded = isinstance(error, Fenced) and not isinstance(error, CallInFence)
        where = f"{self._running.method}" if self._running is not None else "init"
        if self._phase is Phase.STOPPING and self._running is None:
            where = "terminate"
        text = str(error).splitlines()[0] if str(error) else ""
        why = f"{where}: {type(error).__name__}{': ' if text else ''}{text}"
        for message in self._mailbox.close():
            self._answers.failed(
                message, NoOwner(f"{self._identity.name} crashed before {message.method} started")
            )
        if self._running is not None:
            self._answers.failed(self._running, UnknownOutcome(f"{self._identity.name} crashed in {why}"))
        self._answers.flush()
        details = "".join(traceback.format_exception(error))
        log.error("%s ends, %s", self._identity.name, details)
        self._uplink.crashed(f"superseded: {why}" if superseded else why, details)
        self._uplink.close(FAREWELL)
        return EXIT_SUPERSEDED if superseded else EXIT_CRASHED

    # On the uplink's thread.

    def _hear(self, message: worker_pb2.AgentMessage) -> Sequence[messages_pb2.Frame] | None:
        what = message.WhichOneof("is")
        if what == "batch":
            return self._take(message.batch.frames)
        if what == "deadline":
            self._may_act_until = message.deadline.boottime
        elif what == "stop":
            self._loop.call_soon_threadsafe(self._stop)
        elif what == "attached" and message.attached.refused:
            # A process that its agent does not know may have been replaced: it must not touch anything again.
            log.error(
                "%s ends: the agent does not want it: %s", self._identity.name, message.attached.refused
            )
            leave(EXIT_SUPERSEDED)
        return None

    def _take(self, frames: Sequence[messages_pb2.Frame]) -> list[messages_pb2.Frame] | None:
        now = SYSTEM_CLOCK.now()
        take = self._intake.take
        answers: list[messages_pb2.Frame] = []
        only_calls = True
        for frame in frames:
            kind = frame.kind
            only_calls = only_calls and kind == messages_pb2.KIND_CALL
            answer = self._system(frame) if kind == messages_pb2.KIND_SYSTEM else take(frame, now)
            if answer is not None:
                answers.append(answer)
        if self._mailbox.must_wake():
            self._loop.call_soon_threadsafe(self._wake)
        # A call's answer says that it was accepted; only a cast waits for the acknowledgement.
        return None if only_calls and not answers else answers

    def _system(self, frame: messages_pb2.Frame) -> messages_pb2.Frame:
        if frame.method == "ping":
            result: object = self._stats()
        elif frame.method == "methods":
            result = [
                {"name": m.name, "kind": m.kind, "signature": m.signature, "description": m.description}
                for m in self._interface.methods.values()
            ]
        else:
            hint = did_you_mean(frame.method, ("ping", "methods"))
            error = NoSuchMethod(f'no system message is named "{frame.method}"', hint=hint)
            return self._identity.failed(frame.id, error)
        return self._identity.answered(frame.id, to_json(frame.method, result))

    def _stats(self) -> dict[str, object]:
        running, since = self._running, self._running_since
        return {
            "state": self._phase.value,
            "pid": os.getpid(),
            "queued": len(self._mailbox),
            "queued_bytes": self._mailbox.waiting_bytes,
            "handling": running.method if running is not None else None,
            "handling_seconds": SYSTEM_CLOCK.now() - since if since is not None else None,
        }

    def _tick(self) -> float:
        since, running = self._running_since, self._running
        now = SYSTEM_CLOCK.now()
        if self._pausing and not self._uplink.clogged:
            self._loop.call_soon_threadsafe(self._wake)
        if since is not None and running is not None and now - since > BUSY_TICK:
            self._answers.flush()
            for late in self._mailbox.expired(now):
                why = f"{late.method}: its time is over, and {running.method} runs for {now - since:.3f} s"
                self._answers.refused(late, Overloaded(why, details={"name": self._identity.name}))
        self._stalls.look(now, since, f"{self._identity.name}: {running.method if running else 'the daemon'}")
        return BUSY_TICK if since is not None or len(self._mailbox) else IDLE_TICK

    # What a behaviour asks for.

    def _wake(self) -> None:
        if self._something is not None and not self._something.done():
            self._something.set_result(None)

    def send_after(self, delay: float, method: str, arguments: dict[str, Any]) -> OwnTimer:
        """Deliver a message to the daemon itself; see :class:`node_agent.behaviours.server.Server`."""
        offered = self._interface.methods.get(method)
        if offered is None:
            hint = did_you_mean(method, self._interface.methods)
            raise ValueError(f'{self._identity.name} has no method "{method}" to send itself; {hint}')
        inspect.signature(offered.function).bind(self._behaviour, **arguments)
        message = Message(method, offered.kind == "call", arguments, float("inf"))
        return OwnTimer(self._loop, self._mailbox, delay, message, self._wake)

    def backend(self, database: str, *, read_only: bool) -> AbstractAsyncContextManager[Any]:
        """Open a fenced transaction; see :meth:`node_agent.behaviours.server.Server.backend`."""
        start = self._start
        if database not in start.databases:
            known = did_you_mean(database, start.databases) or "its spec names no database"
            raise LookupError(f'{self._identity.name} has no database "{database}": {known}')
        if self._databases is None:
            # Only here: a worker without a database needs no driver.
            from node_agent.postgres.backend import Databases

            self._databases = Databases(start.databases, self._identity.name, start.epoch, start.start)
        return self._databases.backend(database, read_only=read_only)


def leave(code: int) -> NoReturn:
    """End the process without what its parent has registered to run at its own exit."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
