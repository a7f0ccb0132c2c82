"""One lease, kept alive on a thread of its own, and the answer to "may I still act?".

The session has its own event loop and its own store, so a burst of watch events or a slow handler in the
agent's loop does not starve the lease.  Between renewals the loop does not run at all: every running asyncio
loop in a process is woken by every gRPC event in it, which costs the agent's messages a tenth of their time.

Trust counts from the moment the last acknowledged keepalive was *sent*, on CLOCK_BOOTTIME, and only ever
grows; it is never regained.  That also makes stale answers harmless: an etcd leader that was cut off or
paused goes on acknowledging keepalives of leases its successor has ended (etcd #15247).
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from registry.clock import SYSTEM_CLOCK, Boottime, Clock
from registry.errors import LeaseNotFound, StoreError, StoreRestored
from registry.store import LeaseId, Store
from registry.timing import SHORTEST_ELECTION, Timing

_T = TypeVar("_T")
_R = TypeVar("_R")

MakeStore: TypeAlias = Callable[[], Awaitable[Store] | Store]
"""Makes the session's own store; called in the session's loop."""
OnRenewed: TypeAlias = Callable[[LeaseId, Boottime], None]
"""Told lease and hard deadline at every renewal, in the session's thread, before trust is extended by it."""


@dataclass(frozen=True, slots=True)
class Trust:
    """Until when the holder may act (soft), and when the warden kills what still runs (hard)."""

    soft: Boottime
    hard: Boottime

    def renewed(self, timing: Timing, sent: Boottime, now: Boottime) -> Trust | None:
        """Return the trust after an acknowledgement that arrives ``now``; None if there is none left."""
        if now >= self.soft:
            return None
        return Trust(max(self.soft, sent + timing.soft), max(self.hard, sent + timing.hard))


class _Lost(Exception):
    """The lease must be given up for lost."""


