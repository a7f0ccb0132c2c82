"""Loads the fixtures.  Each topic keeps its own in ``tests/support/<topic>.py`` and adds a line here."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says more about who else uses the machine.
settings.register_profile("pgherd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pgherd")

pytest_plugins = [
    "tests.support.etcd",
    "tests.support.loops",
    "tests.support.postgres",
    "tests.support.canned_agent",
    "tests.support.command_line",
    "tests.support.servers",
    "tests.support.warden",
    "tests.support.worker",
]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what only root can do; in CI, where everything must have run, it fails instead."""
    if item.get_closest_marker("root") and os.geteuid() != 0 and "CI" not in os.environ:
        pytest.skip("needs root")
