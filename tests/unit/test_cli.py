"""The command line: what it asks an agent for, what it prints, and how it ends."""

from __future__ import annotations

import io
import json
import os
import pwd
import socket
import threading
from pathlib import Path

import pytest

from registry.cli import main
from registry.errors import DaemonError, Invalid, NoSuchName, Overloaded, UnknownOutcome
from registry.v1.cluster_pb2 import (
    EventRecord,
    Node,
    NodesResponse,
    RestartAgentResponse,
    StatusResponse,
    WhyLine,
    WhyResponse,
)
from registry.v1.messages_pb2 import CallResponse, CastResponse
from registry.v1.names_pb2 import (
    NAME_STATE_READY,
    NAME_STATE_UNOWNED,
    ListNamesResponse,
    Method,
    MethodsResponse,
    Name,
    ResolveResponse,
)
from registry.v1.supervision_pb2 import (
    Applied,
    ApplyResponse,
    Child,
    ChildrenResponse,
    Done,
    LogsChunk,
    Spec,
    SpecsResponse,
)
from registry.wire import error_to_pb
from tests.support.canned_agent import CannedAgent
from tests.support.command_line import CommandLine

SWEEPER = Name(
    name="sweeper",
    state=NAME_STATE_READY,
    epoch=31,
    start=2,
    host="alpha",
    node="alpha-1f2e3d4c",
    address="127.0.0.1:7430",
    pid=4711,
)
READY = StatusResponse(
    cluster="prod",
    host="alpha",
    node="alpha-1f2e3d4c",
    version="0.1.0",
    state="ready",
    containment="full",
    lease_slack=4.2,
    lease_ttl=8.0,
    in_sync=True,
    revision=99,
)


def test_call_prints_the_answer_as_the_daemon_wrote_it(run: CommandLine, canned_agent: CannedAgent) -> None:
    canned_agent.answers["Call"] = CallResponse(json='{"swept":1200}', epoch=31, start=2)
    assert run("call", "sweeper", "status", '{"verbose": true}', "--epoch", "31", "--key", "k") == 0
    assert run.output == '{"swept":1200}\n'
    ((_, request),) = canned_agent.asked
    assert 'json: "{\\"verbose\\": true}"' in str(request)
    assert "expect_epoch: 31" in str(request)
    assert 'idempotency_key: "k"' in str(request)


def test_call_as_json_has_the_token_of_who_answered(run: CommandLine, canned_agent: CannedAgent) -> None:
    canned_agent.answers["Call"] = CallResponse(json='{"swept":1200}', epoch=31, start=2)
    assert run("--json", "call", "sweeper", "status") == 0
    assert json.loads(run.output) == {"result": {"swept": 1200}, "epoch": 31, "start": 2}


def test_call_reads_arguments_from_standard_input(
    run: CommandLine, canned_agent: CannedAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"table": "history"}'))
    canned_agent.answers["Call"] = CallResponse()
    assert run("call", "sweeper", "sweep_now", "-") == 0
    assert "history" in str(canned_agent.asked)


def test_wrong_json_is_shown_with_its_position_and_never_sent(
    run: CommandLine, canned_agent: CannedAgent
) -> None:
    assert run("call", "sweeper", "status", "{verbose: true}") == 2
    assert "column 2" in run.errors
    assert "  {verbose: true}\n   ^\n" in run.errors
    assert "in single quotes" in run.errors
    assert canned_agent.asked == []


def test_what_the_daemon_rejected_is_an_exit_code_of_its_own(
    run: CommandLine, canned_agent: CannedAgent
) -> None:
    canned_agent.answers["Call"] = CallResponse(error=error_to_pb(DaemonError("no table shoes")))
    assert run("call", "sweeper", "sweep_now") == 5
    assert run.errors == "pgherd: no table shoes (DAEMON_ERROR; executed, the daemon said no)\n"


def test_a_refusal_says_that_nothing_was_executed_and_what_helps(
    run: CommandLine, canned_agent: CannedAgent
) -> None:
    canned_agent.answers["Call"] = NoSuchName('no daemon is named "sweper"', hint='did you mean "sweeper"?')
    assert run("call", "sweper", "status") == 1
    assert run.errors == (
        'pgherd: no daemon is named "sweper" (NO_SUCH_NAME; refused, not executed)\n'
        'hint: did you mean "sweeper"?\n'
    )


