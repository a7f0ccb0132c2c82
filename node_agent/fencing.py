"""One attempt to raise a child's fence in one database, and the telling of how it went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from node_agent.postgres.fence import FenceUnavailable
from registry import events

if TYPE_CHECKING:
    from node_agent.lifecycle import Child, Host

ATTEMPT = 5.0
"""Seconds for one attempt."""


async def raise_once(child: Child, host: Host, database: str, start: int) -> str:
    """Raise the fence to process ``start`` of the child's epoch; return what is in the way, empty if nothing.

    Raises Fenced when a later owner was there before.
    """
    key, epoch = child.key, child.epoch
    try:
        raised = await host.fences.raise_fence(
            database,
            key,
            epoch,
            start,
            node=host.host,
            timeout=ATTEMPT,
            confirm=lambda: host.still_owns(child),
        )
    except FenceUnavailable as error:
        obstacle = f"fence in database {database}: {error}"
        if child.obstacle != obstacle:
            host.emit(
                events.FenceFailed(name=key, database=database, epoch=epoch, start=start, why=str(error))
            )
        return obstacle
    ended = f"; ended {', '.join(raised.ended)}" if raised.ended else ""
    host.emit(
        events.FenceRaised(
            name=key,
            database=database,
            epoch=epoch,
            start=start,
            milliseconds=raised.milliseconds,
            ended=ended,
        )
    )
    return ""
