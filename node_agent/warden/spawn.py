"""Birth of a process: from fork in the warden to exec, or to the runtime of a behaviour, in the child.

The order in the child is the point.  User and group come before prctl(PR_SET_PDEATHSIG), because a change of
credentials undoes that; the look at the parent comes after it, because the parent may have died in between;
and the warden has one thread only, because the signal comes when the *thread* that forked ends.

Whatever fails in the child before exec is written as one line to a pipe that exec closes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from node_agent.warden import kernel
from node_agent.warden.marker import WARDEN_VARIABLE, WORKER_VARIABLE
from node_agent.warden.preload import Image, load
from node_agent.warden.protocol import Start

_PASSED_ON = ("LANG", "TZ")
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_IGNORED_BY_PYTHON = frozenset({signal.SIGPIPE, signal.SIGXFSZ})
_FAILED = 127


@dataclass(frozen=True, slots=True)
class Forked:
    """A new process; ``output`` and ``errors`` are read ends, the latter ends at exec."""

    pid: int
    output: int
    errors: int


@dataclass(frozen=True, slots=True)
class Birth:
    """What every child of this warden is born with.

    ``entry`` is "module:function", called with the :class:`Start` of a behaviour, ``agent_entry`` what is
    called for an agent that can be forked from ``image``; without it, or when the image is old, the agent is
    executed.  ``open_files`` is their limit, whatever the warden has raised its own to.
    """

    marker: str
    entry: str
    open_files: tuple[int, int]
    image: Image
    agent_entry: str = ""

    def worker(self, start: Start) -> Forked:
        """Fork a worker.  Raises OSError if there can be no process or pipe."""
        parent = os.getpid()
        with contextlib.ExitStack() as on_failure:
            output, output_end = _pipe(on_failure)
            errors, errors_end = _pipe(on_failure)
            pid = _fork()
            if pid == 0:
                _run(errors_end, lambda: self._become_worker(start, parent, output_end, errors_end))
            on_failure.pop_all()
        os.close(output_end)
        os.close(errors_end)
        return Forked(pid, output, errors)

    def agent(self, argv: Sequence[str], control: int) -> int:
        """Fork the agent and return its pid; it inherits ``control`` and this process's stdout and stderr."""
        parent = os.getpid()
        pid = _fork()
        if pid == 0:
            _run(2, lambda: self._become_agent(argv, parent, control))
        return pid

    def _become_agent(self, argv: Sequence[str], parent: int, control: int) -> NoReturn:
        self._detach(frozenset({0, 1, 2, control}))
        os.set_inheritable(control, True)
        if os.geteuid():
            kernel.drop_capabilities()
        _tie_to(parent)
        os.environ.pop(WORKER_VARIABLE, None)
        if self.agent_entry and self.image.is_current():
            kernel.rename_process("pgherd: agent")
            for signum in _IGNORED_BY_PYTHON:
                signal.signal(signum, signal.SIG_IGN)
            sys.argv = ["pgherd-agent", *argv[argv.index("node_agent") + 1 :]]
            _live(load(self.agent_entry))
        _execute(argv, os.environ)

    def _become_worker(self, start: Start, parent: int, output: int, errors: int) -> NoReturn:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        self._detach(frozenset({0, 1, 2, errors}))
        home = _become_user(start.user)
        if start.cwd:
            _change_directory(start.cwd)
        if os.geteuid():
            kernel.drop_capabilities()
        _tie_to(parent)
        environment = self._environment(start, home)
        if start.command is not None:
            _execute(start.command, environment)
        self._behave(start, environment, errors)

    def _detach(self, keep: frozenset[int]) -> None:
        """Leave everything of the warden behind: session, signals, descriptors, limits."""
        os.setsid()
        for signum in signal.valid_signals():
            if signal.getsignal(signum) is not signal.SIG_DFL:
                signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        below = 0
        for fd in (*sorted(keep), os.sysconf("SC_OPEN_MAX")):
            if below < fd:  # of an empty range Python would make close_range(0, ~0)
                os.closerange(below, fd)
            below = fd + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, self.open_files)
        kernel.set_oom_score(0)

    def _environment(self, start: Start, home: str) -> dict[str, str]:
        environment = {"PATH": os.environ.get("PATH", _DEFAULT_PATH), "HOME": home}
        environment |= {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        environment |= start.env
        return environment | {WARDEN_VARIABLE: self.marker, WORKER_VARIABLE: start.worker}

    def _behave(self, start: Start, environment: Mapping[str, str], errors: int) -> NoReturn:
        os.environ.clear()
        os.environ.update(environment)
        kernel.rewrite_environment(WORKER_VARIABLE, start.worker)
        kernel.rename_process(f"pgherd: {start.child}")
        for signum in _IGNORED_BY_PYTHON:
            signal.signal(signum, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)
        run = load(self.entry)
        os.close(errors)
        _live(run, start)


def _live(run: Callable[..., object], *arguments: object) -> NoReturn:
    """Run a behaviour, or the agent; it is the whole process, and its errors go to its output."""
    code = 0
    try:
        answer = run(*arguments)
        code = answer if isinstance(answer, int) else 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - it must not unwind into the warden's loop
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _pipe(opened: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe2(os.O_CLOEXEC)
    for end in ends:
        opened.callback(os.close, end)
    return ends


def _fork() -> int:
    """Fork with all signals blocked, so that no handler of the warden runs in the child."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
    except OSError:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    if pid == 0:
        signal.set_wakeup_fd(-1)
    else:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _run(errors: int, become: Callable[[], NoReturn]) -> NoReturn:
    """Never return to the warden's code: this process is not the warden."""
    try:
        become()
    except _CannotBe as why:
        _write(errors, str(why))
    except BaseException as error:  # noqa: BLE001 - it must not unwind into the warden's loop
        _write(errors, f"{type(error).__name__}: {error}")
    finally:
        os._exit(_FAILED)


def _write(fd: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(fd, text.encode(errors="replace")[:4000])


class _CannotBe(Exception):
    """A worker as asked for is not possible; the message is for the operator."""


def _tie_to(parent: int) -> None:
    kernel.die_with_parent()
    if os.getppid() != parent:
        raise _CannotBe("the warden died while this process was started")


def _become_user(user: str) -> str:
    """Change to ``user`` if it is not empty; return the home directory."""
    try:
        entry = pwd.getpwnam(user) if user else pwd.getpwuid(os.geteuid())
    except KeyError:
        if user:
            raise _CannotBe(f"user {user!r} does not exist on this host") from None
        return "/"
    if user and entry.pw_uid != os.geteuid():
        os.initgroups(entry.pw_name, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    return entry.pw_dir


def _change_directory(path: str) -> None:
    try:
        os.chdir(path)
    except OSError as error:
        raise _CannotBe(f"working directory {path!r}: {error.strerror}") from None


def _execute(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    program = command[0]
    try:
        os.execvpe(program, list(command), environment)
    except OSError as error:
        raise _CannotBe(_why_not(program, environment.get("PATH", ""), error)) from None


def _why_not(program: str, path: str, error: OSError) -> str:
    found = program if "/" in program else shutil.which(program, os.F_OK, path)
    match error.errno:
        case errno.ENOENT if found is not None and os.path.exists(found):
            return f"{found}: the interpreter its first line names does not exist"
        case errno.ENOENT if "/" in program:
            return f"command not found: {program}"
        case errno.ENOENT:
            return f"command not found: {program} (searched in {path})"
        case errno.EACCES:
            return f"permission denied: {found or program} cannot be executed by {kernel.own_user()}"
        case errno.ENOEXEC:
            return f"{found or program}: neither a program nor a script with an interpreter line"
        case errno.E2BIG:
            return f"{program}: arguments and environment are too large"
        case _:
            return f"{program}: {error.strerror}"
