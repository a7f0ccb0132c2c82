"""The command line as a process: signals, pipes, start-up, and the host's own commands."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from node_agent.sandbox.servers import EtcdServers, PostgresServer

pytestmark = pytest.mark.slow

PGHERD = Path(sys.executable).with_name("pgherd")


def _run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PGHERD, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.fixture
def config(tmp_path: Path, etcd_server: EtcdServers, database: str) -> Path:
    """A configuration for which everything but an agent is there."""
    path = tmp_path / "agent.toml"
    path.write_text(
        f"""
        schema = 1
        cluster = "test"
        host = "alpha"
        run_dir = "{tmp_path}"
        etcd.endpoints = ["{etcd_server.endpoints[0]}"]
        lease.ttl = "5s"
        [database.app]
        conninfo = "{database}"
        """
    )
    return path


def test_quick_commands_import_neither_grpc_nor_protobuf() -> None:
    script = "import sys; sys.argv = ['pgherd', 'version']\nfrom registry.cli import main\n"
    script += "try: main()\nfinally: print(sorted({'grpc', 'google', 'rich', 'pydantic'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.endswith("\n[]\n")


def test_ctrl_c_ends_a_command_with_130(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "agent.sock"))
        deaf.listen()
        command = [str(PGHERD), "--agent", str(tmp_path / "agent.sock"), "--timeout", "1h", "names"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            knock, _ = deaf.accept()
            talk, _ = deaf.accept()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
            knock.close()
            talk.close()
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_a_reader_that_had_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [PGHERD, "version"], stdout=write, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(write)
    assert result.returncode == 1
    assert result.stderr == b""


def test_run_refuses_a_wrong_configuration(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text("schema = 1\nclutser = 'prod'\n")
    result = _run("run", "-c", tmp_path / "agent.toml")
    assert result.returncode == 2
    assert "agent.toml:2: clutser" in result.stderr


def test_run_check_looks_at_the_configuration_and_its_children(config: Path) -> None:
    result = _run("run", "--check", PGHERD_CONFIG=str(config))
    assert result.returncode == 0, result.stderr
    (config.parent / "children.d").mkdir()
    (config.parent / "children.d" / "broken.toml").write_text("schema = 1\n[[child]]\n")
    result = _run("run", "--check", "-c", config)
    assert result.returncode == 2
    assert "broken.toml" in result.stdout


def test_doctor_without_an_agent_says_what_is_there_and_what_is_not(config: Path) -> None:
    result = _run("doctor", "-c", config, "--json")
    assert result.returncode == 1, result.stderr
    found = {finding["check"]: finding for finding in json.loads(result.stdout)}
    assert found["configuration"]["verdict"] == "ok"
    assert found["agent"]["verdict"] == "wrong"
    assert found["agent"]["remedy"] == f"pgherd run -c {config}"
    assert found["lease"]["verdict"] == "ok"
    assert found["database app"]["verdict"] == "wrong"
    assert found["database app"]["remedy"] == "pgherd sql install app"


def test_doctor_names_the_member_of_etcd_that_is_silent(config: Path) -> None:
    config.write_text(config.read_text().replace('"http://', '"http://127.0.0.1:9", "http://', 1))
    result = _run("doctor", "-c", config)
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if "127.0.0.1:9:" in line]
    assert line.startswith("wrong etcd")


def test_doctor_hears_of_a_port_in_use(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config.write_text(f'listen.grpc = "{address}"\n{config.read_text()}')
        result = _run("doctor", "-c", config)
    assert f"{address} cannot be used: address already in use" in result.stdout


def test_doctor_explains_the_timing_of_the_lease(config: Path) -> None:
    result = _run("doctor", "--timing", "-c", config)
    assert result.returncode == 0
    assert "4.00     ttl - (0.5 s + ttl / 10)" in result.stdout


def test_doctor_tells_a_database_that_cannot_be_reached(
    config: Path, postgres_server: PostgresServer
) -> None:
    config.write_text(config.read_text().replace(f"port={postgres_server.port}", "port=1"))
    result = _run("doctor", "-c", config, "--json")
    (database,) = [finding for finding in json.loads(result.stdout) if finding["check"] == "database app"]
    assert database["verdict"] == "wrong"
    assert ".s.PGSQL.1" in database["what"]
