"""The table of workers: one row per child, from its start until nothing of the process is left.

    starting ──exec──▶ running ──reaped──▶ exited ──nothing left──▶ gone
        └──cannot exec──▶ (no row: StartFailed)

A worker is more than its main process.  What else belongs to it is found by its session (every worker leads
one), by descent, and by the marker in the environment it was executed with.  When the main process ends, its
children become children of the warden (init of the namespace, or subreaper), so all there is to look at then
are the warden's own children.  A process that left its session, wiped its environment and lost its parent
before its worker ended cannot be told from others; it dies with the warden.
"""

from __future__ import annotations

import os
import resource
import selectors
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from node_agent.warden import kernel, protocol
from node_agent.warden.leases import Leases
from node_agent.warden.marker import WORKER_VARIABLE
from node_agent.warden.output import Outputs
from node_agent.warden.spawn import Birth, Forked

SWEEP_AGAIN = 0.01
"""Seconds until the next look at an ended worker of which something was left."""
SPARE_FILES = 64
"""Descriptors that workers never get: without one the warden cannot see what a worker has left behind."""
USER_CAPABILITIES = (kernel.CAP_KILL, kernel.CAP_SETGID, kernel.CAP_SETUID)
"""What it takes to run a worker as another user, and to be able to kill it then."""


@dataclass(slots=True, eq=False)
class _Worker:
    start: protocol.Start
    process: Forked
    host_pid: int
    since: float
    state: protocol.WorkerState = "starting"
    code: int | None = None
    signal: int | None = None
    reason: protocol.Reason = "own"
    failure: str = ""
    shown: bool = False
    """An agent that did not ask for it knows of it: so it must be seen to end, even if it never was."""
    holds_lease: bool = True
    """Something of it may act: nobody has sent SIGKILL to everything found of it."""

    def row(self) -> protocol.WorkerRow:
        start = self.start
        return protocol.WorkerRow(
            worker=start.worker, child=start.child, name=start.name, lease=start.lease, epoch=start.epoch,
            start=start.start, pid=self.host_pid, state=self.state, since=self.since, code=self.code,
            signal=self.signal, reason=self.reason,
        )  # fmt: skip

    def exited(self) -> protocol.Exited:
        start = self.start
        return protocol.Exited(
            worker=start.worker, child=start.child, name=start.name, epoch=start.epoch, start=start.start,
            pid=self.host_pid, code=self.code, signal=self.signal, reason=self.reason,
        )  # fmt: skip

    def gone(self) -> protocol.Gone:
        return protocol.Gone(worker=self.start.worker, child=self.start.child)


