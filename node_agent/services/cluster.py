"""The gRPC service Cluster: nodes, health and explanations.  Decode, ask, encode."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc

from node_agent.holdings import DIGEST
from node_agent.postgres.probe import probe_databases
from node_agent.pulse import Pulse, feel
from node_agent.services.remote import Remote
from node_agent.supervisor import Supervisor
from node_agent.view import Around, View
from registry import events
from registry.errors import Invalid, NoSuchName
from registry.names import did_you_mean, validate
from registry.ownership import Status as WorkerStatus
from registry.ownership import WorkerState
from registry.router import unknown_name
from registry.store import Store
from registry.v1 import cluster_pb2, cluster_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class Cluster(cluster_pb2_grpc.ClusterServicer):
    """Nodes, health and explanations."""

    def __init__(
        self,
        view: View,
        store: Store,
        supervisor: Supervisor,
        remote: Remote,
        restart_agent: Callable[[], None],
    ) -> None:
        self._view, self._store, self._supervisor, self._remote = view, store, supervisor, remote
        self._restart_agent = restart_agent

    async def Status(
        self, request: cluster_pb2.StatusRequest, context: Context
    ) -> cluster_pb2.StatusResponse:
        return self._view.status(await self._look_around())

    async def _look_around(self) -> Around:
        config = self._view.config
        members, databases, silent, pulses = await asyncio.gather(
            self._store.members(),
            probe_databases(config.databases, config.cluster),
            self._remote.silent(),
            self._feel(self._supervisor.children),
        )
        return Around(members, databases, silent, pulses)

    async def _feel(self, keys: Iterable[str]) -> dict[str, Pulse]:
        """Ask the workers of this host, of those children that have one, how they are."""
        children = self._supervisor.children
        attached = {
            key: child.attachment
            for key in keys
            if (child := children.get(key)) is not None and child.attachment is not None
        }
        return await feel(attached, self._view.clock)

    async def Nodes(self, request: cluster_pb2.NodesRequest, context: Context) -> cluster_pb2.NodesResponse:
        return self._view.nodes()

    async def Why(self, request: cluster_pb2.WhyRequest, context: Context) -> cluster_pb2.WhyResponse:
        name, view = request.name, self._view
        if not name:
            return view.why_not_well(await self._look_around())
        if name not in view.known() and not any(view.log.about(name)):
            if not view.directory.in_sync:
                raise unknown_name(view.directory, name)
            hint = did_you_mean(name, view.known()) or "`pgherd names` lists all names"
            raise NoSuchName(f"there is no daemon or child named {name}", hint=hint, details={"name": name})
        silent, pulses = await asyncio.gather(self._remote.silent(), self._feel((name,)))
        return view.why(name, silent, pulses.get(name))

    async def Wait(self, request: cluster_pb2.WaitRequest, context: Context) -> cluster_pb2.WaitResponse:
        return await self._wait(request)

    async def _wait(self, request: cluster_pb2.WaitRequest) -> cluster_pb2.WaitResponse:
        goal = getattr(request, "for")
        directory, name = self._view.directory, validate(request.name)
        if goal not in ("ready", "stopped", "moved"):
            raise Invalid(f"cannot wait for {goal!r}", hint="ready, stopped or moved")
        await directory.synced()
        if name not in directory.specs and directory.lookup(name) is None:
            hint = did_you_mean(name, self._view.known()) or "pgherd names"
            raise NoSuchName(f"there is no daemon named {name}", hint=hint, details={"name": name})
        first = directory.lookup(name)
        above = request.above_epoch or (first.epoch if first else 0)
        while True:
            change = directory.changed(name)
            owner, status = directory.lookup(name), directory.status(name)
            ready = status is not None and self._serves(name, status)
            reached = {
                "ready": ready,
                "stopped": owner is None,
                "moved": ready and owner is not None and owner.epoch > above,
            }[goal]
            if reached:
                change.cancel()
                epoch, host = (owner.epoch, owner.host) if owner else (0, "")
                return cluster_pb2.WaitResponse(epoch=epoch, host=host)
            await change

    def _serves(self, name: str, status: WorkerStatus) -> bool:
        """Return whether a process of the spec that is wished now serves."""
        wish = self._view.directory.specs.get(name)
        digest = status.metadata.get(DIGEST)
        return status.state is WorkerState.READY and (wish is None or digest in (None, wish.digest))

    async def Events(
        self, request: cluster_pb2.EventsRequest, context: Context
    ) -> AsyncIterator[cluster_pb2.EventRecord]:
        fresh: asyncio.Queue[events.Recorded] = asyncio.Queue(maxsize=1000)

        def tell(recorded: events.Recorded) -> None:
            if fresh.full():
                fresh.get_nowait()
            fresh.put_nowait(recorded)

        unsubscribe = self._view.log.subscribe(tell)
        try:
            past = self._view.log.about(request.name) if request.name else self._view.log.all()
            for recorded in tuple(past):
                yield _record(recorded)
            while request.follow:
                recorded = await fresh.get()
                if request.name in ("", recorded.event.name):
                    yield _record(recorded)
        finally:
            unsubscribe()

    async def Confirm(
        self, request: cluster_pb2.ConfirmRequest, context: Context
    ) -> cluster_pb2.ConfirmResponse:
        holdings = self._view.membership.holdings
        if holdings is not None:
            # etcd's answer to our own claim may be on its way, and would start what is asked about.
            await holdings.claims.answered(request.name)
        child = self._supervisor.lose(request.name, request.epoch, "another agent asks whether it still runs")
        if child is not None:
            await child.done.wait()
        return cluster_pb2.ConfirmResponse(was_running=child is not None)

    async def RestartAgent(
        self, request: cluster_pb2.RestartAgentRequest, context: Context
    ) -> cluster_pb2.RestartAgentResponse:
        self._restart_agent()
        return cluster_pb2.RestartAgentResponse(generation=self._view.welcome.generation)


_LEVELS = {"INFO": "info", "WARNING": "warning", "ERROR": "err"}


def _record(recorded: events.Recorded) -> cluster_pb2.EventRecord:
    event = recorded.event
    return cluster_pb2.EventRecord(
        at=recorded.at.timestamp(),
        kind=events.kind(event),
        name=event.name,
        text=event.describe(),
        level=_LEVELS.get(logging.getLevelName(event.level), "info"),
    )