class Session:
    """A node's lease.  Made by :meth:`open` or :meth:`adopt`, ended by :meth:`close`; thread-safe to ask.

    ``lost`` is a future of the opener's loop that gets the reason, once, when the lease must be given up for
    lost.  It stays pending if the session is closed first.
    """

    def __init__(
        self,
        make_store: MakeStore,
        timing: Timing,
        clock: Clock,
        on_renewed: OnRenewed,
        adopted: tuple[LeaseId, Trust] | None,
    ) -> None:
        self._make_store = make_store
        self._clock = clock
        self._on_renewed = on_renewed
        self._opener = asyncio.get_running_loop()
        self._store: Store | None = None
        self._lock = threading.Lock()  # holds _stop, _revoke and _soft together; never across a wait
        self._stop = threading.Event()
        self._revoke = adopted is None  # until it is open; from then on only close() may say so
        self._trouble = "no keepalive was sent"
        self._ready: asyncio.Future[None] = self._opener.create_future()
        self._ended: asyncio.Future[None] = self._opener.create_future()
        self.lost: asyncio.Future[str] = self._opener.create_future()
        self.timing = timing
        self.lease, trust = adopted or (0, Trust(-math.inf, -math.inf))
        self._soft, self._hard = trust.soft, trust.hard
        self._thread = threading.Thread(target=self._run, name="pgherd-session", daemon=True)

    @classmethod
    async def open(
        cls,
        make_store: MakeStore,
        timing: Timing,
        clock: Clock = SYSTEM_CLOCK,
        on_renewed: OnRenewed = lambda lease, hard: None,
    ) -> Session:
        """Take a new lease.  Raises StoreUnavailable, StoreDenied, StoreRestored, and ConfigInvalid if etcd
        grants a time to live that cannot be kept."""
        return await cls(make_store, timing, clock, on_renewed, None)._started(revoke=True)

    @classmethod
    async def adopt(
        cls,
        make_store: MakeStore,
        timing: Timing,
        clock: Clock,
        on_renewed: OnRenewed,
        *,
        lease: LeaseId,
        hard_deadline: Boottime,
    ) -> Session | None:
        """Go on with a former agent's lease, trusted no longer than the warden trusts it until it is renewed.

        Return None if trust has ended already: then there is nothing to adopt.
        """
        soft = hard_deadline - (timing.hard - timing.soft)
        if clock.now() >= soft:
            return None
        adopted = lease, Trust(soft, hard_deadline)
        return await cls(make_store, timing, clock, on_renewed, adopted)._started(revoke=False)

    def trusted(self) -> bool:
        """May the holder still act?  Cheap: ask at every delivery and every reply."""
        return self._clock.now() < self._soft

    def slack(self) -> float:
        """Return the seconds of trust left unless the lease is renewed; negative when there is none."""
        return self._soft - self._clock.now()

    @property
    def soft_deadline(self) -> Boottime:
        """When trust ends unless the lease is renewed; minus infinity after a loss."""
        return self._soft

    @property
    def hard_deadline(self) -> Boottime:
        """When the warden kills unless the lease is renewed; it outlives a loss."""
        return self._hard

    @property
    def ttl(self) -> float:
        """What etcd granted, in seconds."""
        return self.timing.ttl

    async def close(self, *, revoke: bool = True) -> None:
        """End trust, then the lease (unless ``revoke`` is false), then the connection; twice is fine.

        A lease that cannot be revoked now ends by itself.  Revoke only when nothing acts under it any more.
        """
        self._halt(revoke)
        await asyncio.shield(self._ended)
        self._thread.join()

    def _halt(self, revoke: bool) -> None:
        with self._lock:
            if not self._stop.is_set():
                self._soft = -math.inf
                self._revoke = revoke
                self._stop.set()

    async def _started(self, *, revoke: bool) -> Session:
        self._thread.start()
        try:
            await self._ready
        except BaseException:
            self._halt(revoke)
            raise
        return self

    # Everything below runs in the session's thread.

    def _run(self) -> None:
        try:
            with asyncio.Runner() as runner:
                try:
                    self._keep(runner)
                finally:
                    runner.run(self._end())
        except BaseException as error:
            self._lose(f"its thread failed: {error!r}")
            raise
        finally:
            self._post(_settle, self._ended, None)

    def _keep(self, runner: asyncio.Runner) -> None:
        try:
            due = runner.run(self._begin())
        except Exception as error:
            if not self._post(_fail, self._ready, error):
                raise
            return
        self._post(_settle, self._ready, None)
        try:
            while not self._stop.wait(max(due - self._clock.now(), 0)):
                due = runner.run(self._renew())
        except _Lost as lost:
            if not self._stop.is_set():  # else it is close() that ended the trust
                self._lose(str(lost))
            self._stop.wait()

    async def _begin(self) -> Boottime:
        """Make the store and get a lease unless one was adopted; return when to renew it."""
        made = self._make_store()
        self._store = await made if inspect.isawaitable(made) else made
        sent = self._clock.now()
        if self.lease:
            return sent
        lease = await self._store.grant(self.timing.ttl)
        self.lease, self.timing = lease.id, _for_ttl(self.timing, lease.ttl)
        self._extend(Trust(sent + self.timing.soft, sent + self.timing.hard))
        with self._lock:
            self._revoke = self._revoke and self._stop.is_set()
        return sent + self.timing.keepalive_every

    async def _renew(self) -> Boottime:
        """Send one keepalive; return when to send the next.  Raises _Lost."""
        assert self._store is not None
        trust = Trust(self._soft, self._hard)
        sent = self._clock.now()
        if sent >= trust.soft:
            raise _Lost(f"not renewed in time: {self._trouble}")
        try:
            ttl = await self._store.keepalive(self.lease, timeout=min(self.timing.attempt, trust.soft - sent))
        except (LeaseNotFound, StoreRestored) as error:
            raise _Lost(str(error)) from error
        except StoreError as error:
            self._trouble = str(error)
            return min(sent + self.timing.attempt, trust.soft)
        self.timing = _for_ttl(self.timing, ttl)
        renewed = trust.renewed(self.timing, sent, self._clock.now())
        if renewed is None:
            raise _Lost("the keepalive was answered too late")
        self._extend(renewed)
        return sent + self.timing.keepalive_every

    async def _end(self) -> None:
        if self._store is None:
            return
        try:
            if self._revoke and self.lease:
                await self._store.revoke(self.lease, timeout=self.timing.attempt)
        except StoreError as error:
            self._trouble = str(error)
        finally:
            await self._store.close()

    def _extend(self, trust: Trust) -> None:
        self._on_renewed(self.lease, trust.hard)
        with self._lock:
            self._hard = trust.hard
            if not self._stop.is_set():
                self._soft = trust.soft

    def _lose(self, reason: str) -> None:
        self._soft = -math.inf
        self._post(_settle, self.lost, reason)

    def _post(
        self, settle: Callable[[asyncio.Future[_T], _R], None], future: asyncio.Future[_T], result: _R
    ) -> bool:
        """Settle a future of the opener's loop; return False if that has gone."""
        try:
            self._opener.call_soon_threadsafe(settle, future, result)
        except RuntimeError:
            return False
        return True


def _settle(future: asyncio.Future[_T], result: _T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[_T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _for_ttl(timing: Timing, ttl: float) -> Timing:
    """Return the timing of what was granted: etcd raises a short request, and an adopted lease keeps the time
    to live of the configuration it was taken under, whatever election timeout is assumed by now."""
    if ttl == timing.ttl:
        return timing
    return dataclasses.replace(timing, ttl=ttl, election=min(timing.election, SHORTEST_ELECTION))
