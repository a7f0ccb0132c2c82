"""Which agent, and which configuration, is meant when nobody says: the same for commands and for Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from registry.errors import Unreachable

UNIX = "unix:"
VARIABLE = "PGHERD_AGENT"
CONFIG_VARIABLE = "PGHERD_CONFIG"
SANDBOX = Path(".pgherd")
"""In the directory of a sandbox: ``agent`` has the target of one of its hosts, ``agent.toml`` is its file."""
SOCKET = Path("/run/pgherd/agent.sock")
CONFIG = Path("/etc/pgherd/agent.toml")


def target(address: str) -> str:
    """Return the gRPC target of ``host:port``, ``unix:PATH``, or an absolute path of a socket."""
    return UNIX + address if address.startswith("/") else address


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
    file = _nearest("agent", directory)
    return target(_read(file) if file else str(socket))


def find_config(*, environ: Mapping[str, str] = os.environ, directory: Path | None = None) -> Path:
    """Return the agent's configuration: PGHERD_CONFIG, the nearest sandbox's upwards, or this host's."""
    if named := environ.get(CONFIG_VARIABLE):
        return Path(named)
    return _nearest("agent.toml", directory) or CONFIG


def _nearest(name: str, directory: Path | None) -> Path | None:
    """Return a file of the nearest sandbox upwards."""
    start = (directory or Path.cwd()).absolute()
    files = (above / SANDBOX / name for above in (start, *start.parents))
    return next((file for file in files if file.is_file()), None)


def _read(file: Path) -> str:
    try:
        named = file.read_text().strip()
    except OSError as error:
        raise Unreachable(f"the sandbox's {file} cannot be read: {error}") from error
    if not named:
        raise Unreachable(f"the sandbox's {file} is empty", hint="it is written by `pgherd sandbox`")
    return named
