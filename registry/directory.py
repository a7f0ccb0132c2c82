"""Every agent's copy of the registry: read once, then followed, so that a lookup is one dictionary access.

Snapshot at revision r, watch from r+1, and start over on whatever breaks that.  A watch is a promise etcd has
broken before (events lost around compaction, etcd issues 18089 and 19179), so the owner keys' number and
highest revision are compared every 10 s and everything is read again every 5 min.  Silence of the watch means
that the copy may be old: then :attr:`Directory.in_sync` is false and the copy is kept, since "unknown" must
never be read as "no such name".
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

from registry.clock import Boottime, Clock
from registry.errors import StoreError, StoreRestored
from registry.events import (
    DirectoryLost,
    DirectorySynced,
    Event,
    NodeJoined,
    NodeLeft,
    OwnerChanged,
    OwnerGone,
    OwnerReleased,
    RecordMalformed,
)
from registry.nodes import HostRecord, NodeRecord
from registry.ownership import OWNERS, Incarnation, Owner, PlacementRecord, Status
from registry.replica import Change, Replica, Unreadable
from registry.specs import SpecRecord
from registry.store import Changed, Deleted, Revision, Store, WatchBatch

__all__ = ["Change", "Directory"]

SILENCE = 3.0
"""Seconds without a sign of life after which the copy counts as old; a healthy watch gives one a second."""
CATCH_UP = 1.0
"""Seconds of events after a silence before the copy counts as new again without an idle moment."""
CHECK_EVERY = 10.0
SETTLE = 2.0
"""Seconds a fingerprint that differs is given to turn out as an event under way."""
RELIST_EVERY = 300.0
RETRY_FIRST, RETRY_CAP = 0.1, 5.0
DEPARTED_KEPT = 600.0
EVENTS_A_TURN = 1000


class _StartOver(Exception):
    """Read everything again; ``lost`` says that the copy may be wrong until then."""

    def __init__(self, reason: str, *, lost: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lost = lost


class Directory:
    """The records of one cluster, as of :attr:`revision`.

    ``owners statuses specs nodes hosts placements`` are live mappings; ``departed`` holds nodes for 10 min
    after they left.  Everything happens in the event loop of :meth:`run`; callbacks run after the change.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        clock: Clock,
        emit: Callable[[Event], None],
        *,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store, self._prefix, self._clock, self._emit, self._jitter = store, prefix, clock, emit, jitter
        self._replica = replica = Replica(prefix)
        self.lookup: Callable[[str], Owner | None] = replica.owners.get
        """Return the owner of a name as this copy knows it; look at :attr:`in_sync` before believing None."""
        self.owners: Mapping[str, Owner] = replica.owners
        self.statuses: Mapping[str, Status] = replica.statuses
        self.specs: Mapping[str, SpecRecord] = replica.specs
        self.nodes: Mapping[str, NodeRecord] = replica.nodes
        self.hosts: Mapping[str, HostRecord] = replica.hosts
        self.placements: Mapping[str, PlacementRecord] = replica.placements
        self.departed: dict[str, NodeRecord] = {}
        self._departed_at: dict[str, Boottime] = {}
        self._lost: tuple[Boottime, str] | None = (clock.now(), "the registry has not been read yet")
        self._complete = False
        self._last_sign: Boottime = clock.now()
        self._first_sign: Boottime | None = None
        self._synced = asyncio.Event()
        self._restored = asyncio.Event()
        self._why_restored = ""
        self._subscribers: list[Callable[[Change], None]] = []
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._trace: set[tuple[int, Revision]] | None = None

    # What it knows.

    @property
    def in_sync(self) -> bool:
        """Whether the copy is as new as etcd's last sign of life, which is less than 3 s old."""
        return self._lost is None

    async def restored(self) -> str:
        """Return why, when etcd has gone back in time: this copy will never be in sync again."""
        await self._restored.wait()
        return self._why_restored

    @property
    def stale_since(self) -> str:
        """For people: since when and why the copy may be old; empty when it is in sync."""
        if self._lost is None:
            return ""
        since, reason = self._lost
        return f"for {self._clock.now() - since:.1f} s: {reason}"

    @property
    def revision(self) -> Revision:
        """The registry revision of the last change seen."""
        return self._replica.revision

    @property
    def incarnation(self) -> Incarnation:
        """The counter of etcd histories; claims compare it."""
        return self._replica.incarnation

    @property
    def pause_revision(self) -> Revision:
        """The revision of the key that pauses all claims, 0 when they are not paused."""
        return self._replica.pause.mod_revision if self._replica.pause else 0

    def status(self, name: str) -> Status | None:
        """Return what the present owner says about its process; a former owner's word does not count."""
        owner, status = self.owners.get(name), self.statuses.get(name)
        return status if owner and status and status.epoch == owner.epoch else None

    def subscribe(self, tell: Callable[[Change], None]) -> Callable[[], None]:
        """Call ``tell`` after each change from now on; returns the function that ends it."""
        self._subscribers.append(tell)
        return lambda: self._subscribers.remove(tell)

    def changed(self, name: str) -> asyncio.Future[None]:
        """Return a future that is done at the next change of the owner or status of ``name``.

        Ask for it before looking, so that no change falls in between; cancel it when it is not needed.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, set()).add(future)
        future.add_done_callback(lambda done: self._forget(name, done))
        return future

    async def synced(self) -> None:
        """Wait until the copy is in sync."""
        await self._synced.wait()

    # How it follows.

    async def run(self) -> None:
        """Follow the registry until cancelled, whatever etcd does."""
        self._sign_of_life()  # silence counts from now
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_the_clock(), name="directory clock")
            tasks.create_task(self._follow_for_ever(), name="directory")

    async def _follow_for_ever(self) -> None:
        retry = RETRY_FIRST
        while True:
            began, ended = self._clock.now(), _StartOver("")
            try:
                await self._follow()
            except* _StartOver as group:
                ended = max(_leaves(group), key=lambda error: error.lost)
            if not ended.lost:
                continue
            self._lose(ended.reason)
            if self._clock.now() - began > RETRY_CAP:
                retry = RETRY_FIRST
            await self._clock.sleep_until(self._clock.now() + retry * (0.5 + self._jitter()))
            retry = min(retry * 2, RETRY_CAP)

    async def _follow(self) -> None:
        """Read everything, then follow the watch; ends by raising _StartOver, perhaps in a group."""
        try:
            snapshot = await self._store.snapshot(self._prefix)
        except StoreError as error:
            raise self._broken_by(error) from error
        self._sign_of_life()
        await self._apply(self._replica.differences(snapshot))
        self._replica.revision = snapshot.revision
        self._complete = True
        self._gain()
        watch = self._store.watch(self._prefix, snapshot.revision + 1)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(watch), name="directory watch")
            tasks.create_task(self._verify(), name="directory check")

    async def _read(self, watch: AsyncIterator[WatchBatch]) -> None:
        try:
            async for batch in watch:
                self._sign_of_life()
                await self._apply(batch.events)
                if self._lost is not None and self._caught_up(batch):
                    self._gain()
        except StoreError as error:
            raise self._broken_by(error) from error
        finally:
            if (close := getattr(watch, "aclose", None)) is not None:
                await close()
        raise _StartOver("the watch ended")

    def _broken_by(self, error: StoreError) -> _StartOver:
        if isinstance(error, StoreRestored):
            self._why_restored = str(error)
            self._restored.set()
        return _StartOver(_text(error))

    def _caught_up(self, batch: WatchBatch) -> bool:
        """Whether a watch that was silent shows the present again: it is idle, or has run on for a while."""
        now = self._clock.now()
        if self._first_sign is None:
            self._first_sign = now
        return not batch.events or now - self._first_sign >= CATCH_UP

    async def _watch_the_clock(self) -> None:
        while True:
            now = self._clock.now()
            if now - self._last_sign >= SILENCE:
                self._first_sign = None
                if self._lost is None:
                    self._lose(f"nothing heard from etcd for {SILENCE:g} s")
            self._forget_departed(now)
            await self._clock.sleep_until(max(self._last_sign + SILENCE, now + SILENCE / 6))

    async def _verify(self) -> None:
        relist_at = self._clock.now() + RELIST_EVERY * (0.9 + 0.2 * self._jitter())
        while self._clock.now() < relist_at:
            await self._clock.sleep_until(self._clock.now() + CHECK_EVERY * (0.9 + 0.2 * self._jitter()))
            if reason := await self._disagreement():
                raise _StartOver(reason)
        raise _StartOver("time to read everything again", lost=False)

    async def _disagreement(self) -> str:
        """Say what is wrong if the owner keys never, since this was asked, looked as etcd says they do."""
        self._trace = {self._replica.fingerprint()}
        try:
            there = await self._store.fingerprint(self._prefix + OWNERS)
            if there not in self._trace or not self.in_sync:
                await self._clock.sleep_until(self._clock.now() + SETTLE)
            if there not in self._trace:
                return "the owner keys differ from etcd's: an event was lost"
            return "" if self.in_sync else "etcd answers, but its watch is silent"
        except StoreError:
            return ""  # nothing was learnt; that etcd does not answer shows in the watch
        finally:
            self._trace = None

    # What it tells.

    async def _apply(self, changes: Sequence[Changed | Deleted]) -> None:
        for first in range(0, len(changes), EVENTS_A_TURN):
            if first:
                await asyncio.sleep(0)
                self._sign_of_life()
            for change in changes[first : first + EVENTS_A_TURN]:
                self._take(change)

    def _take(self, event: Changed | Deleted) -> None:
        meaning = self._replica.apply(event)
        if isinstance(meaning, Unreadable):
            self._emit(RecordMalformed(key=meaning.key, why=meaning.why))
            meaning = meaning.change
        if meaning is None:
            return
        if meaning.section == "owners" and self._trace is not None:
            self._trace.add(self._replica.fingerprint())
        if meaning.section == "nodes":
            self._node_changed(meaning)
        if meaning.section in ("owners", "statuses"):
            self._wake(meaning.key)
        for tell in tuple(self._subscribers):
            tell(meaning)
        if self._complete:
            self._announce(meaning)

    def _announce(self, change: Change) -> None:
        match change:
            case Change("owners", name, _, Owner() as owner):
                self._emit(OwnerChanged(name=name, node=owner.node, epoch=owner.epoch))
            case Change("owners", name, Owner() as owner, None):
                released = self.placements.get(name)
                if released is not None and released.last_epoch == owner.epoch:
                    why = released.reason
                    self._emit(OwnerReleased(name=name, node=owner.node, epoch=owner.epoch, why=why))
                else:
                    self._emit(OwnerGone(name=name, node=owner.node, epoch=owner.epoch))
            case Change("nodes", node, None, _):
                self._emit(NodeJoined(node=node))
            case Change("nodes", node, _, None):
                self._emit(NodeLeft(node=node))
            case _:
                pass

    def _node_changed(self, change: Change) -> None:
        if change.after is None and isinstance(change.before, NodeRecord):
            self.departed[change.key] = change.before
            self._departed_at[change.key] = self._clock.now()
        else:
            self.departed.pop(change.key, None)
            self._departed_at.pop(change.key, None)

    def _forget_departed(self, now: Boottime) -> None:
        for node in [node for node, at in self._departed_at.items() if now - at > DEPARTED_KEPT]:
            del self.departed[node], self._departed_at[node]

    def _wake(self, name: str) -> None:
        for future in tuple(self._waiting.get(name, ())):
            if not future.done():
                future.set_result(None)

    def _forget(self, name: str, future: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(name)
        if waiting is not None:
            waiting.discard(future)
            if not waiting:
                del self._waiting[name]

    def _sign_of_life(self) -> None:
        self._last_sign = self._clock.now()

    def _lose(self, reason: str) -> None:
        if self._lost is not None:
            self._lost = (self._lost[0], reason)
            return
        self._lost = (self._clock.now(), reason)
        self._synced.clear()
        self._emit(DirectoryLost(reason=reason))

    def _gain(self) -> None:
        if self._lost is None:
            return
        self._lost, self._first_sign = None, None
        self._synced.set()
        names, nodes = len(self.owners), len(self.nodes)
        self._emit(DirectorySynced(revision=self.revision, names=names, nodes=nodes))


def _leaves(group: BaseExceptionGroup[_StartOver]) -> Iterator[_StartOver]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _text(error: StoreError) -> str:
    return str(error) or type(error).__name__
