"""This host's membership in the cluster: one session after the other, and the names that live under each.

    JOINING ── session, node key, directory in sync, adoption ──▶ READY ── lease lost ──▶ LOST ──▶ JOINING
        └──────────────────────── stop ────────────────────────────┴─────▶ STOPPING

A session is never revived: when it is lost, its named workers are stopped (the warden kills what is left at
the lease's hard deadline) and everything is claimed anew by a new node under a new lease.  Only the agent may
be replaced without that: the warden remembers the session, and the next agent adopts what etcd confirms.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from functools import partial

from node_agent.adoption import SESSION, FormerSession, session_note
from node_agent.child import ChildSpec, to_toml
from node_agent.claims import Claims
from node_agent.lifecycle import Child, Ownership, State
from node_agent.publisher import Publisher
from node_agent.reconcile import EVERY, Reconciler
from node_agent.supervisor import Ending, Supervisor
from node_agent.warden_link import WardenLink
from node_agent.wishes import Wish, Wishes
from registry import events
from registry.clock import Boottime, Clock
from registry.config import Timing
from registry.directory import Change, Directory
from registry.errors import HerdError, StoreError, StoreRestored
from registry.names import Names
from registry.nodes import NodeRecord, Nodes, NodeState, new_node
from registry.ownership import Method, Owner, Status, WorkerState
from registry.session import Session
from registry.specs import Desired, SpecRecord, Specs, What
from registry.store import LeaseId, Store
from registry.v1 import names_pb2

JOIN_RETRY = 1.0
"""Seconds between attempts to join."""
LEAVE_TIMEOUT = 5.0
"""Seconds for releasing the names of a node that leaves."""


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

    ``facts(node, state)`` makes this node's record; ``confirm`` and ``silent_until`` are what
    :class:`~node_agent.claims.Claims` wants to know about other nodes.
    """

    def __init__(
        self,
        *,
        host: str,
        timing: Timing,
        make_store: Callable[[], Store],
        directory: Directory,
        names: Names,
        nodes: Nodes,
        specs: Specs,
        supervisor: Supervisor,
        link: WardenLink,
        wishes: Wishes,
        own_specs: Sequence[ChildSpec],
        clock: Clock,
        emit: Callable[[events.Event], None],
        facts: Callable[[str, NodeState], NodeRecord],
        methods: Callable[[str], Collection[names_pb2.Method]],
        confirm: Callable[[Owner], Awaitable[bool]],
        silent_until: Callable[[Owner], Boottime],
    ) -> None:
        self.phase = Phase.JOINING
        self.problem = "joining the cluster"
        self.node = ""
        self.session: Session | None = None
        self.claims: Claims | None = None
        self.settled = asyncio.Event()
        self._host, self._timing, self._make_store = host, timing, make_store
        self._directory, self._names, self._nodes, self._specs = directory, names, nodes, specs
        self._supervisor, self._link, self._wishes = supervisor, link, wishes
        self._own_specs, self._clock, self._emit, self._facts = own_specs, clock, emit, facts
        self._methods = methods
        self._confirm, self._silent_until = confirm, silent_until
        self._publisher: Publisher | None = None
        self._endings: asyncio.Queue[Ending] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._etcd_away = False
        self._settling: set[str] = set()

    def trusted(self) -> bool:
        """Return whether named workers of this host may act now."""
        session = self.session
        return session is not None and session.trusted()

    async def run(self, former: FormerSession | None) -> None:
        """Be a member until cancelled; ``former`` is the session of the agent before this one."""
        unsubscribe = self._directory.subscribe(self._changed)
        try:
            while True:
                session = await self._begin(former)
                former = None
                reason = await self._live(session)
                await self._lose(session, reason)
        except* Restored as restored:
            await self._start_over(str(restored.exceptions[0]))
            raise
        finally:
            unsubscribe()

    async def leave(self, why: str) -> None:
        """Stop every child, release their names, and give the lease back last."""
        self.phase, self.problem = Phase.STOPPING, "stopping"
        session = self.session
        if session is not None and session.trusted():
            try:
                await self._nodes.update(self._facts(self.node, NodeState.STOPPING), session.lease)
            except StoreError as error:
                self._away(error)
        await self._supervisor.stop_all(why)
        if session is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_TIMEOUT):
                    await self._endings.join()
            await self._give_back(session)

    # Beginning a session.

    async def _begin(self, former: FormerSession | None) -> Session:
        if former is not None:
            session = await Session.adopt(
                self._make_store, Timing(former.ttl), self._clock, self._renewed,
                lease=former.lease, hard_deadline=former.hard_deadline,
            )  # fmt: skip
            if session is not None:
                self.node, self.session = former.node, session
                self._emit(events.SessionAdopted(node=self.node, lease=session.lease))
                return session
            for child in self._supervisor.named():
                child.kill("the lease of the former agent is over")
        self.settled.set()
        session = await self._open()
        self.node = new_node(self._host)
        self._emit(events.SessionStarted(node=self.node, lease=session.lease, ttl=session.ttl))
        self.session = session
        self._link.remember(SESSION, session_note(self.node, session.lease, session.ttl))
        return session

    async def _open(self) -> Session:
        while True:
            try:
                return await Session.open(self._make_store, self._timing, self._clock, self._renewed)
            except StoreError as error:
                self._away(error)
                await asyncio.sleep(JOIN_RETRY)

    def _renewed(self, lease: LeaseId, hard_deadline: Boottime) -> None:
        """Called in the session's thread: the warden must know at once, whatever this loop is doing."""
        self._link.raise_deadline(lease, hard_deadline)
        self._loop.call_soon_threadsafe(self._extend)

    def _extend(self) -> None:
        for child in self._supervisor.named():
            child.extend(self.may_act_until())

    def may_act_until(self) -> Boottime:
        """Return when named workers have to stop acting, unless the lease is renewed."""
        return self.session.soft_deadline if self.session is not None else 0.0

    def _away(self, error: StoreError) -> None:
        if isinstance(error, StoreRestored):
            raise Restored(str(error)) from error
        self.problem = f"etcd: {error}"
        if not self._etcd_away:
            self._etcd_away = True
            self._emit(events.EtcdUnreachable(reason=str(error)))

    def _back(self) -> None:
        if self._etcd_away:
            self._etcd_away = False
            self._emit(events.EtcdReachable())

    # Living under it.

    async def _live(self, session: Session) -> str:
        """Do everything a member does until the session is lost; return why it was."""
        work = asyncio.create_task(self._work(session), name="membership")
        lost = asyncio.ensure_future(_reason(session))
        try:
            await asyncio.wait({work, lost}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            return await lost
        finally:
            for task in (work, lost):
                task.cancel()
            await asyncio.gather(work, lost, return_exceptions=True)

    async def _work(self, session: Session) -> None:
        await self._persist(lambda: self._confirm_adopted(session))
        self.settled.set()
        await self._persist(
            lambda: self._nodes.register(self._facts(self.node, NodeState.RECOVERING), session.lease)
        )
        await self._directory.synced()
        self._back()
        await self._persist(self._offer_own_specs)
        self._check_running()
        self._publisher = Publisher(self._names, session.lease, lambda why: self._away(StoreError(why)))
        self.claims = Claims(
            host=self._host, node=self.node, lease=session.lease, directory=self._directory,
            names=self._names, wishes=self._wishes, clock=self._clock, emit=self._emit, held=self._held,
            granted=self._granted, confirm=self._confirm, silent_until=self._silent_until,
        )  # fmt: skip
        reconciler = Reconciler(
            self.node, self._directory, self._names, self._supervisor, self._busy, self._emit
        )
        await self._persist(
            lambda: self._nodes.update(self._facts(self.node, NodeState.READY), session.lease)
        )
        self.phase, self.problem = Phase.READY, ""
        for child in self._supervisor.named():
            self.publish(child)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._publisher.run())
            tasks.create_task(self.claims.run())
            tasks.create_task(self._reconcile(reconciler))
            tasks.create_task(self._settle_endings())

    async def _persist(self, attempt: Callable[[], Awaitable[object]]) -> None:
        """Repeat an attempt until etcd answers and lets us."""
        while True:
            try:
                await attempt()
            except StoreError as error:
                self._away(error)
            except HerdError as error:
                self.problem = error.message
                self._emit(events.EtcdUnreachable(reason=error.message))
            else:
                self._back()
                return
            await asyncio.sleep(JOIN_RETRY)

    async def _confirm_adopted(self, session: Session) -> None:
        """Let adopted workers serve whose owner keys still say so; kill the others."""
        adopted = [child for child in self._supervisor.named() if child.state is State.ADOPTING]
        if not adopted:
            return
        owned = {(name, epoch) for name, epoch, _ in await self._names.owned_by(self.node)}
        for child in adopted:
            if (child.key, child.epoch) in owned and session.trusted():
                child.confirm()
            else:
                self._supervisor.lose(child.key, child.epoch, "no owner key confirms it after the restart")

    async def _offer_own_specs(self) -> None:
        """Put the named specs of this host's files into etcd where there is none yet."""
        for spec in self._own_specs:
            who = f"{spec.source} on {self._host}"
            result = await self._specs.offer(spec.name, to_toml(spec), spec.digest, who)
            if result.what is What.CONFLICT:
                why = f"{who} differs from the spec in etcd; `pgherd apply` decides"
                self._wishes.conflict(spec.name, why)
                self._emit(events.SpecInvalid(name=spec.name, why=why))

    async def _reconcile(self, reconciler: Reconciler) -> None:
        while True:
            try:
                await reconciler.once()
            except StoreError as error:
                self._away(error)
            else:
                self._back()
            await asyncio.sleep(EVERY)

    def _busy(self) -> Collection[str]:
        """Names whose claim or release is under way."""
        claiming = self.claims.pending if self.claims else set()
        return claiming | self._settling

    # Names.

    def _held(self, name: str) -> bool:
        return self.phase is Phase.STOPPING or name in self._supervisor.children or name in self._settling

    def _granted(self, wish: Wish, ownership: Ownership) -> None:
        assert wish.spec is not None
        self._supervisor.run_child(wish.spec, ownership=ownership)

    def publish(self, child: Child) -> None:
        """Tell etcd where a named child stands."""
        ownership = child.ownership
        if ownership is None or self._publisher is None or ownership.node != self.node:
            return
        known = {State.READY: WorkerState.READY, State.STOPPING: WorkerState.STOPPING}
        state = known.get(child.state, WorkerState.STARTING)
        self._publisher.publish(
            Status(
                name=ownership.name,
                epoch=ownership.epoch,
                start=child.start,
                state=state,
                pid=child.pid,
                since=child.since,
                methods=tuple(
                    Method(m.name, m.kind, m.signature, m.description) for m in self._methods(child.key)
                ),
            )
        )

    def ended(self, ending: Ending) -> None:
        """A child's task has ended: its name is settled in etcd."""
        if ending.child.ownership is not None:
            self._settling.add(ending.child.key)
            self._endings.put_nowait(ending)

    async def _settle_endings(self) -> None:
        while True:
            ending = await self._endings.get()
            await self._persist(partial(self._settle, ending))
            self._settling.discard(ending.child.key)
            self._endings.task_done()

    async def _settle(self, ending: Ending) -> None:
        """Give the name up in etcd as fits the end of its child."""
        child, ownership = ending.child, ending.child.ownership
        assert ownership is not None
        if ownership.node != self.node:
            return
        penalise = None
        match ending.state:
            case State.FINISHED:
                who = f"itself ({child.obstacle})"
                await self._specs.set_desired(ownership.name, Desired.STOPPED, who)
            case State.FAILED:
                penalise = self._host
            case State.SUPERSEDED:
                owner = await self._names.read_owner(ownership.name)
                if owner is None or owner.epoch != ownership.epoch:
                    return
                penalise = self._host
            case _:
                pass
        await self._names.release(ownership.name, ownership.epoch, child.obstacle, penalise_host=penalise)
        self._emit(events.NameReleased(name=ownership.name, epoch=ownership.epoch, why=child.obstacle))

    def _changed(self, change: Change) -> None:
        if (
            change.section == "owners"
            and isinstance(change.before, Owner)
            and change.before.node == self.node
        ):
            before, after = change.before, change.after
            if not isinstance(after, Owner) or after.epoch != before.epoch:
                why = f"taken by {after.host}" if isinstance(after, Owner) else "its owner key was deleted"
                self._supervisor.lose(before.name, before.epoch, why)
        elif change.section == "specs":
            self._spec_changed(change.key, change.after if isinstance(change.after, SpecRecord) else None)

    def _check_running(self) -> None:
        """Compare the specs of adopted children with what is wished now."""
        for child in self._supervisor.named():
            self._spec_changed(child.key, self._directory.specs.get(child.key))

    def _spec_changed(self, name: str, record: SpecRecord | None) -> None:
        child = self._supervisor.children.get(name)
        if child is None or child.ownership is None:
            return
        if record is None:
            child.stop("its spec was deleted")
        elif record.desired is Desired.STOPPED:
            child.stop(f"stopped by {record.who}")
        else:
            wish = self._wishes.read(record)
            if wish.spec is None:
                self._emit(events.SpecInvalid(name=name, why=wish.problem))
            elif wish.spec.digest != child.spec.digest:
                self._emit(events.SpecChanged(name=name, what="changed", who=record.who))
                child.change(wish.spec, f"spec changed by {record.who}")

    # Ending a session.

    async def _lose(self, session: Session, reason: str) -> None:
        self.phase, self.problem = Phase.LOST, f"lease lost: {reason}"
        self._publisher, self.claims = None, None
        self._emit(events.SessionLost(node=self.node, reason=reason))
        children = list(self._supervisor.named())
        for child in children:
            child.stop(f"this host's lease is lost: {reason}")
        for child in children:
            await child.done.wait()
        while not self._endings.empty():
            self._settling.discard(self._endings.get_nowait().child.key)
            self._endings.task_done()
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


async def _reason(session: Session) -> str:
    return await asyncio.shield(session.lost)
