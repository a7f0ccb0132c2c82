"""A plain command: reports itself, and waits to be killed.

usage: command.py OBSERVER HOST [--orphan] [--deaf] [--exit CODE]

``--orphan``: a grandchild in a session of its own reports too, as NAME.orphan, and outlives its parent if it
can.  ``--deaf``: SIGTERM is ignored.  ``--exit``: end at once.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.cluster.daemons.report import Report


def main(observer: str, host: str, *options: str) -> None:
    """Be the command."""
    name, epoch, start = (os.environ[f"PGHERD_{key}"] for key in ("NAME", "EPOCH", "START"))
    if "--deaf" in options:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    reports = [Report(observer, name, int(epoch), int(start), host)]
    if "--orphan" in options and os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            reports.append(Report(observer, f"{name}.orphan", int(epoch), int(start), host))
            signal.pause()
        os._exit(0)
    if "--exit" in options:
        sys.exit(int(options[options.index("--exit") + 1]))
    while True:
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
