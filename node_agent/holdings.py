"""The names one node holds: won, reported on, compared with etcd every second, and given up, under one lease.

A :class:`Holdings` lives as long as a session.  It starts a child for each name that is won, and settles the
name in etcd when its child has ended: released with the reason, so that the next owner need not wait, and
with a penalty for this host when it did not work here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from node_agent.claims import Claims
from node_agent.lifecycle import Child
from node_agent.publisher import Publisher
from node_agent.reconcile import EVERY, Reconciler
from node_agent.spec.child import ChildSpec, to_toml
from node_agent.states import Ownership, State
from node_agent.supervisor import Ending, Supervisor
from node_agent.wishes import Wish, Wishes
from registry import events
from registry.clock import Boottime, Clock
from registry.directory import Change, Directory
from registry.names import Names
from registry.ownership import Method, Owner, Status, WorkerState
from registry.specs import Desired, SpecRecord, Specs, What
from registry.store import LeaseId
from registry.v1 import names_pb2

SETTLE_TIMEOUT = 5.0
"""Seconds for releasing the names of a node that leaves."""

Persist = Callable[[Callable[[], Awaitable[object]]], Coroutine[Any, Any, None]]
"""Repeats an attempt until etcd answers."""

DIGEST = "spec"
"""Name of the metadata that says which spec, by its digest, a process was started with."""

_STATES = {State.READY: WorkerState.READY, State.STOPPING: WorkerState.STOPPING}


class Holdings:
    """The names of ``node`` under ``lease``.

    ``present()`` puts this node's key back if somebody deleted it; ``methods(key)`` is what a child offers;
    ``confirm`` and ``silent_until`` are what :class:`~node_agent.claims.Claims` wants to know about others.
    """

    def __init__(
        self,
        *,
        host: str,
        node: str,
        lease: LeaseId,
        directory: Directory,
        names: Names,
        specs: Specs,
        supervisor: Supervisor,
        wishes: Wishes,
        clock: Clock,
        emit: Callable[[events.Event], None],
        persist: Persist,
        present: Callable[[], Awaitable[object]],
        methods: Callable[[str], Collection[names_pb2.Method]],
        confirm: Callable[[Owner], Awaitable[bool]],
        silent_until: Callable[[Owner], Boottime],
    ) -> None:
        self._host, self._node = host, node
        self._directory, self._names, self._specs = directory, names, specs
        self._supervisor, self._wishes, self._emit = supervisor, wishes, emit
        self._persist, self._present, self._methods = persist, present, methods
        self._settling: set[str] = set()
        self._endings: asyncio.Queue[Ending] = asyncio.Queue()
        self._closing = False
        self._publisher = Publisher(names, lease)
        self._reconciler = Reconciler(node, directory, names, supervisor, self._busy, emit)
        self.claims = Claims(
            host=host,
            node=node,
            lease=lease,
            directory=directory,
            names=names,
            wishes=wishes,
            clock=clock,
            emit=emit,
            held=self._held,
            granted=self._granted,
            confirm=confirm,
            silent_until=silent_until,
        )

    async def run(self) -> None:
        """Hold names until cancelled."""
        unsubscribe = self._directory.subscribe(self._changed)
        try:
            for child in self._supervisor.named():
                self.publish(child)
                self._spec_changed(child.key, self._directory.specs.get(child.key))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._persist(self._publisher.run))
                tasks.create_task(self.claims.run())
                tasks.create_task(self._reconcile())
                tasks.create_task(self._settle_endings())
        finally:
            unsubscribe()

    async def leave(self) -> None:
        """Take no name any more, and return when those of ended children are settled, or it took too long."""
        self._closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_TIMEOUT):
                await self._endings.join()

    def close(self) -> None:
        """Take no name any more."""
        self._closing = True

    # Beginning.

    async def confirm_adopted(self, trusted: Callable[[], bool]) -> None:
        """Let adopted workers serve whose owner keys still say so; kill the others.  Raises StoreError."""
        adopted = [child for child in self._supervisor.named() if child.state is State.ADOPTING]
        if not adopted:
            return
        owned = {(held.name, held.epoch) for held in await self._names.owned_by(self._node)}
        for child in adopted:
            if (child.key, child.epoch) in owned and trusted():
                child.confirm()
            else:
                why = "no owner key confirms it after the agent's restart"
                self._supervisor.lose(child.key, child.epoch, why)

    async def offer(self, own_specs: Sequence[ChildSpec]) -> None:
        """Put the named specs of this host's files into etcd where there is none yet.  Raises StoreError."""
        for spec in own_specs:
            who = f"{spec.source} on {self._host}"
            result = await self._specs.offer(spec.name, to_toml(spec), spec.digest, who)
            if result.what is What.CONFLICT:
                why = f"{who} differs from the spec in etcd; `pgherd apply` decides"
                self._wishes.conflict(spec.name, why)
                self._emit(events.SpecInvalid(name=spec.name, why=why))

    def _granted(self, wish: Wish, ownership: Ownership) -> None:
        assert wish.spec is not None
        self._supervisor.run_child(wish.spec, ownership=ownership)
        # The wish may have changed since the claim was sent.
        self._spec_changed(wish.name, self._directory.specs.get(wish.name))

    # While it lasts.

    def publish(self, child: Child) -> None:
        """Tell etcd where a named child stands."""
        ownership = child.ownership
        if ownership is None or ownership.node != self._node:
            return
        methods = (Method(m.name, m.kind, m.signature, m.description) for m in self._methods(child.key))
        self._publisher.publish(
            Status(
                name=ownership.name,
                epoch=ownership.epoch,
                start=child.start,
                state=_STATES.get(child.state, WorkerState.STARTING),
                pid=child.pid,
                since=child.since,
                methods=tuple(methods),
                metadata={DIGEST: child.spec.digest},
            )
        )

    async def _reconcile(self) -> None:
        while True:
            await self._persist(self._reconciler.once)
            await self._persist(self._present)
            await asyncio.sleep(EVERY)

    def _busy(self) -> Collection[str]:
        """Return the names whose claim or release is under way."""
        return self.claims.pending | self._settling

    def _held(self, name: str) -> bool:
        return self._closing or self._supervisor.runs(name) or name in self._settling

    def _changed(self, change: Change) -> None:
        match change:
            case Change("owners", name, Owner() as before, after) if before.node == self._node:
                if not isinstance(after, Owner) or after.epoch != before.epoch:
                    why = (
                        f"taken by {after.host}" if isinstance(after, Owner) else "its owner key was deleted"
                    )
                    self._supervisor.lose(name, before.epoch, why)
            case Change("specs", name, _, after):
                self._spec_changed(name, after if isinstance(after, SpecRecord) else None)
            case _:
                pass

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

    # Giving names up.

    def ended(self, ending: Ending) -> None:
        """A child's task has ended: have its name settled."""
        ownership = ending.child.ownership
        if ownership is not None and ownership.node == self._node:
            self._settling.add(ownership.name)
            self._endings.put_nowait(ending)
        else:
            self.claims.look_again()

    async def _settle_endings(self) -> None:
        """Settle each name on its own: one that etcd does not let go yet holds up no other."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                tasks.create_task(self._settle_one(await self._endings.get()))

    async def _settle_one(self, ending: Ending) -> None:
        await self._persist(partial(self._settle, ending))
        self._settling.discard(ending.child.key)
        # The directory has told of the release before: this host did not count as free for it then.
        self.claims.look_again()
        self._endings.task_done()

    async def _settle(self, ending: Ending) -> None:
        """Give a name up as fits the end of its child.  Raises StoreError."""
        child, ownership = ending.child, ending.child.ownership
        assert ownership is not None
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
