"""The life of one supervised child on this host, from its first fence to its last exit.

One :class:`Child` is one task.  It asks for nothing but its spec, an optional :class:`Ownership`, and the
warden; it is told what happens by messages in its inbox, and it ends when the child is not to run here any
more.  Whether a process is started again is decided by :mod:`node_agent.restarts`; who may own a name is
decided elsewhere (:mod:`node_agent.claims`), so a child that gives up only says so.

Order is everything: a fence is raised before the process starts, and the next process starts only after the
warden has said that everything of the one before is gone.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from node_agent import inbox
from node_agent.attachment import Attachment
from node_agent.fencing import raise_once
from node_agent.postgres.fence import FenceRaiser
from node_agent.restarts import (
    SUPERSEDED_CODE,
    Again,
    Exit,
    Finished,
    GiveUp,
    RestartWindow,
    classify,
    decide,
    signal_name,
)
from node_agent.spec.child import Behaviour, ChildSpec, Command, StopStage
from node_agent.start_request import Place, start_request
from node_agent.states import TRANSITIONS, Ownership, Process, State
from node_agent.warden import protocol
from node_agent.warden_link import WardenLink
from registry import events
from registry.clock import Boottime, Clock
from registry.errors import Fenced

FENCE_RETRY = (0.2, 5.0)
"""First and longest pause between such attempts, in seconds."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """How one process ended: what restarts.py wants to know, and the words for people."""

    exit: Exit
    why: str
    healthy_for: float = 0.0


class Host(Place, Protocol):
    """What a child needs of the agent around it."""

    link: WardenLink
    fences: FenceRaiser
    clock: Clock

    def emit(self, event: events.Event) -> None:
        """Tell what happened."""

    def last_start(self, key: str, epoch: int) -> int:
        """Return how many processes the warden has counted for this child and epoch."""

    def started(self, child: Child, start: int) -> None:
        """Remember the warden's count."""

    def may_act_until(self) -> Boottime:
        """Return when workers with a name have to stop acting, unless the lease is renewed."""

    async def still_owns(self, child: Child) -> bool:
        """Return whether etcd, read linearizably, has the child's epoch as the owner of its name."""

    def note(self, child: Child, window: RestartWindow) -> None:
        """Have the warden keep what the next agent needs to adopt the child."""