def test_an_unknown_outcome_is_an_exit_code_of_its_own(run: CommandLine, canned_agent: CannedAgent) -> None:
    canned_agent.answers["Call"] = UnknownOutcome("the worker died")
    assert run("call", "sweeper", "status") == 3
    assert "unknown: it may have been executed" in run.errors


def test_errors_are_json_when_asked_for(run: CommandLine, canned_agent: CannedAgent) -> None:
    canned_agent.answers["Cast"] = Overloaded("1000 messages wait", details={"limit": "1000"})
    assert run("cast", "sweeper", "wake", "--json") == 1
    assert json.loads(run.errors) == {
        "reason": "OVERLOADED",
        "outcome": "refused",
        "message": "1000 messages wait",
        "hint": "",
        "details": {"limit": "1000"},
    }


def test_cast_says_who_accepted(run: CommandLine, canned_agent: CannedAgent) -> None:
    canned_agent.answers["Cast"] = CastResponse(epoch=31, start=2)
    assert run("cast", "sweeper", "wake") == 0
    assert run.output == "accepted by epoch 31, start 2\n"


def test_without_an_agent_nothing_was_sent(run: CommandLine, tmp_path: Path) -> None:
    assert run("--agent", str(tmp_path / "agent.sock"), "call", "sweeper", "status") == 4
    assert f"no agent at {tmp_path}/agent.sock: no such file or directory (UNREACHABLE" in run.errors
    assert "hint: pgherd doctor" in run.errors


def test_a_port_nobody_listens_at_is_no_agent(run: CommandLine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert run("names", "--agent", f"127.0.0.1:{taken.getsockname()[1]}") == 4
    assert "connection refused" in run.errors


def test_an_answer_that_does_not_come_is_bounded(run: CommandLine, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "agent.sock"))
        deaf.listen()
        assert run("--agent", str(tmp_path / "agent.sock"), "--timeout", "50ms", "names") == 4
        assert "did not answer within 50ms" in run.errors
        assert run("--agent", str(tmp_path / "agent.sock"), "--timeout", "50ms", "call", "a", "b") == 3
        assert "no answer within 50ms (UNKNOWN_OUTCOME; unknown: it may have been executed)" in run.errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nmaes"], "there is no command 'nmaes', did you mean 'names'?"),
        (["frobnicate"], "there is no command 'frobnicate'; pgherd --help lists them"),
        (["names", "--jsno"], "No such option '--jsno'"),
        (["call", "sweeper"], "Missing argument 'METHOD'"),
        (["names", "--timeout", "5"], 'write "5s"'),
        (["wait", "sweeper", "--for", "redy"], "'redy' is not one of"),
    ],
)
def test_typing_errors_say_what_was_meant(run: CommandLine, words: list[str], message: str) -> None:
    assert run(*words) == 2
    assert run.errors.startswith("pgherd: ")
    assert message in run.errors


def test_help_lists_every_command_once_with_a_line(run: CommandLine) -> None:
    assert run("--help") == 0
    for command in ("status", "call", "why", "doctor", "run", "version"):
        assert sum(line.startswith(f"  {command} ") for line in run.output.splitlines()) == 1


def test_names_are_plain_columns_where_there_is_no_terminal(
    run: CommandLine, canned_agent: CannedAgent
) -> None:
    canned_agent.answers["List"] = ListNamesResponse(
        names=[SWEEPER, Name(name="ticker", state=NAME_STATE_UNOWNED)], in_sync=True
    )
    assert run("names") == 0
    assert run.output.splitlines() == [
        "NAME     STATE    HOST   EPOCH.START  PID   SINCE",
        "sweeper  ready    alpha  31.2         4711  -",
        "ticker   unowned  -      -            -     -",
    ]


def test_numbers_and_states_of_json_are_easy_to_use(run: CommandLine, canned_agent: CannedAgent) -> None:
    canned_agent.answers["List"] = ListNamesResponse(names=[SWEEPER], as_of_revision=1 << 50, in_sync=True)
    assert run("names", "--json") == 0
    answer = json.loads(run.output)
    assert answer["as_of_revision"] == 1 << 50
    assert answer["names"][0] | {"name": "sweeper", "state": "ready", "epoch": 31} == answer["names"][0]


