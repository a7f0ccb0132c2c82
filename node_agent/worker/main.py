"""The worker process: from a fork of the warden to its exit code.

The warden forks with this module in memory, sets user, directory and environment, and calls :func:`run`,
which never returns.  The author's modules are imported only now, in the child.  What cannot be started says
so in one line, to the agent and on stderr, and exits with 1.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import signal
import sys
import traceback
from typing import NoReturn

import uvloop

from node_agent.behaviours.interface import BadBehaviour, read_args
from node_agent.behaviours.loading import load
from node_agent.warden.protocol import Start
from node_agent.worker.runtime import EXIT_CRASHED, EXIT_SUPERSEDED, FAREWELL, Runtime, leave
from node_agent.worker.uplink import Uplink

__all__ = ["EXIT_SUPERSEDED", "run"]

SWITCH_INTERVAL = 0.001
"""Seconds after which a busy handler lets the uplink's thread in; shorter than Python's 5 ms, so that pings
and casts are answered at once beside a handler that computes."""


def run(start: Start) -> NoReturn:
    """Run the behaviour of ``start`` in this process and exit.

    Exit codes: 0 after an orderly stop, 1 after a crash or when it cannot be started, EXIT_SUPERSEDED when
    its fence was refused or the agent does not want it.
    """
    code = EXIT_CRASHED
    try:
        code = _run(start)
    except BaseException:  # noqa: BLE001 - the process ends here, whatever it was
        traceback.print_exc()
    leave(code)


def _run(start: Start) -> int:
    # A terminal's ^C goes to every process; who stops is decided by the supervisor.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.setswitchinterval(SWITCH_INTERVAL)
    faulthandler.enable()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", force=True
    )
    try:
        behaviour = load(start.behaviour, start.path)
        interface = behaviour.interface()
        args = read_args(behaviour, start.args)
    except BadBehaviour as bad:
        return _cannot_start(start, bad)

    async def live() -> int:
        return await Runtime(start, interface, args).run(behaviour)

    # The loop is not closed in order: what the author left running must not keep the process.
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop.run_until_complete(live())


def _cannot_start(start: Start, bad: BadBehaviour) -> int:
    why = str(bad)
    sys.stderr.write(f"{start.name or start.child}: {why}\n")
    uplink = Uplink(start.socket, start.worker, lambda _: (), lambda: 1.0)
    uplink.start()
    cause = bad.__cause__
    uplink.crashed(why, "".join(traceback.format_exception(cause)) if cause is not None else "")
    uplink.close(FAREWELL)
    return EXIT_CRASHED
