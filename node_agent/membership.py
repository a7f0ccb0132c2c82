"""This host's membership in the cluster: one session after the other.

    JOINING ── session, node key, adoption, directory in sync ──▶ READY ── lease lost ──▶ LOST ──▶ JOINING
        └──────────────────────── stop ────────────────────────────┴─────▶ STOPPING

A session is never revived: when it is lost, its named workers are stopped (the warden kills what is left at
the lease's hard deadline) and everything is claimed anew by a new node under a new lease.  Only the agent may
be replaced without that: the warden remembers the session, and the next agent adopts what etcd confirms.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from node_agent.adoption import SESSION, FormerSession, session_note
from node_agent.holdings import Holdings, Persist
from node_agent.lifecycle import Child
from node_agent.spec.child import ChildSpec
from node_agent.supervisor import Ending, Supervisor
from node_agent.warden_link import WardenLink
from registry import events
from registry.clock import Boottime, Clock
from registry.config import Timing
from registry.directory import Directory
from registry.errors import HerdError, StoreError, StoreRestored
from registry.nodes import NodeRecord, Nodes, NodeState, new_node
from registry.session import Session
from registry.store import LeaseId, Store

RETRY = 1.0
"""Seconds between attempts at something that etcd did not answer."""


class Restored(Exception):
    """etcd went back in time: nothing that was known of it holds, and this process must not go on with it."""


class Phase(enum.Enum):
    """Where the membership stands; the values are what ``pgherd status`` prints."""

    JOINING = "joining"
    READY = "ready"
    LOST = "lost"
    STOPPING = "stopping"


class Membership:
    """Joins the cluster again and again, until :meth:`leave`.

    ``facts(node, state)`` makes this node's record, ``make_holdings(node, lease, persist, present)`` what
    holds names under a session.  ``settled`` is set when it is clear which workers of a former agent are
    still ours.
    """

    def __init__(
        self,
        *,
        host: str,
        timing: Timing,
        make_store: Callable[[], Store],
        directory: Directory,
        nodes: Nodes,
        supervisor: Supervisor,
        link: WardenLink,
        own_specs: Sequence[ChildSpec],
        clock: Clock,
        emit: Callable[[events.Event], None],
        facts: Callable[[str, NodeState], NodeRecord],
        make_holdings: Callable[[str, LeaseId, Persist, Callable[[], Awaitable[object]]], Holdings],
    ) -> None:
        self.phase = Phase.JOINING
        self.problem = "joining the cluster"
        self.node = ""
        self.session: Session | None = None
        self.holdings: Holdings | None = None
        self.settled = asyncio.Event()
        self._host, self._timing, self._make_store = host, timing, make_store
        self._directory, self._nodes, self._supervisor, self._link = directory, nodes, supervisor, link
        self._own_specs, self._clock, self._emit, self._facts = own_specs, clock, emit, facts
        self._make_holdings = make_holdings
        self._loop = asyncio.get_running_loop()
        self._former = ""
        self._trouble = ""
        self._leaving = False

    def trusted(self) -> bool:
        """Return whether named workers of this host may act now."""
        session = self.session
        return session is not None and session.trusted()

    def may_act_until(self) -> Boottime:
        """Return when named workers have to stop acting, unless the lease is renewed."""
        return self.session.soft_deadline if self.session is not None else 0.0

    async def run(self, former: FormerSession | None) -> None:
        """Be a member until cancelled, or until the session is lost while this host leaves.

        ``former`` is the session of the agent before this one.

        Raises Restored (in a group) when etcd went back in time; then no named worker is left.
        """
        try:
            while not self._leaving:
                session = await self._begin(former)
                former = None
                holdings = self.holdings = self._make_holdings(
                    self.node, session.lease, self._persist, self._be_present
                )
                if self._leaving:
                    holdings.close()
                reason = await self._live(session, holdings)
                await self._lose(session, holdings, reason)
        except* Restored as restored:
            await self._start_over(str(restored.exceptions[0]))
            raise

    async def leave(self, why: str) -> None:
        """Stop every child, release their names, and give the lease back last."""
        self.phase, self.problem, self._leaving = Phase.STOPPING, "stopping", True
        if self.holdings is not None:
            self.holdings.close()
        session = self.session
        if session is not None and session.trusted():
            try:
                await self._nodes.update(self._facts(self.node, NodeState.STOPPING), session.lease)
            except StoreError as error:
                self._told(str(error))
        await self._supervisor.stop_all(why)
        # The session may have been lost, or found, meanwhile.
        if self.holdings is not None:
            await self.holdings.leave()
        if self.session is not None:
            await self._give_back(self.session)

    def publish(self, child: Child) -> None:
        """Tell etcd where a named child stands."""
        if self.holdings is not None:
            self.holdings.publish(child)

    def ended(self, ending: Ending) -> None:
        """A child's task has ended: its name is settled in etcd."""
        if self.holdings is not None:
            self.holdings.ended(ending)

    def look_again(self) -> None:
        """A name that could not be claimed here may be now."""
        if self.holdings is not None:
            self.holdings.claims.look_again()

    # Beginning a session.

    async def _begin(self, former: FormerSession | None) -> Session:
        if former is not None:
            session = await Session.adopt(
                self._make_store,
                Timing(former.ttl),
                self._clock,
                self._renewed,
                lease=former.lease,
                hard_deadline=former.hard_deadline,
            )
            if session is not None:
                self.node, self.session = former.node, session
                self._emit(events.SessionAdopted(node=self.node, lease=session.lease))
                return session
            for child in self._supervisor.named():
                child.kill("the lease of the former agent is over")
        self.settled.set()
        self.session = session = await self._open()
        self.node = new_node(self._host)
        self._link.remember(SESSION, session_note(self.node, session.lease, session.ttl))
        self._emit(events.SessionStarted(node=self.node, lease=session.lease, ttl=session.ttl))
        return session

    async def _open(self) -> Session:
        while True:
            try:
                session = await Session.open(self._make_store, self._timing, self._clock, self._renewed)
            except StoreError as error:
                self._told(f"etcd: {error}")
                await asyncio.sleep(RETRY)
            else:
                self._told("")
                return session

    def _renewed(self, lease: LeaseId, hard_deadline: Boottime) -> None:
        """Called in the session's thread: the warden must know at once, whatever this loop is doing."""
        self._link.raise_deadline(lease, hard_deadline)
        self._loop.call_soon_threadsafe(self._extend)

    def _extend(self) -> None:
        for child in self._supervisor.named():
            child.extend(self.may_act_until())

    # Living under it.

    async def _live(self, session: Session, holdings: Holdings) -> str:
        """Do everything a member does until the session is lost; return why it was."""
        work = asyncio.create_task(self._work(session, holdings), name="member")
        # The session may not notice by itself: its own connection has seen fewer revisions.
        restored = asyncio.create_task(self._directory.restored(), name="restored")
        either: set[asyncio.Future[Any]] = {work, session.lost, restored}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if restored.done():
                raise Restored(restored.result())
            if work.done():
                work.result()
            return await asyncio.shield(session.lost)
        finally:
            for task in (work, restored):
                task.cancel()
            await asyncio.gather(work, restored, return_exceptions=True)

    async def _work(self, session: Session, holdings: Holdings) -> None:
        await self._persist(lambda: holdings.confirm_adopted(session.trusted))
        self.settled.set()
        recovering = self._facts(self.node, NodeState.RECOVERING)
        await self._persist(lambda: self._nodes.register(recovering, session.lease, former=self._former))
        self._former = self.node
        await self._directory.synced()
        await self._persist(lambda: holdings.offer(self._own_specs))
        ready = self._facts(self.node, NodeState.READY)
        await self._persist(lambda: self._nodes.update(ready, session.lease))
        self.phase, self.problem = Phase.READY, ""
        await holdings.run()

    async def _be_present(self) -> None:
        """Put the node key back if somebody has deleted it: without it nothing can be claimed."""
        session = self.session
        if session is not None and self._directory.in_sync and self.node not in self._directory.nodes:
            ready = self._facts(self.node, NodeState.READY)
            await self._nodes.register(ready, session.lease, former=self._former)

    async def _persist(self, attempt: Callable[[], Awaitable[object]]) -> None:
        """Repeat an attempt until etcd answers and lets us."""
        while True:
            try:
                await attempt()
            except StoreRestored as error:
                raise Restored(str(error)) from error
            except StoreError as error:
                self._told(f"etcd: {error}")
            except HerdError as error:
                if self.problem != error.message:
                    self._emit(events.JoinRefused(why=error.message, remedy=error.hint))
                self.problem = error.message
            else:
                self._told("")
                return
            await asyncio.sleep(RETRY)

    def _told(self, trouble: str) -> None:
        """Note what is in the way, or that nothing is any more; tell each change once."""
        if self.phase is not Phase.JOINING or trouble:
            self.problem = trouble
        if bool(trouble) != bool(self._trouble):
            self._emit(events.EtcdUnreachable(reason=trouble) if trouble else events.EtcdReachable())
        self._trouble = trouble

    # Ending a session.

    async def _lose(self, session: Session, holdings: Holdings, reason: str) -> None:
        self.phase, self.problem = Phase.LOST, f"lease lost: {reason}"
        self.holdings = None
        holdings.close()
        self._emit(events.SessionLost(node=self.node, reason=reason))
        children = list(self._supervisor.named())
        for child in children:
            child.stop(f"this host's lease is lost: {reason}")
        for child in children:
            await child.done.wait()
        await self._give_back(session)
        self.phase = Phase.JOINING

    async def _start_over(self, reason: str) -> None:
        """Kill what runs under names of a lost history; the next agent is to know nothing of it."""
        self.phase, self.problem = Phase.LOST, reason
        children = list(self._supervisor.named())
        for child in children:
            child.kill(reason)
        for child in children:
            await child.done.wait()
        if self.session is not None:
            await self._give_back(self.session)

    async def _give_back(self, session: Session) -> None:
        """End the lease, the last thing of a session; without etcd it ends by itself."""
        await session.close(revoke=True)
        self._link.forget_lease(session.lease)
        self._link.remember(SESSION, None)
        self.session, self.node = None, ""