class Child:
    """One child and the task that runs it.

    ``key`` is the global name, or the id of a node-local child.  ``on_change`` is called after every change
    of state, process or connection, in the same turn of the loop.
    """

    def __init__(
        self,
        spec: ChildSpec,
        host: Host,
        *,
        ownership: Ownership | None,
        window: RestartWindow | None = None,
        adopt: Process | None = None,
        on_change: Callable[[Child], None],
    ) -> None:
        self.spec = spec
        self.key = spec.name or spec.id
        self.ownership = ownership
        self.state = State.ADOPTING if adopt else State.FENCING
        self.since = time.time()
        self.process = adopt
        self.restarts = 0
        self.last_exit = ""
        self.obstacle = ""
        self.attachment: Attachment | None = None
        self.done = asyncio.Event()
        self._host = host
        self._window = window or RestartWindow(spec.intensity, spec.period)
        self._inbox: asyncio.Queue[inbox.Message] = asyncio.Queue()
        self._on_change = on_change
        self._says_ready = False
        self._crash = ""
        self._next_start: Boottime = 0.0

    def __repr__(self) -> str:
        return f"<Child {self.key} {self.state.value} pid={self.pid} token={self.epoch}.{self.start}>"

    @property
    def epoch(self) -> int:
        """The epoch it runs at; 0 for a node-local child."""
        return self.ownership.epoch if self.ownership else 0

    @property
    def start(self) -> int:
        """The number of the running process, 0 when none runs."""
        return self.process.start if self.process else 0

    @property
    def pid(self) -> int:
        """The running process on this host, 0 when none runs."""
        return self.process.pid if self.process else 0

    @property
    def host(self) -> str:
        """The host it is on."""
        return self._host.host

    @property
    def waits(self) -> float:
        """Seconds until its next start while it waits for one, else 0."""
        return max(self._next_start - self._host.clock.now(), 0.0) if self.state is State.BACKOFF else 0.0

    # What others tell it.

    def stop(self, why: str, *, again: bool = False) -> None:
        """Run the stop stages; with ``again`` start a new process afterwards."""
        self._inbox.put_nowait(inbox.Stop(why, again=again))

    def change(self, spec: ChildSpec, why: str) -> None:
        """Go on with another spec: stop, then start."""
        self.spec = spec
        self._window = RestartWindow(spec.intensity, spec.period)
        self.stop(why, again=True)

    def kill(self, why: str) -> None:
        """SIGKILL at once: it is not ours to run any more."""
        if self.process:
            self._host.link.kill(self.process.worker)
        self._inbox.put_nowait(inbox.Stop(why, kill=True))

    def confirm(self) -> None:
        """An adopted process is ours."""
        self._inbox.put_nowait(inbox.Confirmed())

    def exited(self, how: protocol.Exited) -> None:
        """The warden has reaped its process."""
        self._inbox.put_nowait(inbox.Exited(how))

    def gone(self, worker: str) -> None:
        """Nothing of its process is left."""
        self._inbox.put_nowait(inbox.Gone(worker))

    def attached(self, attachment: Attachment) -> None:
        """Its process is connected."""
        attachment.epoch, attachment.start = self.epoch, self.start
        self.attachment = attachment
        if self.ownership is not None:
            self.extend(self._host.may_act_until())

    def extend(self, until: Boottime) -> None:
        """Tell its process until when it may act for its name."""
        if self.attachment is not None:
            self.attachment.set_deadline(until)

    def ready(self, worker: str) -> None:
        """Its process says that it serves."""
        self._inbox.put_nowait(inbox.Ready(worker))

    def crashed(self, worker: str, why: str) -> None:
        """Its process says why it is about to exit."""
        self._inbox.put_nowait(inbox.Crashed(worker, why))

    def detached(self, attachment: Attachment | None) -> None:
        """A connection of its process ended; the process may live, and may have another one already."""
        if self.attachment is attachment:
            self.attachment = None

    # The life itself.

    async def run(self) -> State:
        """Live until an end state; returns it."""
        end = await self._live(self.process, adopted=True) if self.process else await self._next_process()
        try:
            while await self._goes_on_after(end):
                end = await self._next_process()
            return self.state
        finally:
            self.done.set()

    def _enter(self, state: State) -> None:
        if state is not self.state:
            assert state in TRANSITIONS[self.state], f"{self.key}: {self.state} to {state}"
            self.state = state
            self.since = time.time()
            self._on_change(self)

    async def _next_process(self) -> _Ended | inbox.Stop:
        self.obstacle = ""
        self._enter(State.FENCING)
        start = self._host.last_start(self.key, self.epoch) + 1
        for database in self.spec.fence:
            if (end := await self._fence(database, start)) is not None:
                return end
        if (stop := self._asked_to_stop()) is not None:
            return stop
        self._enter(State.STARTING)
        self._says_ready, self._crash = False, ""
        request = start_request(self.spec, self.ownership, start, self._host)
        # Known before it exists: the process may attach before the warden's answer is read.
        self.process = Process(request.worker, 0, start, self._host.clock.now())
        answer = await self._host.link.start(request)
        if isinstance(answer, protocol.StartFailed):
            self.process = self.attachment = None
            self._host.emit(events.WorkerStartFailed(name=self.key, why=answer.why))
            self.last_exit = f"not started: {answer.why}"
            return _Ended(Exit.START_FAILED, answer.why)
        self._host.started(self, start)
        self._host.note(self, self._window)
        self._host.emit(events.WorkerStarted(name=self.key, pid=answer.pid, start=start))
        return await self._live(replace(self.process, pid=answer.pid))

    async def _fence(self, database: str, start: int) -> _Ended | inbox.Stop | None:
        """Raise the token in one database; return what ended the attempt if it was not raised."""
        pause, longest = FENCE_RETRY
        while True:
            try:
                obstacle = await raise_once(self, self._host, database, start)
            except Fenced as error:
                return _Ended(Exit.SUPERSEDED, error.message)
            self.obstacle = obstacle
            if not obstacle:
                return None
            if (stop := await self._stop_within(pause)) is not None:
                return stop
            pause = min(pause * 2, longest)

    async def _live(self, process: Process, *, adopted: bool = False) -> _Ended | inbox.Stop:
        """Accompany a process from its start until nothing of it is left, and it is known to be ours."""
        clock, link = self._host.clock, self._host.link
        self.process = process
        self._on_change(self)
        confirmed, gone = not adopted, False
        exited: protocol.Exited | None = None
        stop: inbox.Stop | None = None
        stages: deque[StopStage] = deque()
        next_stage: Boottime | None = None
        served_from: Boottime | None = None
        ready_at, overdue_at = self._readiness(process, adopted=adopted)
        while not (gone and (confirmed or stop)):
            running = exited is None and stop is None
            waiting = running and confirmed and self.state is not State.READY
            if waiting and (self._says_ready if ready_at is None else clock.now() >= ready_at):
                served_from = self._serve(process, adopted=adopted)
                waiting = False
            wakes = [next_stage, ready_at if waiting else None, overdue_at if waiting else None]
            message = await self._next(min((at for at in wakes if at is not None), default=None))
            match message:
                case inbox.Confirmed() if running or exited:
                    confirmed = True
                    if running:
                        self._enter(State.STARTING)
                        self._host.emit(events.WorkerAdopted(name=self.key, pid=process.pid))
                case inbox.Ready(worker) if worker == process.worker:
                    self._says_ready = True
                case inbox.Crashed(worker, why) if worker == process.worker:
                    self._crash = why
                case inbox.Exited(how) if how.worker == process.worker:
                    exited = how
                    next_stage = None
                    self.last_exit = self._words(how)
                    self._host.emit(events.WorkerExited(name=self.key, pid=process.pid, how=self.last_exit))
                case inbox.Gone(worker) if worker == process.worker:
                    gone = True
                case inbox.Stop() if stop is None or (message.kill and not stop.kill):
                    stop = message
                    self._host.emit(events.WorkerStopping(name=self.key, why=message.why))
                    self._enter(State.STOPPING)
                    stages = deque() if message.kill else deque(self.spec.stop)
                    next_stage = clock.now() if exited is None else None
                case inbox.Stop(again=False) if stop is not None and stop.again:
                    # It is on its way already, and is not wanted any more after that.
                    stop = message
                case None if waiting and overdue_at is not None and clock.now() >= overdue_at:
                    self._crash = self._crash or f"not ready {self.spec.ready.timeout:g} s after its start"
                    overdue_at = None
                    link.kill(process.worker)
                case _:
                    pass
            if next_stage is not None and clock.now() >= next_stage:
                next_stage = self._stage(process, stages)
        self.process = self.attachment = None
        if stop is not None:
            return stop
        assert exited is not None
        if exited.reason == "deadline":
            return _Ended(Exit.SUPERSEDED, self.last_exit)
        kind = classify(
            exited.code,
            exited.signal,
            self.spec.success_exit,
            asked_to_stop=False,
            superseded_code=SUPERSEDED_CODE if isinstance(self.spec.run, Behaviour) else None,
        )
        return _Ended(kind, self.last_exit, clock.now() - served_from if served_from else 0.0)

    def _readiness(self, process: Process, *, adopted: bool) -> tuple[Boottime | None, Boottime | None]:
        """Return when a command is ready by itself, and when a behaviour is overdue."""
        if isinstance(self.spec.run, Command):
            return process.since + self.spec.ready.delay, None
        since = self._host.clock.now() if adopted else process.since
        return None, since + self.spec.ready.timeout

    def _serve(self, process: Process, *, adopted: bool) -> Boottime:
        now = self._host.clock.now()
        self._enter(State.READY)
        if not adopted:
            self._host.emit(events.WorkerReady(name=self.key, milliseconds=(now - process.since) * 1000))
        return now

    def _stage(self, process: Process, stages: deque[StopStage]) -> Boottime | None:
        """Begin the next stop stage; return when the one after it begins, None after the last."""
        if not stages:
            self._host.link.kill(process.worker)
            return None
        stage = stages.popleft()
        self._host.link.signal(process.worker, signal.Signals[stage.signal])
        return self._host.clock.now() + stage.wait

    def _words(self, how: protocol.Exited) -> str:
        if how.reason == "deadline":
            return "killed by the warden: its lease was not renewed in time"
        ending = signal_name(how.signal) if how.signal else f"exit code {how.code}"
        return f"{ending} ({self._crash})" if self._crash else ending

    async def _goes_on_after(self, end: _Ended | inbox.Stop) -> bool:
        """Decide what follows a process, and wait for it; False: an end state was entered."""
        if isinstance(end, inbox.Stop):
            return self._goes_on_after_stop(end)
        now, rolled = self._host.clock.now(), random.random()
        decision = decide(self.spec.restart, end.exit, self._window, now, rolled, healthy_for=end.healthy_for)
        match decision:
            case Again(delay, window):
                self._window = window
                self._host.note(self, window)
                self.restarts += 1
                self.obstacle = f"{end.why}; next start in {delay:.1f} s"
                self._host.emit(
                    events.WorkerRestarting(
                        name=self.key,
                        count=len(window.times),
                        intensity=window.intensity,
                        period=window.period,
                        delay=delay,
                    )
                )
                if delay > 0:
                    self._next_start = now + delay
                    self._enter(State.BACKOFF)
                    stop = await self._stop_within(delay)
                    if stop is not None:
                        return self._goes_on_after_stop(stop)
                return True
            case GiveUp(why):
                self.obstacle = f"{why}; last: {end.why}"
                self._host.emit(events.WorkerGaveUp(name=self.key, why=self.obstacle))
                self._enter(State.FAILED)
            case Finished():
                self.obstacle = end.why
                self._enter(State.SUPERSEDED if end.exit is Exit.SUPERSEDED else State.FINISHED)
        return False

    def _goes_on_after_stop(self, stop: inbox.Stop) -> bool:
        if stop.again:
            return True
        self.obstacle = stop.why
        self._enter(State.SUPERSEDED if stop.kill else State.STOPPED)
        return False

    async def _next(self, until: Boottime | None) -> inbox.Message | None:
        """Return the next message, or None at ``until``."""
        if until is None:
            return await self._inbox.get()
        try:
            async with asyncio.timeout(max(until - self._host.clock.now(), 0.0)):
                return await self._inbox.get()
        except TimeoutError:
            return None

    def _asked_to_stop(self) -> inbox.Stop | None:
        """Return the stop that has arrived while no process ran; nothing else in the inbox counts then."""
        asked: inbox.Stop | None = None
        while not self._inbox.empty():
            message = self._inbox.get_nowait()
            if isinstance(message, inbox.Stop) and (asked is None or asked.again or message.kill):
                asked = message
        return asked

    async def _stop_within(self, seconds: float) -> inbox.Stop | None:
        """Wait for a stop, at most so long; other messages here are of processes that are gone."""
        until = self._host.clock.now() + seconds
        while (message := await self._next(until)) is not None:
            if isinstance(message, inbox.Stop):
                return message
        return None
