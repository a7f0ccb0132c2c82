"""The life of one child, against a warden that does what the test says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from node_agent.lifecycle import Child
from node_agent.local import Local
from node_agent.postgres.fence import FenceRaiser, Raised
from node_agent.restarts import RestartWindow
from node_agent.spec.child import ChildSpec, parse
from node_agent.states import Ownership, Process, State
from node_agent.supervisor import Ending, Supervisor
from node_agent.warden import protocol
from node_agent.warden_link import WardenLink
from registry import events
from registry.clock import Boottime, Clock
from registry.v1 import messages_pb2
from tests.support.clocks import LoopClock

pytestmark = pytest.mark.looptime

OWNERSHIP = Ownership("ticker", 7, "c", "alpha-1", 77)
KILLED = protocol.Exited(
    worker="", child="ticker", name="ticker", epoch=7, start=1, pid=10, code=None, signal=9, reason="own"
)


def spec(command: str = "one", *, fence: tuple[str, ...] = ()) -> ChildSpec:
    text = f'schema = 1\n[[child]]\nid = "t"\nname = "ticker"\nrun.command = ["{command}"]\n'
    (only,) = parse(text, "x.toml")
    return replace(only, fence=fence)


class Link:
    """Starts whatever it is asked for."""

    def __init__(self) -> None:
        self.started: list[protocol.Start] = []
        self.killed: list[str] = []
        self.signalled: list[str] = []

    async def start(self, start: protocol.Start) -> protocol.Started:
        self.started.append(start)
        await asyncio.sleep(0)
        return protocol.Started(worker=start.worker, pid=len(self.started))

    def kill(self, worker: str) -> None:
        self.killed.append(worker)

    def signal(self, worker: str, signum: int) -> None:
        self.signalled.append(worker)


class Fences:
    """Raises a fence when it may."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.raised: list[str] = []

    async def raise_fence(self, database: str, *_: Any, **__: Any) -> Raised:
        await self.open.wait()
        self.raised.append(database)
        return Raised(1.0, ())


@dataclass
class Around:
    """What a child needs of its agent."""

    link: WardenLink
    fences: FenceRaiser
    clock: Clock
    cluster: str = "test"
    host: str = "alpha"
    socket: str = "/nowhere"
    conninfos: Mapping[str, str] = field(default_factory=dict)

    def emit(self, event: events.Event) -> None: ...

    def last_start(self, key: str, epoch: int) -> int:
        return 0

    def started(self, child: Child, start: int) -> None: ...

    def may_act_until(self) -> Boottime:
        return self.clock.now() + 10

    async def still_owns(self, child: Child) -> bool:
        return True

    def note(self, child: Child, window: RestartWindow) -> None: ...


def surroundings(link: Link, fences: Fences) -> Around:
    return Around(cast(WardenLink, link), cast(FenceRaiser, fences), LoopClock())


class Scene:
    """One child and what it is surrounded by."""

    def __init__(self, wanted: ChildSpec, adopt: Process | None = None) -> None:
        self.link, self.fences = Link(), Fences()
        around = surroundings(self.link, self.fences)
        self.child = Child(wanted, around, ownership=OWNERSHIP, adopt=adopt, on_change=lambda child: None)
        self.fences.open.clear()
        self.life = asyncio.create_task(self.child.run())

    def dies(self, *, gone: bool = True) -> None:
        worker = self.link.started[-1].worker
        self.child.exited(replace(KILLED, worker=worker))
        if gone:
            self.child.gone(worker)


async def test_a_name_lost_while_its_fence_is_raised_is_not_started_any_more() -> None:
    scene = Scene(spec(fence=("app", "log")))
    await asyncio.sleep(1)
    assert scene.child.state is State.FENCING
    scene.child.kill("taken by beta")
    scene.fences.open.set()
    assert await scene.life is State.SUPERSEDED
    assert not scene.link.started


async def test_a_name_lost_in_the_moment_its_process_ends_is_not_started_again() -> None:
    scene = Scene(spec())
    await asyncio.sleep(1)
    assert len(scene.link.started) == 1
    scene.dies()
    scene.child.kill("taken by beta")
    assert await scene.life is State.SUPERSEDED
    assert len(scene.link.started) == 1


