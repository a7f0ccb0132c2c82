"""What children need of the agent around them, made of its parts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from node_agent import adoption
from node_agent.lifecycle import Child
from node_agent.postgres.fence import FenceRaiser
from node_agent.restarts import RestartWindow
from node_agent.warden_link import WardenLink
from registry import events
from registry.clock import SYSTEM_CLOCK, Boottime, Clock
from registry.errors import StoreError
from registry.ownership import Owner


@dataclass
class ChildHost:
    """What children need of this agent (:class:`node_agent.lifecycle.Host`)."""

    cluster: str
    host: str
    socket: str
    link: WardenLink
    fences: FenceRaiser
    log: events.EventLog
    conninfos: Mapping[str, str]
    until: Callable[[], Boottime]
    read_owner: Callable[[str], Awaitable[Owner | None]]
    clock: Clock = SYSTEM_CLOCK
    counted: dict[tuple[str, int], int] = field(default_factory=dict)

    def emit(self, event: events.Event) -> None:
        self.log(event)

    def last_start(self, key: str, epoch: int) -> int:
        return self.counted.get((key, epoch), 0)

    def forget(self, key: str) -> None:
        """Forget the counts of a name that has ended here: its next epoch starts at 1."""
        for counted in [counted for counted in self.counted if counted[0] == key]:
            del self.counted[counted]

    def may_act_until(self) -> Boottime:
        return self.until()

    def started(self, child: Child, start: int) -> None:
        self.counted[child.key, child.epoch] = start

    async def still_owns(self, child: Child) -> bool:
        try:
            owner = await self.read_owner(child.key)
        except StoreError:
            return False
        return owner is not None and owner.epoch == child.epoch

    def note(self, child: Child, window: RestartWindow) -> None:
        self.link.remember(adoption.child_key(child.key), adoption.child_note(child, window))
