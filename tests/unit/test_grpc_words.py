"""gRPC's words about connections, for people."""

from __future__ import annotations

import pytest

from registry.grpc_words import plain

REFUSED = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
    "Failed to connect to remote host: Connection refused"
)


@pytest.mark.parametrize(
    ("details", "words"),
    [
        (REFUSED, "connection refused"),
        (REFUSED.replace("ipv4:127.0.0.1:1", "unix:/run/pgherd/agent.sock"), "connection refused"),
        ("etcdserver: no leader", "etcdserver: no leader"),
        ("", ""),
    ],
)
def test_only_the_wrapping_is_taken_off(details: str, words: str) -> None:
    assert plain(details) == words
