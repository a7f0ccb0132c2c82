"""The Linux calls that Python 3.11 does not have, and what /proc tells.

Everything here is one system call or one file, synchronous, and knows nothing of workers.  Errors are
OSError.  Times are CLOCK_BOOTTIME in seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import select
import signal
import struct
import time
from collections.abc import Iterator

_libc = ctypes.CDLL(None, use_errno=True)

CLOCK_BOOTTIME = 7
_TIMER_ABSTIME = 1
_SIGEV_SIGNAL = 0

_CLONE_NEWNS = 0x00020000
_CLONE_NEWPID = 0x20000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_SLAVE = 2, 4, 8, 0x4000, 1 << 19

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_PF_EXITING = 0x4
_CAPABILITY_VERSION_3 = 0x20080522

CAP_KILL, CAP_SETGID, CAP_SETUID = 5, 6, 7


def boottime() -> float:
    """Return the present."""
    return time.clock_gettime(CLOCK_BOOTTIME)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class SuicideTimer:
    """A kernel timer that kills this process with SIGKILL, even while it is stopped.

    Not inherited by children.  It cannot kill the init process of its own PID namespace: such a process
    ignores signals that come from inside.
    """

    def __init__(self) -> None:
        self._id = ctypes.c_void_p()
        sigevent = struct.pack("@Pii48x", 0, signal.SIGKILL, _SIGEV_SIGNAL)
        _check(_libc.timer_create(CLOCK_BOOTTIME, sigevent, ctypes.byref(self._id)))

    def arm(self, when: float | None) -> None:
        """Die at ``when``, at once if that has passed; None: not at all."""
        moment = max(when, 1e-9) if when is not None else 0.0
        seconds = int(moment)
        itimerspec = struct.pack("@4l", 0, 0, seconds, int((moment - seconds) * 1e9))
        _check(_libc.timer_settime(self._id, _TIMER_ABSTIME, itimerspec, None))


def enter_pid_namespace() -> None:
    """Let the next child of this process be the init of a new PID namespace.  Needs CAP_SYS_ADMIN."""
    _check(_libc.unshare(_CLONE_NEWPID))


def leave_pid_namespace() -> None:
    """Let further children be born into this process's own PID namespace again."""
    with _closing(os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)) as own:
        _check(_libc.setns(own, _CLONE_NEWPID))


def remount_proc() -> None:
    """Show the PID namespace of this process in /proc, to it and its children only.

    Mounts made on the host later still appear here, but nothing mounted here appears there.
    """
    _check(_libc.unshare(_CLONE_NEWNS))
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None))
    _check(_libc.mount(b"proc", b"/proc", b"proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None))


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Get the signal ``number`` when the thread that forked this process ends.

    A change of user or group undoes it, so it comes after that; and the parent may have died before the call,
    so the caller looks at its parent after it.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0))


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def drop_capabilities() -> None:
    """Give up every capability, so that what is executed next has none either."""
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, none))


def has_capabilities(*numbers: int) -> bool:
    """Tell whether all these capabilities are effective in this process."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
            return all(effective >> number & 1 for number in numbers)
    return False


def own_user() -> str:
    """Return the name of the user this process runs as, its number if it has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def set_oom_score(adjust: int) -> bool:
    """Make the out-of-memory killer prefer (above 0) or spare this process; False if that is not allowed."""
    try:
        with _closing(os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)) as file:
            os.write(file, str(adjust).encode())
    except OSError:
        return False
    return True


