"""Messages between agent and warden survive the way, and nothing else passes for one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent.warden import protocol

FROM_AGENT: list[protocol.FromAgent] = [
    protocol.Hello(hang_limit=2.5, stop_within=10),
    protocol.Pet(),
    protocol.RaiseDeadline(lease=2**62 + 1, deadline=12345.678901),
    protocol.Forget(lease=7),
    protocol.Start(
        worker="a" * 32, child="ticker", name="ticker", lease=7, epoch=3, start=2, command=("a", "")
    ),
    protocol.Start(
        worker="b" * 32,
        child="x",
        behaviour="m:C",
        args={"deep": [1, {"er": None}]},
        path=("/a", "/b"),
        env={"KEY": "ä\udcff", "EMPTY": ""},
        databases={"app": "service=app"},
    ),
    protocol.Signal(worker="a", signum=15, group=True),
    protocol.Kill(worker="a"),
    protocol.Remember(key="window/x", value={"times": [1.5, 2]}),
    protocol.Output(request=1, child="x", limit=100),
    protocol.Follow(child="x", on=True),
    protocol.Drop(child="x"),
    protocol.Shutdown(code=2),
]
FROM_WARDEN: list[protocol.FromWarden] = [
    protocol.Welcome(
        generation=1, containment="full", warden="c" * 32, launcher_pid=1, warden_pid=2, agent_pid=3
    ),
    protocol.Lease(lease=1, deadline=3.0),
    protocol.WorkerRow(
        worker="a", child="x", name="", lease=0, epoch=0, start=1, pid=4, state="gone", since=1.0, signal=9
    ),
    protocol.Counted(name="x", epoch=4, start=2),
    protocol.Remember(key="k", value=None),
    protocol.HandedOver(),
    protocol.Started(worker="a", pid=5),
    protocol.StartFailed(worker="a", why="command not found: x", refused=False, counted=0),
    protocol.Exited(
        worker="a", child="x", name="x", epoch=1, start=1, pid=2, code=None, signal=9, reason="deadline"
    ),
    protocol.Gone(worker="a", child="x"),
    protocol.OutputPart(request=0, child="x", data=b"\x00\xff\n", dropped=3, last=True),
    protocol.Stop(mode="smart"),
    protocol.Reload(),
]


@pytest.mark.parametrize("message", FROM_AGENT, ids=lambda message: type(message).__name__)
def test_every_message_of_an_agent_arrives_as_it_was_sent(message: protocol.FromAgent) -> None:
    assert protocol.from_agent(protocol.encode(message)) == message


@pytest.mark.parametrize("message", FROM_WARDEN, ids=lambda message: type(message).__name__)
def test_every_message_of_a_warden_arrives_as_it_was_sent(message: protocol.FromWarden) -> None:
    assert protocol.from_warden(protocol.encode(message)) == message


def test_the_lists_above_are_complete() -> None:
    kinds = {type(message) for message in (*FROM_AGENT, *FROM_WARDEN)}
    assert kinds == {*protocol.FromAgent.__args__, *protocol.FromWarden.__args__}


@given(st.binary(max_size=300))
def test_output_of_any_bytes_arrives_unchanged(data: bytes) -> None:
    part = protocol.OutputPart(request=1, child="x", data=data, dropped=0, last=False)
    assert protocol.from_warden(protocol.encode(part)) == part


@given(st.binary(max_size=100))
def test_what_is_no_message_is_a_protocol_error(packet: bytes) -> None:
    with pytest.raises(protocol.ProtocolError):
        protocol.from_agent(packet)


@pytest.mark.parametrize(
    "body",
    [
        {"is": "Welcome"},
        {"is": "Nonsense"},
        {"is": "RaiseDeadline", "lease": "7", "deadline": 1.0},
        {"is": "RaiseDeadline", "lease": True, "deadline": 1.0},
        {"is": "RaiseDeadline", "lease": 1, "deadline": None},
        {"is": "RaiseDeadline", "lease": 1},
        ["Pet"],
        7,
    ],
)
def test_wrong_kinds_types_and_missing_fields_are_protocol_errors(body: object) -> None:
    with pytest.raises(protocol.ProtocolError):
        protocol.from_agent(json.dumps(body).encode())


def test_a_field_of_the_next_version_is_ignored_and_one_of_this_version_may_be_missing() -> None:
    packet = json.dumps({"is": "Hello", "protocol": 2, "colour": "green"}).encode()
    assert protocol.from_agent(packet) == protocol.Hello(protocol=2)


def test_a_message_that_outgrows_a_packet_is_refused_by_its_sender() -> None:
    with pytest.raises(protocol.ProtocolError, match="196608 fit"):
        protocol.encode(protocol.Remember(key="k", value="x" * protocol.MAX_PACKET))


def test_a_value_that_json_cannot_hold_is_refused_by_its_sender() -> None:
    with pytest.raises(protocol.ProtocolError, match="no place in JSON"):
        protocol.encode(protocol.Remember(key="k", value=object()))
