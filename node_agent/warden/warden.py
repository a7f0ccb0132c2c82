"""The warden: parent of the agent and of every worker, and the one that ends workers in time.

    RUNNING ──Stop passed on──▶ STOPPING ──agent done, dead or too slow──▶ ENDING ──nothing left──▶ exit
       └────────────────────────Shutdown, SIGQUIT───────────────────────────▶┘

It decides nothing about children: the agent does, and may be replaced at any time, unnoticed by the
workers. What it insists on by itself: no worker outlives the hard deadline of its lease, none starts under
a lease that is over, and a worker is *gone* only when nothing of it is left.

One thread, one loop.  Each turn looks at the deadlines first and does a bounded amount of work after that.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import os
import resource
import selectors
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, assert_never

from node_agent.warden import kernel, lifeline, protocol
from node_agent.warden.agent import Agent, State
from node_agent.warden.children import SWEEP_AGAIN, Children
from node_agent.warden.leases import Leases
from node_agent.warden.lifeline import LauncherSilent, Lifeline
from node_agent.warden.marker import WARDEN_VARIABLE, Marker
from node_agent.warden.output import Outputs
from node_agent.warden.preload import AGENT_ENTRY, WORKER_ENTRY, Image
from node_agent.warden.spawn import Birth

END_WITHIN = 5.0
"""Seconds after which the warden exits even if something cannot be killed."""
AGENT_LEAVES_WITHIN = 1.0
"""Seconds a finished agent has to end by itself."""
STALL = 1.0
"""Being woken this much later than planned means that this process was stopped or suspended."""
_REAPED_A_TURN = 64
_STOPS: Mapping[int, protocol.StopMode] = {
    signal.SIGTERM: "smart",
    signal.SIGINT: "fast",
    signal.SIGQUIT: "immediate",
}


class Phase(enum.Enum):
    """See the module's drawing."""

    RUNNING = "running"
    STOPPING = "stopping"
    ENDING = "ending"


