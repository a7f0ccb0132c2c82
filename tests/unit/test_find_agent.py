"""The agent a client speaks to when nobody says."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.errors import Unreachable
from registry.find_agent import find_agent

SOCKET = Path("/nowhere/agent.sock")


def found(directory: Path, address: str | None = None, **environ: str) -> str:
    return find_agent(address, environ=environ, directory=directory, socket=SOCKET)


def test_named_address_comes_first(tmp_path: Path) -> None:
    assert found(tmp_path, "beta:7430", PGHERD_AGENT="gamma:7430") == "beta:7430"
    assert found(tmp_path, "/run/other.sock") == "unix:/run/other.sock"
    assert found(tmp_path, "unix:/run/other.sock") == "unix:/run/other.sock"


def test_environment_comes_before_a_sandbox(tmp_path: Path) -> None:
    sandbox(tmp_path, "127.0.0.1:1")
    assert found(tmp_path, PGHERD_AGENT=" gamma:7430\n") == "gamma:7430"


def test_nearest_sandbox_upwards_is_found(tmp_path: Path) -> None:
    sandbox(tmp_path, "127.0.0.1:1")
    sandbox(tmp_path / "inner", "/tmp/a/agent.sock")
    deep = tmp_path / "inner" / "a" / "b"
    deep.mkdir(parents=True)
    assert found(deep) == "unix:/tmp/a/agent.sock"
    assert found(tmp_path) == "127.0.0.1:1"


def test_socket_of_this_host_is_the_last_resort(tmp_path: Path) -> None:
    assert found(tmp_path) == f"unix:{SOCKET}"


def test_empty_sandbox_file_says_so(tmp_path: Path) -> None:
    sandbox(tmp_path, "")
    with pytest.raises(Unreachable, match="is empty"):
        found(tmp_path)


def sandbox(directory: Path, agent: str) -> None:
    file = directory / ".pgherd" / "agent"
    file.parent.mkdir(parents=True)
    file.write_text(agent + "\n")
