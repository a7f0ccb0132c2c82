"""What gRPC's core says about a failed connection, without its wrapping.  Pure."""

from __future__ import annotations

import re

_WRAPPED = re.compile(
    r"failed to connect to all addresses; last error: \w+: (?:ipv[46]|unix):\S+ "
    r"(?:Failed to connect to remote host: )?(.+)",
    re.DOTALL,
)


def plain(details: str) -> str:
    """Return the operating system's words where gRPC wraps them, and anything else as it is.

    "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:2379: Failed to connect to remote
    host: Connection refused" is "connection refused".
    """
    found = _WRAPPED.search(details)
    if found is None:
        return details
    words = found[1].strip()
    return words[:1].lower() + words[1:]