def test_an_old_answer_says_that_it_is_old(run: CommandLine, canned_agent: CannedAgent) -> None:
    canned_agent.answers["List"] = ListNamesResponse(names=[SWEEPER], stale_since="since 03:12:05: no quorum")
    assert run("names") == 0
    assert run.errors == "pgherd: this may be out of date: since 03:12:05: no quorum\n"


def test_whereis_tells_the_owner(run: CommandLine, canned_agent: CannedAgent) -> None:
    canned_agent.answers["Resolve"] = ResolveResponse(name=SWEEPER)
    assert run("whereis", "sweeper") == 0
    assert run.output == (
        "sweeper is on alpha (node alpha-1f2e3d4c, 127.0.0.1:7430), epoch 31, start 2, pid 4711, ready\n"
    )


def test_whereis_fails_for_a_name_without_an_owner(run: CommandLine, canned_agent: CannedAgent) -> None:
    canned_agent.answers["Resolve"] = ResolveResponse(name=Name(name="ticker", state=NAME_STATE_UNOWNED))
    assert run("whereis", "ticker") == 1
    assert run.errors == (
        "pgherd: ticker has no owner, it is unowned (NO_OWNER; refused, not executed)\n"
        "hint: pgherd why ticker\n"
    )


def test_methods_are_listed_with_their_signatures(run: CommandLine, canned_agent: CannedAgent) -> None:
    method = Method(name="status", kind="call", signature="() -> Status", description="How it is.")
    canned_agent.answers["Methods"] = MethodsResponse(methods=[method])
    assert run("methods", "sweeper") == 0
    assert run.output.splitlines()[1] == "status  call  () -> Status  How it is."


def test_status_is_silent_about_what_is_well(run: CommandLine, canned_agent: CannedAgent) -> None:
    canned_agent.answers |= {
        "Status": READY,
        "Nodes": NodesResponse(nodes=[Node(host="alpha", state="ready", names=1)], in_sync=True),
        "List": ListNamesResponse(names=[SWEEPER], in_sync=True),
    }
    assert run("status") == 0
    assert "cluster prod, asked alpha (pgherd 0.1.0): ready" in run.output
    assert "names: 1 ready" in run.output
    assert run.output.endswith("all is well\n")


def test_status_fails_when_something_is_not_well(run: CommandLine, canned_agent: CannedAgent) -> None:
    status = StatusResponse()
    status.CopyFrom(READY)
    status.problems.append("ticker has no owner")
    canned_agent.answers |= {
        "Status": status,
        "Nodes": NodesResponse(nodes=[Node(host="beta", state="down")], in_sync=True),
        "List": ListNamesResponse(in_sync=True),
    }
    assert run("status") == 1
    assert "wrong  ticker has no owner" in run.output
    assert "wrong  host beta is down" in run.output
    assert run.output.endswith("2 not well: pgherd why\n")
    assert run("status", "--json") == 1
    assert json.loads(run.output)["problems"] == ["ticker has no owner", "host beta is down"]


def test_status_vouches_for_no_name_of_a_host_without_a_lease(
    run: CommandLine, canned_agent: CannedAgent
) -> None:
    status = StatusResponse()
    status.CopyFrom(READY)
    status.MergeFrom(StatusResponse(state="lost", stale_since="for 9.0 s: no quorum"))
    status.in_sync, status.lease_slack = False, 0.0
    other = Name(name="ticker", state=NAME_STATE_UNOWNED)
    canned_agent.answers |= {
        "Status": status,
        "Nodes": NodesResponse(nodes=[Node(host="alpha", state="ready", names=1)]),
        "List": ListNamesResponse(names=[SWEEPER, other]),
    }
    assert run("status") == 1
    assert "names: 1 on a host without a lease, 1 unowned" in run.output
    assert run.errors == "pgherd: this may be out of date: for 9.0 s: no quorum\n"


def test_nothing_is_not_said_to_be_all_by_an_agent_that_does_not_know(
    run: CommandLine, canned_agent: CannedAgent
) -> None:
    stale = "for 2.0 s: the registry has not been read yet"
    canned_agent.answers |= {
        "Children": ChildrenResponse(stale_since=stale),
        "List": ListNamesResponse(stale_since=stale),
    }
    for command in ("ps", "tree", "names"):
        assert run(command) == 0
        assert run.output.endswith("known here\n")
        assert run.errors == f"pgherd: this may be out of date: {stale}\n"


