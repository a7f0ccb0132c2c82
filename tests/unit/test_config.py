"""The agent's configuration, and the deadlines that follow from its lease."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.config import (
    AgentConfig,
    ConfigInvalid,
    Database,
    EtcdConfig,
    ListenConfig,
    PostgresService,
    Problem,
    Timing,
    Tls,
    default_ttl,
    load,
    parse,
)
from registry.units import format_duration, parse_duration
from tests.support.golden import Case, cases

WHOLE = """
schema   = 1
cluster  = "prod"
host     = "alpha"
labels   = { zone = "eu-1", disk = "NVMe" }
run_dir  = "/run/pgherd"
[etcd]
endpoints     = ["https://etcd1:2379", "https://[fd00::2]:2379/"]
tls           = { ca = "tls/ca.crt", cert = "tls/etcd.crt", key = "/keys/etcd.key" }
user          = "pgherd"
password_file = "etcd.password"
[lease]
ttl = "5s"
[listen]
grpc = "alpha.internal:7430"
tls  = { ca = "ca.crt", cert = "alpha.crt", key = "alpha.key" }
[postgres.main]
data_directory = "/var/lib/postgresql/15/main"
patroni        = "http://127.0.0.1:8008"
[database.app]
postgres = "main"
conninfo = "service=app target_session_attrs=read-write application_name='say password=no'"
[database.log]
conninfo = "postgresql://log.internal/log?connect_timeout=3"
"""


@pytest.fixture(autouse=True)
def _this_machine_is_called_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Alpha.example.com")


def test_the_whole_file_is_understood() -> None:
    assert parse(WHOLE, Path("/etc/pgherd/agent.toml")) == AgentConfig(
        path=Path("/etc/pgherd/agent.toml"),
        cluster="prod",
        host="alpha",
        labels={"zone": "eu-1", "disk": "NVMe"},
        etcd=EtcdConfig(
            endpoints=("https://etcd1:2379", "https://[fd00::2]:2379"),
            tls=Tls(Path("/etc/pgherd/tls/ca.crt"), Path("/etc/pgherd/tls/etcd.crt"), Path("/keys/etcd.key")),
            user="pgherd",
            password_file=Path("/etc/pgherd/etcd.password"),
        ),
        ttl=5.0,
        listen=ListenConfig(
            grpc="alpha.internal:7430",
            tls=Tls(*(Path("/etc/pgherd") / name for name in ("ca.crt", "alpha.crt", "alpha.key"))),
        ),
        postgres={
            "main": PostgresService(
                name="main",
                data_directory=Path("/var/lib/postgresql/15/main"),
                patroni="http://127.0.0.1:8008",
            )
        },
        databases={
            "app": Database(
                name="app",
                postgres="main",
                conninfo="service=app target_session_attrs=read-write application_name='say password=no'",
            ),
            "log": Database(
                name="log", postgres="", conninfo="postgresql://log.internal/log?connect_timeout=3"
            ),
        },
        run_dir=Path("/run/pgherd"),
        children_dir=Path("/etc/pgherd/children.d"),
    )


def test_the_defaults_work_for_one_host_with_etcd_on_it() -> None:
    config = parse('schema = 1\ncluster = "prod"\n', Path("/etc/pgherd/agent.toml"))
    assert config.host == "alpha"
    assert config.etcd == EtcdConfig(endpoints=("http://127.0.0.1:2379",))
    assert config.listen == ListenConfig(grpc="127.0.0.1:7430")
    assert config.timing == Timing(8.0, election=1.0)


def test_a_lease_that_was_given_decides_the_timing() -> None:
    config = parse('schema = 1\ncluster = "prod"\nlease.ttl = "6s"\n', Path("agent.toml"))
    assert config.timing == Timing(6.0)


@pytest.mark.parametrize("case", cases("agent.txt"), ids=str)
def test_wrong_configurations_are_told_apart(case: Case) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse(case.text, Path("agent.toml"))
    assert str(caught.value) == case.expected


def test_a_machine_whose_name_is_no_host_name_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "ALPHA_\N{SNOWMAN}")
    with pytest.raises(ConfigInvalid, match='host: "alpha_\N{SNOWMAN}" is not a usable name'):
        parse('schema = 1\ncluster = "prod"\n', Path("agent.toml"))


def test_files_that_are_named_must_be_there_when_the_configuration_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(WHOLE)
    (tmp_path / "ca.crt").write_text("")
    with pytest.raises(ConfigInvalid) as caught:
        load(file)
    assert [(problem.line, problem.key) for problem in caught.value.problems] == [
        (9, "etcd.tls.ca"),
        (9, "etcd.tls.cert"),
        (9, "etcd.tls.key"),
        (16, "listen.tls.cert"),
        (16, "listen.tls.key"),
        (11, "etcd.password_file"),
    ]
    assert str(caught.value.problems[0]) == (
        f"{file}:9: etcd.tls.ca: {tmp_path}/tls/ca.crt: No such file or directory"
    )


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"none\.toml: No such file or directory"):
        load(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'schema = 1\nhost = "\xe4"\n')
    with pytest.raises(ConfigInvalid, match=r"latin\.toml:2: is not UTF-8"):
        load(tmp_path / "latin.toml")


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE)), st.integers(0, 12), st.text("a=1[]{}\"',\n ", max_size=3)))
)
def test_no_mutilated_file_does_more_than_report_problems(edits: list[tuple[int, int, str]]) -> None:
    text = WHOLE
    for at, length, instead in edits:
        text = text[:at] + instead + text[at + length :]
    problems: tuple[Problem, ...] = ()
    try:
        parse(text, Path("agent.toml"))
    except ConfigInvalid as error:
        problems = error.problems
    assert all(1 <= problem.line <= text.count("\n") + 1 and problem.message for problem in problems)


@pytest.mark.parametrize(("election", "ttl"), [(1.0, 8.0), (0.5, 5.0)])
def test_the_default_lease_outlives_an_election_of_etcd(election: float, ttl: float) -> None:
    assert default_ttl(election) == ttl


@given(st.floats(0.01, 60))
def test_the_default_lease_is_the_shortest_that_can_be_kept(election: float) -> None:
    shortest = default_ttl(election)
    Timing(shortest, election)
    with pytest.raises(ConfigInvalid):
        Timing(shortest - 1, election)


@given(st.integers(5, 3600))
def test_deadlines_follow_each_other(ttl: int) -> None:
    timing = Timing(ttl)
    assert 0 < timing.attempt < timing.keepalive_every < timing.soft < timing.hard < ttl
    assert 2 * timing.keepalive_every + timing.attempt < timing.soft
    assert ttl - timing.hard == pytest.approx(0.5 + ttl / 10)


def test_the_table_of_deadlines_is_the_one_in_force() -> None:
    seconds = {what: round(value, 2) for what, value, _ in Timing(5).table()}
    assert seconds == {
        "lease": 5,
        "keepalive every": 0.83,
        "keepalive attempt": 0.5,
        "trusted until": 3.17,
        "killed at": 4.0,
        "etcd election": 2.0,
    }


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("1.5s", 1.5), ("5m", 300), ("1h", 3600), ("0s", 0)],
)
def test_durations_have_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "meant"),
    [("30", '"30s"'), ("30 s", '"30s"'), ("5min", '"5m"'), ("2 hours", '"2h"'), ("10MSEC", '"10ms"')],
)
def test_what_is_almost_a_duration_is_shown_in_its_right_form(text: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"write {meant}"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1m30s", "infinity", "1d", "٣s", f"{10**9}s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration, write for example"):
        parse_duration(text)


@given(st.floats(0, 999_999_999) | st.integers(0, 10**8).map(lambda milliseconds: milliseconds / 1000))
def test_a_duration_is_written_as_it_is_read(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds
