"""``python -m node_agent.sandbox.leash``: becomes another program that cannot outlive its parent.

Between fork and exec nothing of Python may run in a process that has gRPC loaded: its fork handlers start
threads that find their file descriptors closed.  So the parent executes this small program at once, and this
one drops privileges, asks for the death signal, and becomes the server.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from node_agent.warden import kernel

_CANNOT_EXECUTE = 127


def leashed(
    argv: Sequence[str | os.PathLike[str]],
    number: signal.Signals = signal.SIGKILL,
    *,
    uid: int | None = None,
    gid: int | None = None,
) -> list[str]:
    """Return the command that runs ``argv`` until the calling *thread* ends: then it gets the signal.

    ``uid`` and ``gid`` are whom it runs as; only root can ask for others.
    """
    who = f"{os.getuid() if uid is None else uid}:{os.getgid() if gid is None else gid}"
    words = [os.fspath(word) for word in argv]
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), str(int(number)), who, *words]


def main(parent: str, number: str, who: str, *argv: str) -> int:
    """Become ``argv``; return the exit code when that is not possible."""
    uid, gid = map(int, who.split(":"))
    if (uid, gid) != (os.getuid(), os.getgid()):
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    kernel.die_with_parent(signal.Signals(int(number)))
    if os.getppid() != int(parent):
        return _CANNOT_EXECUTE
    try:
        os.execv(argv[0], argv)
    except OSError as error:
        sys.stderr.write(f"cannot execute {argv[0]}: {error.strerror}\n")
        return _CANNOT_EXECUTE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
