"""The one place that decides where a request goes: to a child of this host, to the owner's agent, or back.

A request is passed on at once when its name has an owner.  When it has none, when the receiver says that it
is not the owner (any more, or yet), or when the owner's agent could not be reached and nothing was handed
over, the request waits here and is tried again when the directory changes, within its deadline and ten
seconds; then it is refused.  Only the first router on a request's way does this: a request that came from
another agent is delivered here or refused, never relayed a second time.

Requests for one name leave in the order they came in.  Those that come back take their old place, and while
an owner that was replaced still has unanswered ones, later ones wait a moment for these.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from registry import wire
from registry.alarm import NEVER, Alarm
from registry.clock import Boottime, Clock
from registry.directory import Change, Directory
from registry.errors import HerdError, NoOwner, NoSuchName, Overloaded, Unreachable, WrongEpoch
from registry.link import Reply
from registry.names import did_you_mean, validate
from registry.peers import Peers
from registry.specs import Desired
from registry.v1 import messages_pb2 as pb

WAITING_MESSAGES = 1000
"""Requests that wait for one name."""
WAITING_SECONDS = 10.0
"""How long a request waits here."""
WAITING_BYTES = 64 << 20
"""Bytes of all requests that wait."""
TRY_AGAIN = 0.1
"""Seconds until a refused request is tried again although no change was seen."""
LAST_TRY = 0.1
"""Seconds before its deadline at which a request that was refused is not tried again."""
OVERLAP = 0.5
"""Seconds that requests for a new owner wait for the answers of the one before."""

HERE = ""
_RETRIED = frozenset({pb.REASON_NO_OWNER, pb.REASON_WRONG_EPOCH, pb.REASON_FENCED})
_arrival = attrgetter("arrival")


class Local(Protocol):
    """The children of this host."""

    def owns(self, name: str) -> bool:
        """Return whether ``name`` is a name or a child of this host."""

    def deliver(self, frame: pb.Frame, deadline: Boottime, reply: Reply) -> None:
        """Hand a request to the child, or refuse it; ``reply`` is called exactly once."""


@dataclass(slots=True)
class _Route:
    """Where the requests for one name go now: ``target`` is a node, or HERE."""

    target: str
    epoch: int
    unanswered: int = 0
    replaced_at: Boottime = 0.0


class _Request:
    """A request in the care of this router, which is the Asker of whoever it is passed on to."""

    __slots__ = ("arrival", "deadline", "frame", "give_up", "reply", "route", "router", "verdict")

    def __init__(
        self, router: Router, arrival: int, frame: pb.Frame, deadline: Boottime, reply: Reply
    ) -> None:
        self.router = router
        self.arrival = arrival
        self.frame = frame
        self.deadline = deadline
        self.reply = reply
        self.route: _Route | None = None
        self.give_up: Boottime = 0.0
        self.verdict: pb.Frame | None = None

    def __call__(self, answer: pb.Frame) -> None:
        route = self.route
        assert route is not None
        route.unanswered -= 1
        if answer.HasField("error") and self._may_be_tried_again(answer.error):
            self.router._refused(self, answer)
        else:
            self.reply(answer)
        if route.replaced_at and not route.unanswered:
            self.router._soon(self.frame.to)

    def taken_back(self, why: HerdError) -> None:
        """It was not handed over; nothing was executed."""
        assert self.route is not None
        self.route.unanswered -= 1
        self.router._refused(self, wire.error_reply(self.frame, why))

    @property
    def learns_nothing(self) -> bool:
        """Whether its caller is not to hear the verdict: WRONG_EPOCH is for those who named one."""
        verdict = self.verdict
        return verdict is None or (verdict.error.reason == pb.REASON_WRONG_EPOCH and not self.frame.epoch)

    def _may_be_tried_again(self, error: pb.Error) -> bool:
        return error.reason in _RETRIED and error.outcome == pb.OUTCOME_REFUSED and not self.frame.epoch


@dataclass(slots=True)
class _Waiting:
    """The requests that wait for one name, in order of arrival; ``try_at`` is when to try without a sign."""

    requests: list[_Request] = field(default_factory=list)
    try_at: Boottime = NEVER
    woken: bool = False


class Router:
    """Routes requests; synchronous, on one event loop, without a task or a timer for each."""

    def __init__(self, directory: Directory, peers: Peers, local: Local, clock: Clock) -> None:
        self._directory = directory
        self._peers = peers
        self._local = local
        self._clock = clock
        self._routes: dict[str, _Route] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._waiting_bytes = 0
        self._arrivals = 0
        self._alarm = Alarm(clock, self._ring)
        self._closed = False
        self._unsubscribe = directory.subscribe(self._changed)

    @property
    def waiting(self) -> int:
        """How many requests wait here."""
        return sum(len(waiting.requests) for waiting in self._waiting.values())

    def route(self, frame: pb.Frame, deadline: Boottime, reply: Reply, *, from_peer: bool = False) -> None:
        """Take care of a request: ``reply`` is called exactly once, perhaps before this returns."""
        if from_peer:
            if self._local.owns(frame.to):
                self._local.deliver(frame, deadline, reply)
            else:
                reply(wire.error_reply(frame, self._not_here(frame.to)))
            return
        self._arrivals += 1
        request = _Request(self, self._arrivals, frame, deadline, reply)
        if frame.to in self._waiting:
            self._wait(request)
        else:
            self._pass_on(request)

    def wake(self, name: str) -> None:
        """Try what waits for ``name`` again: something about it has changed."""
        waiting = self._waiting.pop(name, None)
        if waiting is None:
            return
        self._waiting_bytes -= sum(request.frame.ByteSize() for request in waiting.requests)
        for request in waiting.requests:
            if name in self._waiting:
                self._wait(request)
            else:
                self._pass_on(request)

    def close(self) -> None:
        """Refuse what waits, and everything from now on that would have to wait; twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._unsubscribe()
        self._alarm.stop()
        waiting, self._waiting = self._waiting, {}
        for name, queue in waiting.items():
            for request in queue.requests:
                request.reply(wire.error_reply(request.frame, _stopping(name)))

    # Decisions.

    def _pass_on(self, request: _Request) -> None:
        if request.verdict is not None and request.deadline - self._clock.now() < LAST_TRY:
            # Another try could not be answered in time, and would make "not executed" uncertain.
            self._give_up(request)
            return
        frame = request.frame
        name = frame.to
        here = self._local.owns(name)
        if here:
            target, epoch = HERE, 0
        else:
            owner = self._directory.lookup(name)
            if owner is None:
                self._ownerless(request)
                return
            target, epoch = owner.node, owner.epoch
        route = self._routes.get(name)
        if route is None or route.target != target or route.epoch != epoch:
            if route is not None and route.unanswered and self._overlaps(route):
                self._wait(request, try_at=route.replaced_at + OVERLAP)
                return
            route = self._routes[name] = _Route(target, epoch)
        request.route = route
        route.unanswered += 1
        if here:
            self._local.deliver(frame, request.deadline, request)
        else:
            self._peers.request(target, frame, request)

    def _overlaps(self, route: _Route) -> bool:
        now = self._clock.now()
        route.replaced_at = route.replaced_at or now
        return now < route.replaced_at + OVERLAP

    def _ownerless(self, request: _Request) -> None:
        name = request.frame.to
        if self._is_wanted(name):
            self._wait(request)
            return
        try:
            validate(name)
        except HerdError as invalid:
            error = invalid
        else:
            error = _stopped(name) if name in self._directory.specs else unknown_name(self._directory, name)
        request.reply(wire.error_reply(request.frame, error))

    def _is_wanted(self, name: str) -> bool:
        spec = self._directory.specs.get(name)
        return spec is not None and spec.desired is Desired.RUNNING

    def _not_here(self, name: str) -> WrongEpoch:
        owner = self._directory.lookup(name)
        details = {"name": name}
        if owner is not None:
            details |= {"owner": owner.host, "epoch": str(owner.epoch)}
        return WrongEpoch(f"{name} is not on this host", details=details)

    # Waiting.

    def _refused(self, request: _Request, verdict: pb.Frame) -> None:
        """It was not executed: wait for a change, unless there was one since it was passed on."""
        request.verdict = verdict
        name, route = request.frame.to, request.route
        owner = self._directory.lookup(name)
        if owner is None and not self._is_wanted(name):
            if request.learns_nothing:
                self._ownerless(request)
            else:
                request.reply(verdict)
            return
        self._wait(request, try_at=self._clock.now() + TRY_AGAIN)
        if route is None or route.target == HERE or owner is None:
            return
        if (owner.node, owner.epoch) != (route.target, route.epoch):
            self._soon(name)

    def _wait(self, request: _Request, *, try_at: Boottime = NEVER) -> None:
        name, now = request.frame.to, self._clock.now()
        if not request.give_up:
            request.give_up = min(request.deadline, now + WAITING_SECONDS)
            # A frame of a batch keeps the whole batch in memory; one that waits must not.
            request.frame = pb.Frame.FromString(request.frame.SerializeToString())
        waiting = self._waiting.setdefault(name, _Waiting())
        size = request.frame.ByteSize()
        if self._closed:
            request.reply(wire.error_reply(request.frame, _stopping(name)))
        elif len(waiting.requests) >= WAITING_MESSAGES or request.give_up <= now:
            self._give_up(request)
        elif self._waiting_bytes + size > WAITING_BYTES:
            full = Overloaded(
                f"{self._waiting_bytes} bytes of requests wait for owners, at most {WAITING_BYTES} are kept",
                details={"name": name, "limit": str(WAITING_BYTES)},
            )
            request.reply(wire.error_reply(request.frame, full))
        else:
            insort(waiting.requests, request, key=_arrival)
            self._waiting_bytes += size
            waiting.try_at = min(waiting.try_at, try_at)
            self._alarm.note(min(request.give_up, waiting.try_at))
        if not waiting.requests:
            del self._waiting[name]

    def _give_up(self, request: _Request) -> None:
        if request.verdict is None or request.learns_nothing:
            request.reply(wire.error_reply(request.frame, self._nobody(request.frame.to)))
        else:
            request.reply(request.verdict)

    def _nobody(self, name: str) -> NoOwner:
        owner = self._directory.lookup(name)
        if owner is not None and not self._directory.in_sync:
            return NoOwner(
                f"{owner.host} had {name} and does not run it, and who has it now cannot be asked: this "
                f"agent's copy of the registry is not in sync {self._directory.stale_since}",
                hint="without etcd no host may take a name; `pgherd status` shows what etcd is doing",
                details={"name": name},
            )
        return NoOwner(
            f"{name} has no owner that is ready; a request waits for one until its deadline, at most "
            f"{WAITING_SECONDS:g} s and {WAITING_MESSAGES} at once",
            hint=f"`pgherd why {name}` says what it waits for",
            details={"name": name},
        )

    def _ring(self, now: Boottime) -> Boottime:
        for name, waiting in tuple(self._waiting.items()):
            late = [request for request in waiting.requests if request.give_up <= now]
            if late:
                waiting.requests = [request for request in waiting.requests if request.give_up > now]
                self._waiting_bytes -= sum(request.frame.ByteSize() for request in late)
                if not waiting.requests:
                    del self._waiting[name]
            for request in late:
                self._give_up(request)
            if waiting.try_at <= now:
                self.wake(name)
        return min((self._due(waiting) for waiting in self._waiting.values()), default=NEVER)

    @staticmethod
    def _due(waiting: _Waiting) -> Boottime:
        return min(waiting.try_at, min(request.give_up for request in waiting.requests))

    def _soon(self, name: str) -> None:
        waiting = self._waiting.get(name)
        if waiting is not None and not waiting.woken:
            waiting.woken = True
            asyncio.get_running_loop().call_soon(self.wake, name)

    def _changed(self, change: Change) -> None:
        if change.section not in ("owners", "statuses", "specs"):
            return
        self._soon(change.key)
        if change.after is None and (route := self._routes.get(change.key)) and not route.unanswered:
            del self._routes[change.key]


def _stopping(name: str) -> Unreachable:
    return Unreachable(f"{name}: the agent is stopping", details={"name": name})


def _stopped(name: str) -> NoOwner:
    return NoOwner(
        f"{name} is stopped",
        hint=f"`pgherd start {name}` lets it run again",
        details={"name": name},
    )


def unknown_name(directory: Directory, name: str) -> HerdError:
    """Return what to say about a name that is neither declared nor owned, as far as this copy knows."""
    if not directory.in_sync:
        return Unreachable(
            f"{name} is not known here, and this agent's copy of the registry is not in sync "
            f"{directory.stale_since}",
            hint="`pgherd status` shows what etcd is doing",
            details={"name": name},
        )
    hint = did_you_mean(name, {*directory.specs, *directory.owners}) or "`pgherd names` lists all names"
    return NoSuchName(f"there is no daemon named {name}", hint=hint, details={"name": name})
