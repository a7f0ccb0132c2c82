"""What the warden is asked to start: a spec made concrete for one process.  Pure."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Protocol

from node_agent.postgres.fence import application_name
from node_agent.spec.child import Behaviour, ChildSpec, Command, substitute
from node_agent.states import Ownership
from node_agent.warden import protocol


class Place(Protocol):
    """Where the process will run; ``socket`` is the agent's worker socket."""

    cluster: str
    host: str
    socket: str
    conninfos: Mapping[str, str]


def start_request(spec: ChildSpec, ownership: Ownership | None, start: int, place: Place) -> protocol.Start:
    """Return the request for process number ``start`` of ``spec``."""
    key = spec.name or spec.id
    node, lease, epoch = (ownership.node, ownership.lease, ownership.epoch) if ownership else ("", 0, 0)
    filled = substitute(spec, node=node, host=place.host, name=key, instance=key, index=0, epoch=epoch)
    env = {
        "PGHERD_NAME": key,
        "PGHERD_EPOCH": str(epoch),
        "PGHERD_START": str(start),
        "PGHERD_NODE": node,
        "PGHERD_SOCKET": place.socket,
        "PGAPPNAME": application_name(key, epoch, start),
        **filled.env,
    }
    run = filled.run
    behaviour = run if isinstance(run, Behaviour) else Behaviour("")
    wanted = sorted(spec.constraints.databases)
    return protocol.Start(
        worker=uuid.uuid4().hex,
        child=key,
        name=spec.name,
        lease=lease,
        epoch=epoch,
        start=start,
        command=run.argv if isinstance(run, Command) else None,
        behaviour=behaviour.target,
        args=behaviour.args,
        path=behaviour.path,
        env=env,
        cwd=filled.cwd,
        user=spec.user,
        databases={name: place.conninfos[name] for name in wanted if name in place.conninfos},
        socket=place.socket,
        node=node,
        host=place.host,
        cluster=place.cluster,
    )
