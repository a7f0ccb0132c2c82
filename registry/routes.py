"""The ways of a client to the names it speaks to.

The client's own agent (its home) says where a name is; the request then goes to the owner's agent directly.
Where that is not known or cannot be reached, home passes it on.  A name keeps its route while anything on it
is unanswered, so requests for one name arrive in the order they were made; but when answers say that the
owner is another, later requests wait half a second only: the agent of a frozen host never answers.  A request
takes another route only when the link gave it back, which it does only for what was never handed over.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import grpc

from registry.alarm import NEVER, Alarm
from registry.clock import Boottime, Clock
from registry.errors import HerdError, Unreachable
from registry.link import Link, State
from registry.v1 import messages_pb2 as pb
from registry.v1 import names_pb2, names_pb2_grpc

AVOID = 1.0
"""Seconds in which an agent that could not be reached is not tried directly again."""
KEEP = 0.5
"""Seconds that a route is kept at least, whatever the answers say: home may not know better yet."""
OVERLAP = 0.5
"""Seconds that requests wait for the answers of a route that has ended."""
DETOUR = 10.0
"""Seconds until a route through home is sought anew."""
DIRECT_TIMEOUT = 1.0
"""Seconds to connect to an owner's agent, before home is asked to pass the request on."""
RESOLVE_TIMEOUT = 1.0
"""Seconds for home to say where a name is; after that it is asked to pass the request on itself."""
MAX_ROUTES = 10_000
"""Names that are remembered; idle ones are forgotten first."""

_order = attrgetter("order")


@dataclass(slots=True)
class _Agent:
    """An agent we speak to."""

    address: str
    channel: grpc.aio.Channel
    link: Link | None = None
    avoid_until: Boottime = 0.0


@dataclass(slots=True)
class _Route:
    """The way to one name, good until ``until``; ``waiting`` have none yet, in the order they were made."""

    link: Link | None = None
    epoch: int = 0
    found_at: Boottime = 0.0
    until: Boottime = NEVER
    unanswered: int = 0
    is_sought: bool = False
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: list[_Sent] = field(default_factory=list)

    def settle(self) -> None:
        """One request less is unanswered."""
        self.unanswered -= 1
        if not self.unanswered:
            self.drained.set()


class _Sent:
    """A request, which is the Asker of the link that carries it."""

    __slots__ = ("answer", "deadline", "frame", "link", "order", "route", "routes")

    def __init__(
        self, routes: Routes, order: int, frame: pb.Frame, deadline: Boottime, route: _Route
    ) -> None:
        self.routes = routes
        self.order = order
        self.frame = frame
        self.deadline = deadline
        self.route = route
        self.link: Link | None = None
        self.answer: asyncio.Future[pb.Frame] = asyncio.get_running_loop().create_future()

    def __call__(self, frame: pb.Frame) -> None:
        route = self.route
        route.settle()
        if frame.epoch != route.epoch:
            # Somebody else answered than we thought, or nobody did: ask again where the name is.
            route.until = route.found_at + KEEP
            if self.routes._turns_away(self, frame):
                return
        if not self.answer.done():
            self.answer.set_result(frame)

    def taken_back(self, why: HerdError) -> None:
        """It was not handed over; nothing was executed."""
        self.route.settle()
        self.routes._seek_another(self)

    def refuse(self, why: HerdError) -> None:
        if not self.answer.done():
            self.answer.set_exception(why)