def rename_process(title: str) -> None:
    """Let ``ps`` and ``top`` show ``title`` for this process, which was forked and never exec'ed."""
    _libc.prctl(_PR_SET_NAME, title.encode()[:15], 0, 0, 0)
    begin, end = (int(field) for field in _stat("self")[45:47])
    text = title.encode()[: end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def rewrite_environment(variable: str, value: str) -> None:
    """Change ``variable`` in what /proc/self/environ shows of this process, which was never exec'ed.

    Later forks of this process show the same.  It must be there already, with a value as long as ``value``.
    """
    begin, end = (int(field) for field in _stat("self")[47:49])
    area = b"\0" + ctypes.string_at(begin, end - begin)
    at = area.find(f"\0{variable}=".encode())
    if at < 0 or len(area[at + 1 :].split(b"\0", 1)[0]) != len(variable) + 1 + len(value):
        raise ValueError(f"no {variable} of {len(value)} characters in the environment of this process")
    ctypes.memmove(begin + at + len(variable) + 1, value.encode(), len(value))


def complain(line: str) -> None:
    """Write a line to stderr, unless that would block: nobody may stall a process that holds deadlines."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    with contextlib.suppress(OSError):
        if any(events & select.POLLOUT for _, events in poll.poll(0)):
            os.write(2, f"{line}\n".encode()[:4096])


def processes() -> Iterator[int]:
    """Yield the pids in this /proc."""
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def environment(pid: int) -> list[bytes]:
    """Return the environment ``pid`` was executed with; empty if it has ended or may not be read.

    The first thread may have ended long before the others: then any of those is asked.
    """
    if text := _environ(f"/proc/{pid}"):
        return text.split(b"\0")
    threads = (_environ(f"/proc/{pid}/task/{thread}") for thread in _threads(pid))
    return next((text.split(b"\0") for text in threads if text), [])


def _environ(process: str) -> bytes:
    with contextlib.suppress(OSError):
        return _bytes(f"{process}/environ")
    return b""


def is_dying(pid: int) -> bool:
    """Tell whether ``pid`` runs no code any more, but is not reaped: it may still hold files and sockets."""
    with contextlib.suppress(OSError):
        return bool(int(_stat(str(pid))[6]) & _PF_EXITING)
    return False


def session_of(pid: int) -> int:
    """Return the session id of ``pid``, 0 if there is no such process."""
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return 0


def start_ticks(pid: int) -> int:
    """Return when ``pid`` was started, in clock ticks since boot, 0 if there is no such process.

    Together with the pid this identifies a process until the next boot.
    """
    with contextlib.suppress(OSError):
        return int(_stat(str(pid))[19])
    return 0


def children(pid: int) -> list[int]:
    """Return the living and dead children of the single-threaded process ``pid``.

    The kernel may skip a child while others end, therefore the list is read until it is twice the same.
    """
    before: list[int] | None = None
    while True:
        try:
            now = [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]
        except (FileNotFoundError, ProcessLookupError):
            return []
        if now == before:
            return now
        before = now


def descendants(pid: int) -> list[int]:
    """Return children, their children and so on, parents first."""
    found = list(_all_children(pid))
    for each in found:
        found.extend(_all_children(each))
    return found


def _all_children(pid: int) -> Iterator[int]:
    """Like :func:`children`, for a process that may have threads."""
    for thread in _threads(pid):
        with contextlib.suppress(OSError):
            yield from (int(child) for child in _read(f"/proc/{pid}/task/{thread}/children").split())


def _threads(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(f"/proc/{pid}/task")
    return []


def kill(pid: int, signum: int = signal.SIGKILL) -> None:
    """Send a signal; that the process has ended, may not be signalled, or the signal is none, is no error."""
    with contextlib.suppress(OSError, OverflowError):
        os.kill(pid, signum)


def kill_group(group: int, signum: int = signal.SIGKILL) -> None:
    """Like :func:`kill`, for a process group."""
    with contextlib.suppress(OSError, OverflowError):
        os.killpg(group, signum)


def host_pid(pid: int, host_proc: int) -> int:
    """Return the pid of a child of this process in the PID namespace of ``host_proc``, an open /proc."""
    with _closing(os.pidfd_open(pid)) as pidfd, _closing(_open_in(host_proc, f"self/fdinfo/{pidfd}")) as info:
        for line in os.read(info, 4096).decode().splitlines():
            if line.startswith("Pid:"):
                return int(line.split()[1])
    raise ProcessLookupError(f"process {pid} is not visible in the other /proc")


def _open_in(directory: int, path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _read(path: str) -> str:
    return os.fsdecode(_bytes(path))


def _bytes(path: str) -> bytes:
    """Read a whole file.  Python's files cost a new fork ten times as much as the system calls."""
    with _closing(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as file:
        parts = []
        while part := os.read(file, 65536):
            parts.append(part)
    return b"".join(parts)


def _stat(pid: str) -> list[str]:
    """Return the fields of /proc/PID/stat after the command's name is cut out; index = proc(5)'s number - 3.

    The first two, pid and name, are gone: the name may hold blanks and parentheses.
    """
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
