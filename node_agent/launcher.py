"""The process that ``pgherd run`` becomes: it holds a kernel timer, keeps a warden alive, and waits.

    launcher ── fork, into a PID namespace of its own where that is allowed ──▶ warden ──▶ agent, workers

The timer is its reason to exist.  It sends SIGKILL to this process a moment after the hard deadline of any
lease that has workers, even if everything below is stopped; the warden dies with its parent, and in a
namespace every process dies with the warden.  It cannot help while the kernel does not run us at all: a
frozen cgroup (``docker pause``) or virtual machine must thaw first, and then only the fence in the database
counts.

*Containment* is ``full`` where the warden is the init of a namespace, or where this was the first process
of a container: then the launcher runs below an init that takes the container down with it.  Elsewhere it is
``partial``: only the parent-death signal and the markers tie processes to us.  So before a warden starts,
what a former one left behind is killed.  User namespaces would give full containment to everybody, but they
break set-uid programs and ``user =`` for the workers, so they are not used.

In the namespace pids are small numbers of its own: pid files, ``$$`` and postmaster.pid show those,
``pgherd`` shows the host's.  Who needs daemons to know their host pid runs with ``--partial``.

Imports little: this process stays small, and no upgrade replaces it while the service runs.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from node_agent.warden import kernel
from node_agent.warden.lifeline import Kind, Order
from node_agent.warden.marker import NO_WORKER, WARDEN_VARIABLE, WORKER_VARIABLE, Marker, marked
from node_agent.warden.respawn import Respawn

OOM_SCORE = -900
IMMEDIATE_WITHIN = 10.0
"""Seconds a warden may take to end after SIGQUIT, and the remains of one when everything stops."""
GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
"""How the agent's gRPC does I/O unless the environment says: in the thread that waits for completions.  The
default engine hands each read to a thread of its own first, a quarter of the time of a small message.  gRPC
reads this when it is loaded, which the warden does; children do not inherit it."""

_LOOK_AGAIN = 0.02
_COMPLAIN_EVERY = 10.0
_STOPS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})
_FORWARDED = _STOPS | {signal.SIGHUP}
_USAGE = "usage: python -m node_agent.launcher [--partial] -c FILE"


class AlreadyRunning(Exception):
    """Another launcher runs the same configuration."""


class NoNamespace(Exception):
    """The warden cannot have a PID namespace of its own, and why."""


@dataclass(frozen=True, slots=True)
class _Warden:
    pid: int
    line: socket.socket
    since: float


class Launcher:
    """``command`` executes the warden, with descriptors and the configuration file added.

    ``namespace``: try for a PID namespace.  ``contained``: all processes die with this one anyway.
    """

    def __init__(self, config: str, command: Sequence[str], *, namespace: bool, contained: bool) -> None:
        self._config = config
        self._command = command
        self._namespace = namespace
        self._contained = contained
        self._timer = kernel.SuicideTimer()
        self._respawn = Respawn()
        self._warden: _Warden | None = None
        self._warden_ended = False
        self._stopping = False
        self._exit_code = 0
        self._kill_warden_at = float("inf")

    def run(self) -> int:
        """Keep a warden alive until everything is to stop; return the exit code.

        Raises :class:`AlreadyRunning`.
        """
        kernel.adopt_orphans()
        self._listen_to_signals()
        self._clear_away()
        while not self._stopping:
            warden = self._start()
            if warden is None:
                break
            self._attend(warden)
            self._clear_away()
            self._timer.arm(None)
            if not self._stopping:
                kernel.complain(f"launcher: warden {warden.pid} has died, and everything with it")
                self._rest(self._respawn.pause(kernel.boottime() - warden.since))
        return self._exit_code

    # One warden.

    def _start(self) -> _Warden | None:
        while True:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                pid = self._fork(theirs)
            except NoNamespace as why:
                kernel.complain(f"launcher: no PID namespace: {why}")
                self._namespace = False
            except OSError as error:
                kernel.complain(f"launcher: no process for the warden: {error.strerror}")
                if self._stopping:
                    ours.close()
                    return None
                self._rest(self._respawn.pause(0.0))
            else:
                self._warden_ended = False
                self._warden = _Warden(pid, ours, kernel.boottime())
                return self._warden
            finally:
                theirs.close()
            ours.close()

    def _fork(self, line: socket.socket) -> int:
        """Fork and execute the warden.  Raises :class:`NoNamespace` or OSError.

        It is born with the signals blocked that it will get from here, until it has handlers for them: the
        init of a namespace never sees a signal that comes before its handler.
        """
        marker = Marker.new(self._config)
        parent = os.getpid()
        said, say = os.pipe2(os.O_CLOEXEC)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
        with open(said, "rb") as failure:
            try:
                with _namespace_for_child() if self._namespace else contextlib.nullcontext():
                    pid = os.fork()
                    if pid == 0:
                        _never_return(say, lambda: self._become_warden(line, marker, parent))
            finally:
                os.close(say)
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            why = failure.read().decode(errors="replace")
        if why and self._namespace:
            os.waitpid(pid, 0)
            raise NoNamespace(why)
        if why:
            kernel.complain(f"launcher: the warden cannot be executed: {why}")
        return pid

    def _become_warden(self, line: socket.socket, marker: Marker, launcher: int) -> NoReturn:
        _forget_signals()
        os.setsid()
        arguments = ["--lifeline", str(line.fileno()), "--launcher", str(launcher), "-c", self._config]
        if self._namespace:
            host_proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
            os.set_inheritable(host_proc, True)
            arguments += ["--host-proc", str(host_proc)]
            kernel.remount_proc()
        contained = self._namespace or self._contained
        arguments += ["--containment", "full" if contained else "partial"]
        os.set_inheritable(line.fileno(), True)
        environment = {
            "GRPC_EXPERIMENTS": GRPC_EXPERIMENTS,
            **os.environ,
            WARDEN_VARIABLE: marker.text(),
            WORKER_VARIABLE: NO_WORKER,
        }
        kernel.die_with_parent()
        if not self._namespace and os.getppid() != launcher:
            raise OSError("the launcher died")
        os.execve(self._command[0], [*self._command, *arguments], environment)

    def _attend(self, warden: _Warden) -> None:
        """Do what the warden asks for until it has ended."""
        while not self._warden_ended:
            self._wait(self._kill_warden_at - kernel.boottime())
            if kernel.boottime() >= self._kill_warden_at:
                kernel.kill(warden.pid)
                self._kill_warden_at = float("inf")
        self._hear(warden.line)
        warden.line.close()
        self._warden = None

    def _hear(self, line: socket.socket) -> bool:
        """Follow the orders that have arrived; False when no more can come."""
        while True:
            try:
                packet = line.recv(64, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not packet:
                return False
            order = Order.read(packet)
            if order.kind is Kind.END:
                self._stopping, self._exit_code = True, int(order.value)
                continue
            self._timer.arm(order.value or None)
            if order.kind is Kind.ARM_AND_ACKNOWLEDGE:
                # The warden may have died since; what it armed is in force all the same.
                with contextlib.suppress(OSError):
                    line.send(packet, socket.MSG_DONTWAIT)

    # Signals, time, the dead.

    def _listen_to_signals(self) -> None:
        self._wakeup, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for signum in (signal.SIGCHLD, *_FORWARDED):
            signal.signal(signum, lambda *_: None)

    def _wait(self, seconds: float) -> None:
        """Wait for an order or a signal, not longer than so many seconds, and deal with it."""
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        if self._warden is not None and self._warden.line.fileno() >= 0:
            poll.register(self._warden.line, select.POLLIN)
        timeout = None if seconds == float("inf") else max(seconds, 0.0) * 1000
        for fd, _ in poll.poll(timeout):
            if fd == self._wakeup:
                for signum in os.read(self._wakeup, 4096):
                    self._signalled(signum)
            elif self._warden is not None and not self._hear(self._warden.line):
                self._warden.line.close()

    def _signalled(self, signum: int) -> None:
        if signum == signal.SIGCHLD:
            self._reap()
            return
        if signum in _STOPS:
            self._stopping = True
        if signum == signal.SIGQUIT:
            self._kill_warden_at = kernel.boottime() + IMMEDIATE_WITHIN
        if self._warden is not None:
            kernel.kill(self._warden.pid, signum)

    def _reap(self) -> None:
        try:
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                if self._warden is not None and pid == self._warden.pid:
                    self._warden_ended = True
        except ChildProcessError:
            return

    def _rest(self, seconds: float) -> None:
        until = kernel.boottime() + seconds
        while not self._stopping and (left := until - kernel.boottime()) > 0:
            self._wait(left)

    def _clear_away(self) -> None:
        """Kill what former wardens left behind, until nothing of it is left.

        No warden is started before that.  What cannot be killed holds up a stop for a limited time only.
        """
        since = complained = kernel.boottime()
        while left := self._remains():
            for pid in left:
                for each in (pid, *kernel.descendants(pid)):
                    kernel.kill(each)
            now = kernel.boottime()
            if self._stopping and now > since + IMMEDIATE_WITHIN:
                return
            if now > complained + _COMPLAIN_EVERY:
                complained = now
                kernel.complain(f"launcher: waiting for {left}, killed {now - since:.0f} s ago")
            self._wait(_LOOK_AGAIN)

    def _remains(self) -> set[int]:
        self._reap()
        left = set(kernel.children(os.getpid()))
        for pid, marker in marked(self._config):
            if marker.launcher != os.getpid() and marker.launcher_lives():
                raise AlreadyRunning(f"launcher {marker.launcher} runs {self._config} already")
            left.add(pid)
        return left - {os.getpid()}


@contextlib.contextmanager
def _namespace_for_child() -> Iterator[None]:
    try:
        kernel.enter_pid_namespace()
    except OSError as error:
        raise NoNamespace(error.strerror) from error
    try:
        yield
    finally:
        kernel.leave_pid_namespace()


def _forget_signals() -> None:
    signal.set_wakeup_fd(-1)
    for signum in (signal.SIGCHLD, *_FORWARDED):
        signal.signal(signum, signal.SIG_DFL)


def _never_return(say: int, become: Callable[[], NoReturn]) -> NoReturn:
    try:
        become()
    except BaseException as error:  # noqa: BLE001 - this process is not the launcher
        os.write(say, f"{type(error).__name__}: {error}".encode(errors="replace")[:4000])
    finally:
        os._exit(127)


def _run_below_init() -> int | None:
    """Fork; the child returns None and goes on, this process is the init of the container until that ends.

    The first process of a PID namespace ignores its own SIGKILL, so it cannot hold the launcher's timer.
    """
    watched = {signal.SIGCHLD, *_FORWARDED}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    launcher = os.fork()
    if launcher == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        return None
    while True:
        signum = signal.sigwait(watched)
        if signum != signal.SIGCHLD:
            kernel.kill(launcher, signum)
            continue
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == launcher:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            if pid == 0:
                break


def launch(config: str, command: Sequence[str], *, namespace: bool = True) -> int:
    """Run the service of ``config`` until it is stopped; return the exit code."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    contained = os.getpid() == 1
    if contained and (code := _run_below_init()) is not None:
        return code
    kernel.set_oom_score(OOM_SCORE)
    try:
        return Launcher(os.path.abspath(config), command, namespace=namespace, contained=contained).run()
    except AlreadyRunning as error:
        kernel.complain(f"launcher: {error}")
        return 1


def main(argv: Sequence[str]) -> int:
    """Run ``-c FILE``; with ``--partial`` no PID namespace is tried.  Returns the exit code."""
    options = [argument for argument in argv if argument != "--partial"]
    if len(options) != 2 or options[0] != "-c":
        kernel.complain(_USAGE)
        return 2
    warden = (sys.executable, "-P", "-m", "node_agent.warden.warden")
    return launch(options[1], warden, namespace="--partial" not in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