class Routes:
    """Sends requests; synchronous but for finding a way.  ``connect(address)`` makes a channel."""

    def __init__(self, home: str, connect: Callable[[str], grpc.aio.Channel], clock: Clock) -> None:
        self._connect = connect
        self._clock = clock
        self._home = _Agent(home, connect(home))
        self._agents: dict[str, _Agent] = {}
        self._routes: dict[str, _Route] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm = Alarm(clock, self._expire)
        self._sent = 0
        self._is_closed = False

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel to home."""
        return self._home.channel

    async def open(self) -> None:
        """Connect to home.  Raises Unreachable."""
        await self._open_home()

    async def close(self) -> None:
        """End every link; what was handed over ends as unknown, the rest as refused."""
        self._is_closed = True
        self._alarm.stop()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for route in self._routes.values():
            _refuse(route, Unreachable("the client is closed"))
        for agent in (self._home, *self._agents.values()):
            await agent.channel.close()

    def send(self, frame: pb.Frame, now: Boottime, deadline: Boottime) -> asyncio.Future[pb.Frame]:
        """Send a request to ``frame.to``; the future has its reply, or the reason why it was never sent."""
        route = self._routes.get(frame.to)
        if route is None:
            route = self._new_route(frame.to)
        self._sent += 1
        sent = _Sent(self, self._sent, frame, deadline, route)
        link = route.link
        if link is None or route.waiting or now >= route.until:
            self._wait(sent)
        else:
            sent.link = link
            route.unanswered += 1
            link.request(frame, sent, now)
        return sent.answer

    def _new_route(self, name: str) -> _Route:
        if len(self._routes) >= MAX_ROUTES:
            self._routes = {
                known: route for known, route in self._routes.items() if route.unanswered or route.waiting
            }
        route = self._routes[name] = _Route()
        return route

    # Finding a way.

    def _wait(self, sent: _Sent) -> None:
        route = sent.route
        insort(route.waiting, sent, key=_order)
        self._alarm.note(sent.deadline)
        if self._is_closed:
            _refuse(route, Unreachable("the client is closed"))
        elif not route.is_sought:
            route.is_sought = True
            self._start(self._seek(sent.frame.to, route))

    def _seek_another(self, sent: _Sent) -> None:
        sent.route.link = None
        self._wait(sent)

    def _turns_away(self, sent: _Sent, answer: pb.Frame) -> bool:
        """Send a request through home that the owner's agent did not take: it is about to stop, for example.

        False: the answer is for the caller.
        """
        error = answer.error
        if error.reason != pb.REASON_UNREACHABLE or error.outcome != pb.OUTCOME_REFUSED:
            return False
        agent = next((each for each in self._agents.values() if each.link is sent.link), None)
        if agent is None or sent.deadline <= self._clock.now():
            return False
        agent.avoid_until = self._clock.now() + AVOID
        self._seek_another(sent)
        return True

    async def _seek(self, name: str, route: _Route) -> None:
        """Find a link for ``route`` and send what waits for it; refuse it when there is none."""
        try:
            await self._drain(route)
            route.link = await self._best_link(name, route)
        except HerdError as error:
            _refuse(route, error)
            return
        finally:
            route.is_sought = False
        waiting, route.waiting = route.waiting, []
        now = self._clock.now()
        for sent in waiting:
            sent.link = route.link
            route.unanswered += 1
            route.link.request(sent.frame, sent, now)

    @staticmethod
    async def _drain(route: _Route) -> None:
        if route.unanswered:
            route.drained.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(OVERLAP):
                    await route.drained.wait()

    async def _best_link(self, name: str, route: _Route) -> Link:
        """Return the link to the owner's agent, or home's; raises Unreachable when there is neither."""
        home = await self._open_home()
        owner = await self._resolve(name)
        route.epoch, route.found_at, route.until = owner.epoch, self._clock.now(), NEVER
        if not owner.node or owner.node == home.node:
            return home
        try:
            async with asyncio.timeout(DIRECT_TIMEOUT):
                return await self._open(self._agent(owner.address))
        except (HerdError, TimeoutError):
            route.until = route.found_at + DETOUR
            return home

    async def _resolve(self, name: str) -> names_pb2.Name:
        request = names_pb2.ResolveRequest(name=name)
        resolve = names_pb2_grpc.NamesStub(self._home.channel).Resolve
        try:
            return (await resolve(request, timeout=RESOLVE_TIMEOUT)).name
        except grpc.aio.AioRpcError:
            # Home's router knows children that are no names, and says best what is wrong with this one.
            return names_pb2.Name(name=name)

    def _agent(self, address: str) -> _Agent:
        agent = self._agents.get(address)
        if agent is None:
            agent = self._agents[address] = _Agent(address, self._connect(address))
        return agent

    async def _open_home(self) -> Link:
        try:
            return await self._open(self._home)
        except Unreachable as error:
            raise Unreachable(
                error.message,
                hint="is pgherd running there? Name another agent with --agent or PGHERD_AGENT",
                details=error.details,
            ) from error

    async def _open(self, agent: _Agent) -> Link:
        if agent is not self._home and self._clock.now() < agent.avoid_until:
            raise Unreachable(f"agent {agent.address} was not reachable just now")
        link = agent.link
        if link is None or link.state is State.CLOSED:
            link = agent.link = Link(agent.address, agent.channel, self._clock)
            self._start(link.run())
        await link.opened.wait()
        if link.state is State.CLOSED:
            agent.avoid_until = self._clock.now() + AVOID
            raise Unreachable(f"no agent at {agent.address}: {link.why}", details={"address": agent.address})
        return link

    def _expire(self, now: Boottime) -> Boottime:
        following = NEVER
        for name, route in self._routes.items():
            late = [sent for sent in route.waiting if sent.deadline <= now]
            if late:
                route.waiting = [sent for sent in route.waiting if sent.deadline > now]
            for sent in late:
                sent.refuse(Unreachable(f"{name}: no agent could be asked in time", details={"name": name}))
            following = min((following, *(sent.deadline for sent in route.waiting)))
        return following

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _refuse(route: _Route, why: HerdError) -> None:
    waiting, route.waiting = route.waiting, []
    for sent in waiting:
        sent.refuse(why)