async def test_a_spec_that_changes_while_the_fence_is_raised_starts_with_its_own_fences() -> None:
    scene = Scene(spec(fence=("app",)))
    await asyncio.sleep(1)
    scene.child.change(spec("two", fence=("app", "log")), "changed by anna")
    scene.fences.open.set()
    await asyncio.sleep(1)
    assert [start.command for start in scene.link.started] == [("two",)]
    assert scene.fences.raised == ["app", "app", "log"]
    scene.child.stop("enough")
    await asyncio.sleep(1)
    scene.dies()
    assert await scene.life is State.STOPPED


async def test_a_stop_that_follows_a_restart_wins() -> None:
    scene = Scene(spec(fence=("app",)))
    await asyncio.sleep(1)
    scene.child.stop("restart by anna", again=True)
    scene.child.stop("stopped by anna")
    scene.fences.open.set()
    assert await scene.life is State.STOPPED
    assert not scene.link.started


async def test_an_adopted_process_of_another_spec_is_stopped_before_the_next_is_started() -> None:
    scene = Scene(spec(), adopt=Process("former", 9, 4, 0.0))
    scene.child.stop("its spec has changed", again=True)
    await asyncio.sleep(1)
    assert scene.link.signalled == ["former"]
    assert not scene.link.started
    scene.child.exited(replace(KILLED, worker="former"))
    scene.child.gone("former")
    await asyncio.sleep(1)
    assert len(scene.link.started) == 1
    assert scene.child.state is State.READY
    scene.life.cancel()


async def test_whoever_asks_a_child_that_does_not_serve_hears_what_it_waits_for() -> None:
    link, fences = Link(), Fences()
    fences.open.clear()
    supervisor = Supervisor(
        surroundings(link, fences),
        cast(WardenLink, link),
        on_change=lambda child: None,
        on_end=lambda ending: None,
        on_buried=lambda key: None,
    )
    local = Local(supervisor, lambda: True, ("ticker",))
    text = 'schema = 1\n[[child]]\nid = "t"\nname = "ticker"\nrun.behaviour = "a:B"\n'
    (behaviour,) = parse(text, "x.toml")
    child = supervisor.run_child(replace(behaviour, fence=("app",)), ownership=OWNERSHIP)
    answers: list[messages_pb2.Error] = []

    async def ask() -> tuple[str, str]:
        await asyncio.sleep(0.1)
        local.deliver(messages_pb2.Frame(to="ticker"), 1e9, lambda frame: answers.append(frame.error))
        return answers[-1].message, answers[-1].hint

    assert await ask() == ("ticker is being fenced on alpha", "pgherd why ticker")
    child.obstacle = "fence in database app: it is down"
    assert await ask() == (
        "ticker is being fenced on alpha: fence in database app: it is down",
        "pgherd why ticker",
    )
    fences.open.set()
    assert await ask() == ("ticker is starting on alpha", "pgherd why ticker")
    for _ in range(2):
        worker = link.started[-1].worker
        child.exited(replace(KILLED, worker=worker))
        child.gone(worker)
        await asyncio.sleep(0.1)
    message, hint = await ask()
    assert re.fullmatch(r"ticker waits before its next start on alpha \(\d\.\d s left\)", message)
    assert hint == "pgherd why ticker"


async def test_a_local_child_that_gave_up_stays_in_the_table_and_can_be_restarted() -> None:
    link, ended = Link(), list[Ending]()
    supervisor = Supervisor(
        surroundings(link, Fences()),
        cast(WardenLink, link),
        on_change=lambda child: None,
        on_end=ended.append,
        on_buried=lambda key: None,
    )
    (local,) = parse('schema = 1\n[[child]]\nid = "job"\nintensity = 0\nrun.command = ["true"]\n', "x.toml")
    child = supervisor.run_child(local)
    await asyncio.sleep(1)
    worker = link.started[-1].worker
    child.exited(replace(KILLED, worker=worker, child="job"))
    child.gone(worker)
    await asyncio.sleep(1)
    assert [ending.state for ending in ended] == [State.FAILED]
    assert [child.state for child in supervisor.children.values()] == [State.FAILED]
    assert not supervisor.runs("job")
    supervisor.restart("job", "restart by anna")
    await asyncio.sleep(1)
    assert len(link.started) == 2
    assert [child.state for child in supervisor.children.values()] == [State.READY]
    assert supervisor.runs("job")
