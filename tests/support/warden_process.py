"""The processes of :mod:`tests.support.warden`, run as a script: ``launcher``, ``warden`` or ``agent``."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys

from node_agent import launcher
from node_agent.warden import kernel, protocol, warden

MYSELF = (sys.executable, "-P", __file__)


def echo_worker(start: protocol.Start) -> None:
    """What the process of a behaviour runs: say so, then do what its arguments say."""
    sys.stdout.write(f"{start.behaviour} {sorted(start.args)} {os.environ['PGHERD_WORKER']}\n")
    if start.args.get("crash"):
        raise RuntimeError("as asked")
    if start.args.get("leave_child") and os.fork() == 0:
        os.setsid()
        os.execvpe("sleep", ["sleep", start.args["leave_child"]], os.environ)
    if start.args.get("leave_fork") and os.fork() == 0:
        os.setsid()
        kernel.rename_process(start.args["leave_fork"])
        signal.pause()
    if not start.args.get("stay"):
        return
    select.select([], [], [])


def hand_over(argv: list[str]) -> None:
    """Be an agent: give the control descriptor to the test, and stay."""
    control = int(argv[argv.index("--control-fd") + 1])
    config = argv[argv.index("-c") + 1]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as test:
        test.connect(config + ".sock")
        socket.send_fds(test, [b"!"], [control])
    warden_gone = select.poll()
    warden_gone.register(control, 0)
    warden_gone.poll()


def main(role: str, argv: list[str]) -> int:
    """Be one of the three processes."""
    match role:
        case "launcher":
            kernel.die_with_parent()
            options = [argument for argument in argv if argument != "--partial"]
            return launcher.launch(options[1], (*MYSELF, "warden"), namespace="--partial" not in argv)
        case "warden":
            return warden.hold(argv, (*MYSELF, "agent"), entry="tests.support.warden_process:echo_worker")
        case _:
            hand_over(argv)
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