class Warden:
    """``agent_argv`` is the agent's command line; the entries are those of :class:`Birth`.

    ``host_proc`` is an open /proc of the host's PID namespace, None if this process is in the same one.
    """

    def __init__(
        self,
        line: Lifeline,
        agent_argv: Sequence[str],
        *,
        containment: protocol.Containment,
        launcher_pid: int,
        host_proc: int | None,
        entry: str = WORKER_ENTRY,
        agent_entry: str = "",
    ) -> None:
        self._lifeline = line
        self._containment = containment
        self._launcher_pid = launcher_pid
        self._host_proc = host_proc
        self._image = Image()
        self._entries = tuple(filter(None, (entry, agent_entry)))
        marker = os.environ[WARDEN_VARIABLE]
        self._id = Marker.parse(marker).warden
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        birth = Birth(marker, entry, limit, self._image, agent_entry)
        self._selector = selectors.DefaultSelector()
        self._agent = Agent(agent_argv, birth, self._selector, self._take)
        self._leases = Leases()
        self._outputs = Outputs(self._selector, self._agent.tell, lambda: self._agent.busy)
        self._children = Children(
            self._selector, birth, self._leases, self._outputs,
            tell=self._agent.tell,
            before_fork=self._protect,
            host_pid=self._pid_on_host,
            stranger=lambda pid: pid == self._agent.pid,
        )  # fmt: skip
        self._remembered: dict[str, Any] = {}
        self._phase = Phase.RUNNING
        self._stop: protocol.StopMode | None = None
        self._give_up_at = float("inf")
        self._agent_leaves_by: float | None = None
        self._exit_code = 0
        self._child_ended = False
        self._awake_since = kernel.boottime()

    def run(self) -> None:
        """Hold everything until there is nothing left to hold."""
        _raise_file_limit()
        self._listen_to_signals()
        self._selector.register(self._lifeline.socket, selectors.EVENT_READ, self._launcher_spoke)
        if problem := self._image.fill(*self._entries):
            kernel.complain(f"warden: not everything could be imported: {problem}")
        self._agent.check(kernel.boottime())
        self._awake_since = kernel.boottime()
        while not self._done():
            self._turn()
        with contextlib.suppress(LauncherSilent):
            self._lifeline.end(self._exit_code)

    def _turn(self) -> None:
        began = kernel.boottime()
        planned = max(self._next_moment(), began)
        ready = self._selector.select(planned - began)
        now = kernel.boottime()
        self._end_leases(self._leases.expire(now))
        if now > planned + STALL or began > self._awake_since + STALL:
            # This process stood still, in its sleep or in the turn before.
            self._agent.excuse(now)
        self._awake_since = now
        self._outputs.divide(len(ready))
        for key, _ in ready:
            key.data()
        if self._child_ended:
            self._reap()
        self._children.sweep()
        self._keep_going(kernel.boottime())
        self._protect_all()

    def _next_moment(self) -> float:
        now = kernel.boottime()
        return min(
            self._leases.earliest() or float("inf"),
            self._agent.next_check() if self._phase is Phase.RUNNING else float("inf"),
            now + SWEEP_AGAIN if self._children.leaving else float("inf"),
            now if self._child_ended else float("inf"),
            self._give_up_at,
            self._agent_leaves_by or float("inf"),
        )

    # Deadlines.

    def _end_leases(self, leases: Sequence[int]) -> None:
        if leases:
            self._children.destroy_under(leases)

    def _protect(self, lease: int) -> str:
        """Have the launcher's timer cover a process under ``lease`` before there is one; else say why not."""
        try:
            self._arm({lease, *self._children.leases_in_use()})
        except LauncherSilent as silent:
            return str(silent)
        return ""

    def _protect_all(self) -> None:
        try:
            self._arm(self._children.leases_in_use())
        except LauncherSilent as silent:
            kernel.complain(f"warden: {silent}")

    def _arm(self, leases: set[int]) -> None:
        earliest = self._leases.earliest(leases)
        self._lifeline.arm(earliest + lifeline.GRACE if earliest is not None else None)

    # Signals and the dead.

    def _listen_to_signals(self) -> None:
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._wakeup = reader, writer
        for signum in (signal.SIGCHLD, signal.SIGHUP, *_STOPS):
            signal.signal(signum, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._selector.register(reader, selectors.EVENT_READ, self._signalled)

    def _signalled(self) -> None:
        for signum in self._wakeup[0].recv(4096):
            if signum == signal.SIGCHLD:
                self._child_ended = True
            elif signum == signal.SIGHUP:
                self._agent.tell(protocol.Reload())
            else:
                self._asked_to_stop(_STOPS[signum])

    def _reap(self) -> None:
        for _ in range(_REAPED_A_TURN):
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                dead = None
            if dead is None:
                self._child_ended = False
                return
            self._ended(dead)
            os.waitpid(dead.si_pid, 0)

    def _ended(self, dead: os.waitid_result) -> None:
        exited = dead.si_code == os.CLD_EXITED
        code, signum = (dead.si_status, None) if exited else (None, dead.si_status)
        if self._children.owns(dead.si_pid):
            self._children.ended(dead.si_pid, code, signum)
        elif dead.si_pid == self._agent.pid:
            if self._phase is Phase.RUNNING:
                how = f"exit code {code}" if exited else f"signal {signum}"
                kernel.complain(f"warden: agent {dead.si_pid} ended: {how}")
            self._agent.ended(kernel.boottime())
            self._outputs.unfollow_all()

    def _launcher_spoke(self) -> None:
        if self._lifeline.hears_end():
            os._exit(1)

    # The end.

    def _asked_to_stop(self, mode: protocol.StopMode) -> None:
        if mode == "immediate":
            self._end(0)
        elif self._phase is not Phase.ENDING:
            if self._phase is Phase.RUNNING:
                self._phase = Phase.STOPPING
                self._give_up_at = kernel.boottime() + self._agent.hello.stop_within
            self._stop = mode
            self._agent.tell(protocol.Stop(mode=mode))

    def _end(self, code: int) -> None:
        if self._phase is not Phase.ENDING:
            self._phase, self._exit_code = Phase.ENDING, code
            self._give_up_at = kernel.boottime() + END_WITHIN
            self._children.destroy_all()

    def _keep_going(self, now: float) -> None:
        """Do what is due by time, in the phase we are in."""
        match self._phase:
            case Phase.RUNNING:
                self._agent.check(now)
            case Phase.STOPPING:
                if self._agent.state is State.DOWN or now >= self._give_up_at:
                    self._end(0)
            case Phase.ENDING:
                self._see_agent_off(now)
            case _:
                assert_never(self._phase)

    def _see_agent_off(self, now: float) -> None:
        if len(self._children):
            return
        if self._agent_leaves_by is None:
            self._agent.hang_up()
            self._agent_leaves_by = now + AGENT_LEAVES_WITHIN
        elif now >= self._agent_leaves_by:
            self._agent.kill()
            self._agent_leaves_by = self._give_up_at

    def _done(self) -> bool:
        if self._phase is not Phase.ENDING:
            return False
        nothing_left = not len(self._children) and self._agent.state is State.DOWN
        return nothing_left or kernel.boottime() >= self._give_up_at

    # The agent's words.

    def _take(self, message: protocol.FromAgent) -> None:
        now = kernel.boottime()
        match message:
            case protocol.Hello():
                self._agent.pet(now)
                self._hand_over(message)
            case protocol.Pet():
                self._agent.pet(now)
            case protocol.RaiseDeadline():
                self._leases.raise_deadline(message.lease, message.deadline, now)
            case protocol.Forget():
                self._leases.end(message.lease)
                self._end_leases([message.lease])
            case protocol.Start():
                self._start(message, now)
            case protocol.Signal():
                self._children.signal(message.worker, message.signum, message.group)
            case protocol.Kill():
                self._children.kill(message.worker)
            case protocol.Remember():
                self._remembered[message.key] = message.value
                if message.value is None:
                    del self._remembered[message.key]
            case protocol.Output():
                self._outputs.answer(message.request, message.child, message.limit)
            case protocol.Follow():
                self._outputs.follow(message.child, message.on)
            case protocol.Drop():
                self._children.drop(message.child)
            case protocol.Shutdown():
                self._end(message.code)
            case _:
                assert_never(message)

    def _start(self, start: protocol.Start, now: float) -> None:
        if self._phase is Phase.ENDING:
            return
        self._children.start(start, now)

    def _hand_over(self, hello: protocol.Hello) -> None:
        self._agent.greet(hello)
        tell = self._agent.tell
        tell(
            protocol.Welcome(
                generation=self._agent.generation,
                containment=self._containment,
                warden=self._id,
                launcher_pid=self._launcher_pid,
                warden_pid=self._pid_on_host(os.getpid()),
                agent_pid=self._pid_on_host(self._agent.pid),
            )
        )
        for key, value in self._remembered.items():
            tell(protocol.Remember(key=key, value=value))
        for lease, deadline in self._leases:
            tell(protocol.Lease(lease=lease, deadline=deadline))
        for row in self._children.table():
            tell(row)
        tell(protocol.HandedOver())
        for end in self._children.ends():
            tell(end)
        if self._stop is not None:
            tell(protocol.Stop(mode=self._stop))

    def _pid_on_host(self, pid: int) -> int:
        """Return the pid by which the host knows a child; 0 if that cannot be found out."""
        if self._host_proc is None:
            return pid
        try:
            return kernel.host_pid(pid, self._host_proc)
        except OSError:
            return 0


def _raise_file_limit() -> None:
    """Allow two descriptors for each of a thousand workers; the workers get the old limit back."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def parser() -> argparse.ArgumentParser:
    """Return the parser of what the launcher puts on the command line."""
    made = argparse.ArgumentParser(prog="pgherd-warden", description="Started by the launcher.")
    made.add_argument("--lifeline", type=int, required=True, help="descriptor of the socket to the launcher")
    made.add_argument("--launcher", type=int, required=True, help="the launcher's pid")
    made.add_argument("--host-proc", type=int, help="descriptor of the host's /proc, in a namespace")
    made.add_argument("--containment", choices=("full", "partial"), required=True)
    made.add_argument("-c", dest="config", required=True, help="the agent's configuration file")
    return made


def hold(
    argv: Sequence[str], agent_argv: Sequence[str], entry: str = WORKER_ENTRY, agent_entry: str = ""
) -> int:
    """Be the warden of ``agent_argv``; ``argv`` comes from the launcher.  Returns the exit code."""
    options = parser().parse_args(argv)
    os.set_inheritable(options.lifeline, False)
    if options.host_proc is not None:
        os.set_inheritable(options.host_proc, False)
    if os.getpid() != 1:
        kernel.adopt_orphans()
    Warden(
        Lifeline(options.lifeline),
        [*agent_argv, "-c", options.config],
        containment=options.containment,
        launcher_pid=options.launcher,
        host_proc=options.host_proc,
        entry=entry,
        agent_entry=agent_entry,
    ).run()
    return 0


if __name__ == "__main__":
    sys.exit(hold(sys.argv[1:], (sys.executable, "-P", "-m", "node_agent"), agent_entry=AGENT_ENTRY))
