"""The Names service: who owns what, from the directory, or from etcd where that is asked for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import grpc

from registry.directory import Directory
from registry.errors import NoOwner, StoreError, Unreachable
from registry.names import validate
from registry.ownership import Method, Owner, Status, WorkerState
from registry.router import unknown_name
from registry.specs import Desired
from registry.v1 import names_pb2 as pb
from registry.v1 import names_pb2_grpc

SERVICE = "pgherd.v1.Names"
ReadOwner = Callable[[str], Awaitable["Owner | None"]]

_STATES = {
    WorkerState.STARTING: pb.NAME_STATE_STARTING,
    WorkerState.READY: pb.NAME_STATE_READY,
    WorkerState.STOPPING: pb.NAME_STATE_STOPPING,
}


class Names(names_pb2_grpc.NamesServicer):
    """Resolve, List and Methods.  ``read_owner`` reads one owner key linearizably."""

    def __init__(self, directory: Directory, read_owner: ReadOwner) -> None:
        self._directory = directory
        self._read_owner = read_owner

    async def Resolve(
        self, request: pb.ResolveRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.ResolveResponse:
        """Find the owner of a name.  Raises Invalid, NoSuchName, Unreachable."""
        directory, name = self._directory, validate(request.name)
        owner, revision = directory.lookup(name), directory.revision
        if request.linearizable:
            try:
                owner = await self._read_owner(name)
            except StoreError as error:
                raise Unreachable(
                    f"{name}: etcd cannot be asked: {error}",
                    hint="without `linearizable` this agent answers from its copy",
                    details={"name": name},
                ) from error
            revision = max(revision, owner.mod_revision if owner else 0)
        if owner is None and name not in directory.specs:
            raise unknown_name(directory, name)
        return pb.ResolveResponse(name=describe(directory, name, owner), as_of_revision=revision)

    async def List(
        self, request: pb.ListNamesRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.ListNamesResponse:
        """List every name that is declared or owned."""
        directory = self._directory
        names = sorted({*directory.specs, *directory.owners})
        return pb.ListNamesResponse(
            names=[
                describe(directory, name, directory.lookup(name))
                for name in names
                if name.startswith(request.prefix)
            ],
            as_of_revision=directory.revision,
            in_sync=directory.in_sync,
            stale_since=directory.stale_since,
        )

    async def Methods(
        self, request: pb.MethodsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.MethodsResponse:
        """List what a daemon offers.  Raises Invalid, NoSuchName, NoOwner, Unreachable."""
        directory, name = self._directory, validate(request.name)
        status = directory.status(name)
        if status is not None:
            return pb.MethodsResponse(methods=[_method(method) for method in status.methods])
        if name not in directory.specs and directory.lookup(name) is None:
            raise unknown_name(directory, name)
        raise NoOwner(
            f"{name} does not run now, so it is not known what it offers",
            hint=f"`pgherd why {name}` says what it waits for",
            details={"name": name},
        )


def describe(directory: Directory, name: str, owner: Owner | None) -> pb.Name:
    """Return a name and its owner as they travel."""
    if owner is None:
        spec = directory.specs.get(name)
        is_stopped = spec is not None and spec.desired is Desired.STOPPED
        state = pb.NAME_STATE_STOPPED if is_stopped else pb.NAME_STATE_UNOWNED
        return pb.Name(name=name, state=state)
    node = directory.nodes.get(owner.node)
    described = pb.Name(
        name=name,
        state=pb.NAME_STATE_STARTING,
        epoch=owner.epoch,
        host=owner.host,
        node=owner.node,
        address=node.address if node else "",
    )
    status = directory.statuses.get(name)
    if status is not None and status.epoch == owner.epoch:
        _add_status(described, status)
    return described


def _add_status(described: pb.Name, status: Status) -> None:
    described.state = _STATES[status.state]
    described.start = status.start
    described.pid = status.pid
    described.since = status.since
    described.methods.extend(method.name for method in status.methods)


def _method(method: Method) -> pb.Method:
    return pb.Method(
        name=method.name, kind=method.kind, signature=method.signature, description=method.description
    )
