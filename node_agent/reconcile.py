"""What etcd says this node owns against what it really runs, compared every second.

A claim can commit after its sender gave up, an agent can die between claim and start, and a watch can lose
an event.  Each of these leaves an owner key without a process, or a process without an owner key, for ever,
unless somebody compares.  A difference seen in the directory is acted on only after a linearizable read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from node_agent.supervisor import Supervisor
from registry import events
from registry.directory import Directory
from registry.names import Names
from registry.ownership import Owner

EVERY = 1.0
"""Seconds between comparisons."""


@dataclass(frozen=True, slots=True)
class Idle:
    """An owner key of this node without a process."""

    owner: Owner


@dataclass(frozen=True, slots=True)
class Stray:
    """A child whose owner key is not this node's at its epoch."""

    name: str
    epoch: int


def differences(
    owners: Collection[Owner], node: str, running: Mapping[str, int], pending: Collection[str]
) -> list[Idle | Stray]:
    """Compare the directory's owners with the running epochs by name; ``pending`` names are left alone."""
    mine = {owner.name: owner for owner in owners if owner.node == node}
    found: list[Idle | Stray] = [
        Idle(owner)
        for name, owner in mine.items()
        if name not in pending and running.get(name) != owner.epoch
    ]
    found += [
        Stray(name, epoch)
        for name, epoch in running.items()
        if name not in pending and (name not in mine or mine[name].epoch != epoch)
    ]
    return found


class Reconciler:
    """Carries the comparison out for one node."""

    def __init__(
        self,
        node: str,
        directory: Directory,
        names: Names,
        supervisor: Supervisor,
        pending: Callable[[], Collection[str]],
        emit: Callable[[events.Event], None],
    ) -> None:
        self._node, self._directory, self._names = node, directory, names
        self._supervisor, self._pending, self._emit = supervisor, pending, emit

    async def once(self) -> None:
        """Compare and repair.  Raises StoreError when etcd cannot be asked; nothing is changed then."""
        if not self._directory.in_sync:
            return
        running = {child.key: child.epoch for child in self._supervisor.named()}
        for difference in differences(
            tuple(self._directory.owners.values()), self._node, running, self._pending()
        ):
            match difference:
                case Idle(owner):
                    current = await self._names.read_owner(owner.name)
                    child = self._supervisor.children.get(owner.name)
                    if current is None or current.epoch != owner.epoch or owner.name in self._pending():
                        continue
                    if child is None or child.epoch != owner.epoch:
                        await self._names.release(owner.name, owner.epoch, "owned, but no process runs")
                        self._emit(
                            events.NameReleased(
                                name=owner.name, epoch=owner.epoch, why="owned, but no process ran"
                            )
                        )
                case Stray(name, epoch):
                    current = await self._names.read_owner(name)
                    if current is None or current.epoch != epoch:
                        self._supervisor.lose(name, epoch, "the owner key in etcd is not ours")