def test_ps_without_processes_says_whether_anything_is_declared(
    run: CommandLine, canned_agent: CannedAgent
) -> None:
    canned_agent.answers |= {"Children": ChildrenResponse(), "List": ListNamesResponse(in_sync=True)}
    assert run("ps") == 0
    assert run.output == "no children: pgherd apply FILE declares some\n"
    ticker = Name(name="ticker", state=NAME_STATE_UNOWNED)
    canned_agent.answers["List"] = ListNamesResponse(names=[ticker], in_sync=True)
    assert run("ps") == 0
    assert run.output == "no children run; 1 name is known: pgherd names\n"


def test_no_events_are_said_to_be_none(run: CommandLine, canned_agent: CannedAgent) -> None:
    canned_agent.answers["Events"] = []
    assert run("events", "nope") == 0
    assert run.output == "no events about nope here\n"
    assert run("events", "nope", "--json") == 0
    assert run.output == ""


def test_why_begins_with_how_old_it_is(run: CommandLine, canned_agent: CannedAgent) -> None:
    line = WhyLine(what="node beta lost")
    setattr(line, "try", "pgherd nodes")
    canned_agent.answers["Why"] = WhyResponse(caveat="as of 14 s ago: etcd unreachable", lines=[line])
    assert run("why", "ticker") == 0
    assert run.output.splitlines() == [
        "as of 14 s ago: etcd unreachable",
        "SINCE  WHAT            TRY",
        "now    node beta lost  pgherd nodes",
    ]


def test_wait_ends_in_time_and_says_what_to_look_at(run: CommandLine, canned_agent: CannedAgent) -> None:
    released = threading.Event()
    canned_agent.answers["Wait"] = lambda _: released.wait(30) and None
    try:
        assert run("wait", "ticker", "--timeout", "50ms") == 1
    finally:
        released.set()
    assert run.errors == "pgherd: ticker was not ready within 50ms\nhint: pgherd why ticker\n"


def test_events_are_lines_and_json_lines(run: CommandLine, canned_agent: CannedAgent) -> None:
    happened = [EventRecord(kind="name_claimed", name="sweeper", text="sweeper: claimed", level="info")]
    canned_agent.answers["Events"] = happened * 2
    assert run("events") == 0
    assert run.output == "now  info     sweeper: claimed\n" * 2
    assert run("events", "--json") == 0
    assert [json.loads(line)["kind"] for line in run.output.splitlines()] == ["name_claimed"] * 2


def test_ps_shows_processes_and_hosts_that_were_silent(run: CommandLine, canned_agent: CannedAgent) -> None:
    child = Child(
        host="alpha", child="sweeper", name="sweeper", kind="behaviour", state="ready", pid=4711,
        epoch=31, start=2, restarts=1, last_exit="SIGKILL", uptime=75,
    )  # fmt: skip
    canned_agent.answers["Children"] = ChildrenResponse(children=[child], silent=["beta"])
    assert run("ps") == 0
    assert run.output.splitlines()[1] == (
        "alpha  sweeper  sweeper  behaviour  ready  4711  31.2         1m 15s  1         SIGKILL"
    )
    assert run.errors == "pgherd: host beta did not answer, its children are missing here\n"


def test_tree_groups_children_by_host(run: CommandLine, canned_agent: CannedAgent) -> None:
    children = [Child(host="alpha", child=child, state="ready") for child in ("a", "b")]
    canned_agent.answers["Children"] = ChildrenResponse(children=children)
    assert run("tree") == 0
    assert run.output == "alpha\n├─ a ready\n└─ b ready\n"


