"""The gRPC service Supervision: specs and children.  Decode, ask, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import grpc

from node_agent.services.remote import FORWARD_TIMEOUT, RELAYED, Remote, relayed
from node_agent.spec.child import ChildSpec, parse, stop_fits, to_toml
from node_agent.spec.schema import NOT_SPECS
from node_agent.view import View
from node_agent.warden_link import WardenLink
from registry import events, wire
from registry.config import ConfigInvalid
from registry.errors import HerdError, Invalid, NoOwner, NoSuchName, Unreachable
from registry.names import did_you_mean, validate
from registry.router import unknown_name
from registry.specs import Desired, SpecResult, Specs, Wanted, What
from registry.v1 import supervision_pb2, supervision_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
R = TypeVar("R")

READ_BACK = 2.0
"""Seconds for a written spec to come back in the copy of the registry."""
LOG_TAIL = 1 << 20
"""Bytes of output that a warden keeps of a child."""


def _who(context: Context, given: str) -> str:
    return given or f"client {context.peer()}"


class Supervision(supervision_pb2_grpc.SupervisionServicer):
    """Specs and children."""

    def __init__(
        self,
        view: View,
        specs: Specs,
        remote: Remote,
        link: WardenLink,
        emit: Callable[[events.Event], None],
    ) -> None:
        self._view, self._specs, self._remote, self._link, self._emit = view, specs, remote, link, emit

    async def Apply(
        self, request: supervision_pb2.ApplyRequest, context: Context
    ) -> supervision_pb2.ApplyResponse:
        return await self._apply(request, _who(context, request.who))

    async def _apply(self, request: supervision_pb2.ApplyRequest, who: str) -> supervision_pb2.ApplyResponse:
        source = request.source or "spec"
        try:
            specs = parse(request.toml, source)
        except ConfigInvalid as invalid:
            other_kind = any(problem.message == NOT_SPECS for problem in invalid.problems)
            raise Invalid(
                f"{source} is not valid, nothing was applied:\n" + "\n".join(map(str, invalid.problems)),
                hint="" if other_kind else f"`pgherd check {source}` shows the same",
            ) from invalid
        unnamed = [spec.id for spec in specs if not spec.name]
        if unnamed:
            raise Invalid(
                f"{source}: child {unnamed[0]} has no `name`: only named children are cluster-wide",
                hint="give it a name, or put the file into children.d of a host",
            )
        wanted = [Wanted(spec.name, to_toml(spec), spec.digest) for spec in specs]
        results = await self._specs.apply_many(wanted, who)
        for result in results:
            if result.what is not What.UNCHANGED:
                self._emit(events.SpecChanged(name=result.name, what=result.what.value, who=who))
        await self._read_back(results)
        response = supervision_pb2.ApplyResponse()
        for spec, result in zip(specs, results, strict=True):
            warnings = "; ".join(self._warnings(spec))
            what = f"{result.what.value} ({warnings})" if warnings else result.what.value
            response.applied.add(name=spec.name, what=what)
        return response

    def _warnings(self, spec: ChildSpec) -> Iterator[str]:
        """Yield what keeps a valid spec from being all that its author may expect."""
        if warning := stop_fits(spec, self._view.config.timing):
            yield warning
        config = self._view.config
        for database in sorted(spec.constraints.databases - config.databases.keys()):
            yield f"host {config.host} has no [database.{database}], so it will not run there"

    async def _read_back(self, results: Iterable[SpecResult]) -> None:
        """Wait a moment until this agent knows what it has written: `apply` is often followed by `wait`."""
        directory = self._view.directory
        changed = asyncio.Event()

        def unknown(result: SpecResult) -> bool:
            known, written = directory.specs.get(result.name), result.spec
            return written is not None and (known is None or known.mod_revision < written.mod_revision)

        unsubscribe = directory.subscribe(lambda change: changed.set())
        try:
            # When that takes longer, the copy is behind and says so itself.
            with suppress(TimeoutError):
                async with asyncio.timeout(READ_BACK):
                    while results := [result for result in results if unknown(result)]:
                        await changed.wait()
                        changed.clear()
        finally:
            unsubscribe()

    async def Delete(self, request: supervision_pb2.NameRequest, context: Context) -> supervision_pb2.Done:
        return await self._delete(request.name, _who(context, request.who))

    async def _delete(self, name: str, who: str) -> supervision_pb2.Done:
        validate(name)
        result = await self._specs.delete(name)
        if result.what is What.ABSENT:
            raise self._undeclared(name)
        self._emit(events.SpecChanged(name=name, what="deleted", who=who))
        view = self._view
        runs = name in view.supervisor.children or view.directory.lookup(name) is not None
        stopping = ", its worker is being stopped" if runs else ""
        return supervision_pb2.Done(what=f"{name}: spec deleted{stopping}")

    async def Start(self, request: supervision_pb2.NameRequest, context: Context) -> supervision_pb2.Done:
        return await self._wish(request, context, Desired.RUNNING)

    async def Stop(self, request: supervision_pb2.NameRequest, context: Context) -> supervision_pb2.Done:
        return await self._wish(request, context, Desired.STOPPED)

    async def _wish(
        self, request: supervision_pb2.NameRequest, context: Context, desired: Desired
    ) -> supervision_pb2.Done:
        name, who = validate(request.name), _who(context, request.who)
        result = await self._specs.set_desired(name, desired, who)
        if result.what is What.ABSENT:
            raise self._undeclared(name)
        if result.what is What.UNCHANGED:
            return supervision_pb2.Done(what=f"{name}: should be {desired.value} already")
        self._emit(events.SpecChanged(name=name, what=f"desired {desired.value}", who=who))
        await self._read_back((result,))
        return supervision_pb2.Done(what=f"{name}: should be {desired.value} now")

    def _undeclared(self, name: str) -> HerdError:
        child = self._view.supervisor.children.get(name)
        if child is not None and not child.spec.name:
            return Invalid(
                f"{name} is a child of this host only, declared in its children.d",
                hint=f"`pgherd restart {name}` restarts it; edit the file to remove it",
            )
        hint = did_you_mean(name, self._view.directory.specs) or "`pgherd specs` lists all"
        return NoSuchName(f"there is no spec named {name}", hint=hint, details={"name": name})

    async def Specs(
        self, request: supervision_pb2.SpecsRequest, context: Context
    ) -> supervision_pb2.SpecsResponse:
        found = self._view.specs(request.name)
        if request.name and not found:
            directory = self._view.directory
            raise (
                self._undeclared(request.name) if directory.in_sync else unknown_name(directory, request.name)
            )
        return supervision_pb2.SpecsResponse(specs=found)

    async def Restart(
        self, request: supervision_pb2.RestartRequest, context: Context
    ) -> supervision_pb2.Done:
        return await self._restart(request, context)

    async def _restart(
        self, request: supervision_pb2.RestartRequest, context: Context
    ) -> supervision_pb2.Done:
        who = _who(context, request.who)
        channel = self._remote.of(request.name, context)
        if channel is not None:
            stub = supervision_pb2_grpc.SupervisionStub(channel)
            forwarded = supervision_pb2.RestartRequest(name=request.name, who=who)
            return await _forward(
                stub.Restart(forwarded, timeout=FORWARD_TIMEOUT, metadata=((RELAYED, "1"),))
            )
        self._view.supervisor.restart(request.name, f"restart by {who}")
        return supervision_pb2.Done(what=f"{request.name}: being restarted on {self._view.config.host}")

    async def Children(
        self, request: supervision_pb2.ChildrenRequest, context: Context
    ) -> supervision_pb2.ChildrenResponse:
        here = self._view.config.host
        response = supervision_pb2.ChildrenResponse(stale_since=self._view.directory.stale_since)
        if request.host in ("", here):
            response.children.extend(self._view.children())
        if relayed(context) or request.host == here:
            return response
        asked = [(host, c) for host, c in self._remote.others() if request.host in ("", host)]
        if request.host and not asked:
            raise self._not_up(request.host)
        answers = await asyncio.gather(*(self._children_of(host, channel) for host, channel in asked))
        for (host, _), children in zip(asked, answers, strict=True):
            if children is None:
                response.silent.append(host)
            else:
                response.children.extend(children)
        return response

    def _not_up(self, host: str) -> HerdError:
        directory = self._view.directory
        alive = {record.host for record in directory.nodes.values()}
        if host in directory.hosts or host in alive or not directory.in_sync:
            return Unreachable(f"host {host} is not up", hint="pgherd nodes")
        hint = did_you_mean(host, {*directory.hosts, *alive}) or "`pgherd nodes` lists all hosts"
        return NoSuchName(f"there is no host {host}", hint=hint, details={"name": host})

    @staticmethod
    async def _children_of(
        host: str, channel: grpc.aio.Channel | None
    ) -> Iterable[supervision_pb2.Child] | None:
        if channel is None:
            return None
        stub = supervision_pb2_grpc.SupervisionStub(channel)
        request = supervision_pb2.ChildrenRequest(host=host)
        try:
            reply = await stub.Children(request, timeout=FORWARD_TIMEOUT, metadata=((RELAYED, "1"),))
        except grpc.aio.AioRpcError:
            return None
        return reply.children

    async def Logs(
        self, request: supervision_pb2.LogsRequest, context: Context
    ) -> AsyncIterator[supervision_pb2.LogsChunk]:
        try:
            channel = self._remote.of(request.name, context)
        except NoOwner:
            # Its last process may have run here: the warden keeps its output.
            channel = None
            if not (await self._link.output(request.name, 1)).data:
                raise
        if channel is not None:
            stub = supervision_pb2_grpc.SupervisionStub(channel)
            try:
                async for chunk in stub.Logs(request, metadata=((RELAYED, "1"),)):
                    yield chunk
            except grpc.aio.AioRpcError as error:
                raise wire.error_of_rpc(error, read_only=True) from error
            return
        tail = await self._link.output(request.name, LOG_TAIL)
        data, dropped = tail.data, tail.dropped
        if request.lines:
            data, dropped = b"".join(data.splitlines(keepends=True)[-request.lines :]), 0
        yield supervision_pb2.LogsChunk(data=data, dropped=dropped)
        if request.follow:
            async for piece in self._link.follow(request.name):
                yield supervision_pb2.LogsChunk(data=piece.data, dropped=piece.dropped)


async def _forward(call: Awaitable[R]) -> R:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise wire.error_of_rpc(error) from error
