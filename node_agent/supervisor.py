"""All children of this host: one_for_one, each child a task of its own.

The supervisor owns the table of children and nothing else.  It turns messages of the warden and of worker
connections into messages for the child they are about, and it takes three kinds of orders: run this spec
(node-local, or under an ownership), stop that child, lose these names.  It never talks to etcd.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from node_agent.lifecycle import Child, Host
from node_agent.restarts import RestartWindow
from node_agent.spec.child import ChildSpec
from node_agent.states import ENDS, Ownership, Process, State
from node_agent.warden import protocol
from node_agent.warden_link import WardenLink
from registry import events


@dataclass(frozen=True, slots=True)
class Ending:
    """A child's task has ended: for its owner's next decision."""

    child: Child
    state: State


class Supervisor:
    """The children of this host, by key (global name, or id of a node-local child).

    ``on_change(child)`` is told every change of state; ``on_end(ending)`` when a child's task has ended.  A
    child with a name has left the table then: it is others' now.  A node-local one stays, to be seen as what
    it is and to be restarted by hand: nobody else will run it.  ``on_buried(key)`` is told when nothing is
    left of a process that :meth:`bury` was called for.
    """

    def __init__(
        self,
        host: Host,
        link: WardenLink,
        *,
        on_change: Callable[[Child], None],
        on_end: Callable[[Ending], None],
        on_buried: Callable[[str], None],
    ) -> None:
        self.children: dict[str, Child] = {}
        self._dying: dict[str, str] = {}
        self._host = host
        self._link = link
        self._on_change = on_change
        self._on_end = on_end
        self._on_buried = on_buried
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Pass the warden's messages on; raises if a child's task failed, which is a bug."""
        reader = asyncio.ensure_future(self._read())
        try:
            await asyncio.wait({reader, self._failure}, return_when=asyncio.FIRST_COMPLETED)
            for future in (reader, self._failure):
                if future.done():
                    future.result()
        finally:
            reader.cancel()

    async def _read(self) -> None:
        async for message in self._link.happenings():
            child = self.children.get(message.child)
            match message:
                case protocol.Exited() if child is not None:
                    child.exited(message)
                case protocol.Gone() if self._dying.get(message.child) == message.worker:
                    del self._dying[message.child]
                    self._on_buried(message.child)
                case protocol.Gone() if child is not None:
                    child.gone(message.worker)
                case _:
                    pass

    # Orders.

    def run_child(
        self, spec: ChildSpec, *, ownership: Ownership | None = None, window: RestartWindow | None = None
    ) -> Child:
        """Begin to run a spec; no child of its key may be alive."""
        return self._add(spec, ownership, window, adopt=None)

    def adopt(
        self,
        spec: ChildSpec,
        row: protocol.WorkerRow,
        ownership: Ownership | None,
        window: RestartWindow | None,
    ) -> Child:
        """Take over a process that a former agent had started; it serves after ``confirm``."""
        process = Process(row.worker, row.pid, row.start, row.since)
        return self._add(spec, ownership, window, adopt=process)

    def bury(self, row: protocol.WorkerRow) -> None:
        """Kill a process that nobody takes over; its key counts as running until nothing of it is left."""
        self._dying[row.child] = row.worker
        self._link.kill(row.worker)

    def _add(
        self,
        spec: ChildSpec,
        ownership: Ownership | None,
        window: RestartWindow | None,
        adopt: Process | None,
    ) -> Child:
        key = spec.name or spec.id
        assert not self.runs(key), key
        child = Child(
            spec, self._host, ownership=ownership, window=window, on_change=self._on_change, adopt=adopt
        )
        self.children[key] = child
        task = asyncio.create_task(self._accompany(child), name=f"child {key}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return child

    async def _accompany(self, child: Child) -> None:
        try:
            state = await child.run()
        except Exception as error:  # noqa: BLE001
            if not self._failure.done():
                self._failure.set_exception(error)
            return
        if child.ownership is not None:
            del self.children[child.key]
        self._on_end(Ending(child, state))

    def runs(self, key: str) -> bool:
        """Return whether a child of that key is alive, in whatever state, or not wholly dead yet."""
        child = self.children.get(key)
        return key in self._dying or (child is not None and child.state not in ENDS)

    def restart(self, key: str, why: str) -> None:
        """Stop a child and start it again, or start one that has ended.  Raises KeyError."""
        child = self.children[key]
        if child.state in ENDS:
            self.run_child(child.spec)
        else:
            child.stop(why, again=True)

    async def stop_all(self, why: str) -> None:
        """Stop every child, all at once: their order is that of one_for_one, none."""
        children = [child for child in self.children.values() if child.state not in ENDS]
        for child in children:
            child.stop(why)
        for child in children:
            await child.done.wait()

    def lose(self, key: str, epoch: int, why: str) -> Child | None:
        """Kill a child whose name is not ours any more at that epoch."""
        child = self.children.get(key)
        if child is None or child.epoch != epoch:
            return None
        self._host.emit(events.NameSuperseded(name=key, epoch=epoch, why=why))
        child.kill(why)
        return child

    def named(self) -> Iterator[Child]:
        """Yield the children that run under an ownership."""
        return (child for child in tuple(self.children.values()) if child.ownership is not None)

    def child_of(self, worker: str) -> Child | None:
        """Return whose process this is."""
        return next(
            (c for c in self.children.values() if c.process is not None and c.process.worker == worker), None
        )
