"""Loads the fixtures.  Each topic keeps its own in ``tests/support/<topic>.py`` and adds a line here."""

from __future__ import annotations

pytest_plugins = [
    "tests.support.etcd",
    "tests.support.loops",
    "tests.support.postgres",
    "tests.support.canned_agent",
    "tests.support.servers",
    "tests.support.worker",
]
