"""A process that forks workers as the warden does: from an already imported runtime.

One request a line on stdin, one answer a line on stdout: ``{"start": {...}, "stderr": path}`` is answered by
``{"pid": n}``, ``{"wait": n}`` by ``{"code": n}`` (negative: the signal) once that process has ended.
"""

from __future__ import annotations

import json
import os
import sys
from typing import NoReturn

from node_agent.warden.protocol import Start
from node_agent.worker import main as worker


def serve() -> None:
    """Answer requests until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                _child(Start(**request["start"]), request["stderr"])
            answer = {"pid": pid}
        else:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _child(start: Start, stderr: str) -> NoReturn:
    output = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    worker.run(start)


if __name__ == "__main__":
    serve()