class Children:
    """All workers of this warden.

    ``tell`` sends a message to the agent; ``before_fork`` is called with a lease before a process is made
    under it and returns why that must not be; ``host_pid`` translates a pid; ``stranger`` knows the children
    of the warden that are no workers.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        birth: Birth,
        leases: Leases,
        outputs: Outputs,
        *,
        tell: Callable[[protocol.FromWarden], None],
        before_fork: Callable[[int], str],
        host_pid: Callable[[int], int],
        stranger: Callable[[int], bool],
    ) -> None:
        self._selector = selector
        self._birth = birth
        self._leases = leases
        self._outputs = outputs
        self._tell = tell
        self._before_fork = before_fork
        self._host_pid = host_pid
        self._stranger = stranger
        self._rows: dict[str, _Worker] = {}
        self._counted: dict[str, tuple[int, int]] = {}
        self._alive: dict[str, _Worker] = {}
        self._by_pid: dict[int, _Worker] = {}
        self._leaving: list[_Worker] = []
        self._in_use: Counter[int] = Counter()
        self._may_change_user = kernel.has_capabilities(*USER_CAPABILITIES)
        self._room = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_FILES

    # What there is.

    def __len__(self) -> int:
        """Return of how many workers something may be left."""
        return len(self._alive)

    @property
    def leaving(self) -> bool:
        """Something of an ended worker was left at the last sweep."""
        return bool(self._leaving)

    def leases_in_use(self) -> set[int]:
        """Return the leases under which something may still act."""
        return {lease for lease, workers in self._in_use.items() if lease and workers}

    def table(self) -> Iterable[protocol.WorkerRow | protocol.Counted]:
        """Return all rows and counts."""
        for worker in self._rows.values():
            worker.shown = True
            yield worker.row()
        for name, (epoch, start) in self._counted.items():
            yield protocol.Counted(name=name, epoch=epoch, start=start)

    def ends(self) -> Iterable[protocol.Exited | protocol.Gone]:
        """Return again what was said about the workers that have ended."""
        for worker in self._rows.values():
            if worker.state in ("exited", "gone"):
                yield worker.exited()
            if worker.state == "gone":
                yield worker.gone()

    # What the agent asks for.

    def start(self, start: protocol.Start, now: float) -> None:
        """Fork the process of ``start``, or say why not; Started or StartFailed follows after exec."""
        if refusal := self._refusal(start, now) or self._before_fork(start.lease):
            self._refuse(start, refusal)
            return
        try:
            process = self._birth.worker(start)
        except OSError as error:
            self._refuse(start, f"no process can be made: {error.strerror}")
            return
        worker = _Worker(start, process, self._host_pid(process.pid), now)
        self._rows[start.child] = self._alive[start.worker] = self._by_pid[process.pid] = worker
        self._counted[start.child] = (start.epoch, start.start)
        self._in_use[start.lease] += 1
        self._outputs.attach(process.output, start.child)
        self._selector.register(process.errors, selectors.EVENT_READ, lambda: self._executed(worker))

    def signal(self, worker: str, signum: int, group: bool) -> None:
        """Signal a main process that has not ended, or its group."""
        found = self._alive.get(worker)
        if found is not None and found.process.pid in self._by_pid:
            (kernel.kill_group if group else kernel.kill)(found.process.pid, signum)

    def kill(self, worker: str) -> None:
        """SIGKILL all of one worker."""
        if worker in self._alive:
            self._destroy([self._alive[worker]], "killed")

    def drop(self, child: str) -> None:
        """Forget a child of which nothing is left."""
        worker = self._rows.get(child)
        if worker is None or worker.state == "gone":
            self._rows.pop(child, None)
            self._counted.pop(child, None)
            self._outputs.drop(child)

    def destroy_under(self, leases: Iterable[int]) -> None:
        """SIGKILL everything that runs under ``leases``, which are over."""
        over = set(leases) - {0}
        self._destroy([worker for worker in self._alive.values() if worker.start.lease in over], "deadline")

    def destroy_all(self) -> None:
        """SIGKILL every worker."""
        self._destroy(list(self._alive.values()), "shutdown")

    # What the kernel reports.

    def owns(self, pid: int) -> bool:
        """Tell whether ``pid`` is the main process of a worker."""
        return pid in self._by_pid

    def ended(self, pid: int, code: int | None, signum: int | None) -> None:
        """Take note of the end of a main process.

        It must be a zombie still: then its pid, which is also its group's, cannot be anybody else's.
        """
        worker = self._by_pid[pid]
        if worker.state == "starting":
            self._executed(worker)
        kernel.kill_group(pid)
        del self._by_pid[pid]
        if worker.failure and not worker.shown:
            self._never_was(worker)
            return
        worker.state, worker.code, worker.signal = "exited", code, signum
        if signum != signal.SIGKILL:
            worker.reason = "own"
        self._leaving.append(worker)
        self._tell(worker.exited())

    def sweep(self) -> None:
        """Kill what ended workers left behind; a worker of which nothing is left is gone."""
        if not self._leaving:
            return
        left = self._orphans()
        _kill_trees(pid for pid, owner in left if owner in self._leaving)
        owners = {owner for _, owner in left}
        if None in owners:
            return
        for worker in [worker for worker in self._leaving if worker not in owners]:
            self._leaving.remove(worker)
            worker.state = "gone"
            self._release(worker)
            self._tell(worker.gone())

    def _refusal(self, start: protocol.Start, now: float) -> str:
        epoch, count = self._counted.get(start.child, (start.epoch, 0))
        expected = count + 1 if epoch == start.epoch else 1
        before = self._rows.get(start.child)
        if not start.worker or start.worker in self._alive or not (start.command or start.behaviour):
            return f"not a start: {start!r}"
        if start.name and not start.lease:
            return f"{start.name} has a global name, so it needs a lease"
        if not self._leases.holds(start.lease, now):
            return f"lease {start.lease:x} is unknown or over"
        if len(self._alive) >= self._room:
            return f"{len(self._alive)} workers are all that the limit of open files allows"
        if before is not None and before.state != "gone":
            return f"{start.child} still runs as pid {before.host_pid} (start {before.start.start})"
        if start.epoch < epoch:
            return f"epoch {start.epoch} of {start.child} is over, {epoch} was started here"
        if start.start != expected:
            return f"{start.child}: start {start.start} of epoch {start.epoch} instead of {expected}"
        if start.user and not self._may_change_user and start.user != kernel.own_user():
            return f"user = {start.user!r} needs CAP_SETUID, CAP_SETGID and CAP_KILL, which pgherd lacks"
        return ""

    def _refuse(self, start: protocol.Start, why: str) -> None:
        _, counted = self._counted.get(start.child, (0, 0))
        self._tell(protocol.StartFailed(worker=start.worker, why=why, refused=True, counted=counted))

    def _executed(self, worker: _Worker) -> None:
        """The pipe for errors before exec has something to say, or has ended."""
        words = os.read(worker.process.errors, 4096)
        self._selector.unregister(worker.process.errors)
        os.close(worker.process.errors)
        worker.state = "running"
        worker.failure = words.decode(errors="replace")
        if not words:
            self._tell(protocol.Started(worker=worker.start.worker, pid=worker.host_pid))

    def _never_was(self, worker: _Worker) -> None:
        start = worker.start
        del self._rows[start.child]
        self._counted[start.child] = (start.epoch, start.start - 1)
        self._release(worker)
        self._tell(
            protocol.StartFailed(
                worker=start.worker, why=worker.failure, refused=False, counted=start.start - 1
            )
        )

    def _release(self, worker: _Worker) -> None:
        del self._alive[worker.start.worker]
        self._let_go_of_lease(worker)
        self._outputs.detach(worker.process.output, worker.start.child)

    def _let_go_of_lease(self, worker: _Worker) -> None:
        if worker.holds_lease:
            worker.holds_lease = False
            self._in_use[worker.start.lease] -= 1
            if not self._in_use[worker.start.lease]:
                del self._in_use[worker.start.lease]

    def _destroy(self, workers: list[_Worker], reason: protocol.Reason) -> None:
        """SIGKILL whatever belongs to ``workers``; sweeps go on with what escapes by forking meanwhile."""
        for worker in workers:
            pid = worker.process.pid
            if pid in self._by_pid:
                worker.reason = reason
                below = kernel.descendants(pid)
                kernel.kill_group(pid)
                kernel.kill(pid)
                for each in below:
                    kernel.kill(each)
        if workers:
            doomed = set(workers)
            _kill_trees(pid for pid, owner in self._orphans() if owner in doomed)
        for worker in workers:
            self._let_go_of_lease(worker)

    def _orphans(self) -> list[tuple[int, _Worker | None]]:
        """Return the children of the warden that some worker left behind.

        One that is dying does not show any more whose it was (None), so it counts for everybody.
        """
        left = (pid for pid in kernel.children(os.getpid()) if not (self.owns(pid) or self._stranger(pid)))
        owners = ((pid, self._owner(pid)) for pid in left)
        return [(pid, owner) for pid, owner in owners if owner is not None or kernel.is_dying(pid)]

    def _owner(self, pid: int) -> _Worker | None:
        for variable in kernel.environment(pid):
            key, _, value = variable.partition(b"=")
            if key == WORKER_VARIABLE.encode() and (owner := self._alive.get(value.decode(errors="replace"))):
                return owner
        session = kernel.session_of(pid)
        leader = self._by_pid.get(session)
        return leader or next((each for each in self._leaving if each.process.pid == session), None)


def _kill_trees(roots: Iterable[int]) -> None:
    for root in roots:
        below = kernel.descendants(root)
        for each in (root, *below):
            kernel.kill(each)
