"""Which agent a client speaks to when nobody says: the same rules for the command line and for Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from registry.errors import Unreachable
from registry.security import target

VARIABLE = "PGHERD_AGENT"
SANDBOX = Path(".pgherd", "agent")
"""Below the sandbox's directory: a file with the target of one of its nodes."""
SOCKET = Path("/run/pgherd/agent.sock")


def find_agent(
    address: str | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    directory: Path | None = None,
    socket: Path = SOCKET,
) -> str:
    """Return the gRPC target: ``address``, PGHERD_AGENT, the nearest sandbox upwards, or this host's socket.

    Raises Unreachable when the sandbox's file cannot be read.
    """
    if named := address or environ.get(VARIABLE):
        return target(named.strip())
    start = (directory or Path.cwd()).absolute()
    for above in (start, *start.parents):
        file = above / SANDBOX
        if file.is_file():
            return target(_read(file))
    return target(str(socket))


def _read(file: Path) -> str:
    try:
        named = file.read_text().strip()
    except OSError as error:
        raise Unreachable(f"the sandbox's {file} cannot be read: {error}") from error
    if not named:
        raise Unreachable(f"the sandbox's {file} is empty", hint="it is written by `pgherd sandbox`")
    return named