def test_logs_are_the_bytes_of_the_worker(
    canned_agent: CannedAgent, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    canned_agent.answers["Logs"] = [LogsChunk(data=b"one\n"), LogsChunk(data=b"\xff\n", dropped=7)]
    with pytest.raises(SystemExit):
        main(["logs", "sweeper"])
    output, errors = capfdbinary.readouterr()
    assert output == b"one\n\xff\n"
    assert b"7 bytes are missing here" in errors


def test_apply_sends_each_file_and_lists_what_became_of_it(
    run: CommandLine, canned_agent: CannedAgent, tmp_path: Path
) -> None:
    (tmp_path / "ticker.toml").write_text("schema = 1\n")
    canned_agent.answers["Apply"] = ApplyResponse(applied=[Applied(name="ticker", what="created")])
    assert run("apply", str(tmp_path / "ticker.toml")) == 0
    assert run.output == "ticker created\n"


def test_apply_shows_every_problem_of_a_file(
    run: CommandLine, canned_agent: CannedAgent, tmp_path: Path
) -> None:
    (tmp_path / "ticker.toml").write_text("schema = 1\n")
    canned_agent.answers["Apply"] = Invalid(
        "ticker.toml is not valid:\nticker.toml:3: name: wrong\nticker.toml:9: stop: wrong"
    )
    assert run("apply", str(tmp_path / "ticker.toml")) == 2
    assert run.errors == (
        "pgherd: ticker.toml is not valid: (INVALID; refused, not executed)\n"
        "  ticker.toml:3: name: wrong\n"
        "  ticker.toml:9: stop: wrong\n"
    )


def test_apply_of_a_missing_file_asks_nobody(
    run: CommandLine, canned_agent: CannedAgent, tmp_path: Path
) -> None:
    assert run("apply", str(tmp_path / "missing.toml")) == 2
    assert "missing.toml: No such file or directory" in run.errors
    assert canned_agent.asked == []


def test_one_spec_is_printed_as_apply_accepts_it(run: CommandLine, canned_agent: CannedAgent) -> None:
    canned_agent.answers["Specs"] = SpecsResponse(specs=[Spec(name="ticker", toml="schema = 1\n")])
    assert run("specs", "ticker") == 0
    assert run.output == "schema = 1\n"


@pytest.mark.parametrize("verb", ["start", "stop", "delete"])
def test_wishes_are_confirmed_in_words(run: CommandLine, canned_agent: CannedAgent, verb: str) -> None:
    canned_agent.answers[verb.title()] = Done(what="ticker: done")
    assert run(verb, "ticker") == 0
    assert run.output == "ticker: done\n"
    ((_, request),) = canned_agent.asked
    assert getattr(request, "who") == pwd.getpwuid(os.getuid()).pw_name  # noqa: B009


def test_restart_returns_when_another_process_is_ready(run: CommandLine, canned_agent: CannedAgent) -> None:
    seen = iter([(11, "ready"), (11, "stopping"), (0, "starting"), (12, "starting"), (12, "ready")])

    def children(_: object) -> ChildrenResponse:
        pid, state = next(seen)
        return ChildrenResponse(
            children=[Child(host="alpha", child="t", name="ticker", pid=pid, state=state, start=2)]
        )

    canned_agent.answers |= {"Restart": Done(), "Children": children}
    assert run("restart", "ticker") == 0
    assert "restarted on alpha" in run.output
    assert run.output.endswith("pid 12, start 2\n")


def test_restart_says_how_far_it_came_in_time(run: CommandLine, canned_agent: CannedAgent) -> None:
    backoff = ChildrenResponse(children=[Child(child="ticker", pid=11, state="stopping")])
    canned_agent.answers |= {"Restart": Done(), "Children": backoff}
    assert run("restart", "ticker", "--timeout", "50ms") == 1
    assert (
        run.errors
        == "pgherd: ticker is stopping, not ready 50ms after its restart\nhint: pgherd why ticker\n"
    )


def test_restart_agent_returns_when_the_next_generation_is_ready(
    run: CommandLine, canned_agent: CannedAgent
) -> None:
    generations = iter([(1, "ready"), (2, "joining"), (2, "ready")])

    def status(_: object) -> StatusResponse:
        generation, state = next(generations)
        return StatusResponse(host="alpha", generation=generation, state=state, pids={"agent": 12})

    canned_agent.answers |= {"RestartAgent": RestartAgentResponse(generation=1), "Status": status}
    assert run("restart-agent") == 0
    assert "generation 2, pid 12" in run.output


def test_version_needs_no_agent(run: CommandLine) -> None:
    assert run("version", "--json") == 0
    assert set(json.loads(run.output)) == {"pgherd", "python"}
