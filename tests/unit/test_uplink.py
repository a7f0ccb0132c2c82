"""The worker's end of the socket beside an agent that reads when the test wants it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from node_agent.worker import framing, uplink
from node_agent.worker.uplink import Uplink
from registry.frames import encode
from registry.v1 import messages_pb2, worker_pb2

WITHIN = 15.0


class Agent:
    """The other end of one uplink; a tick of the uplink that finds it free again is told by ``freed``."""

    def __init__(self, path: Path) -> None:
        self.freed = threading.Event()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            self.uplink = Uplink(str(path), "worker", lambda _: None, self._tick)
            self.uplink.start()
            self._connection, _ = listener.accept()
        self._connection.settimeout(WITHIN)
        self._unpacker = framing.Unpacker()
        self._messages: list[bytes] = []

    def _tick(self) -> float:
        if not self.uplink.clogged:
            self.freed.set()
        return WITHIN

    def hear(self) -> worker_pb2.WorkerMessage:
        while not self._messages:
            data = self._connection.recv(1 << 20)
            assert data, "the worker has closed the connection"
            self._messages = self._unpacker.feed(data)
        return framing.worker_message(self._messages.pop(0))

    def answers(self, count: int) -> list[messages_pb2.Frame]:
        heard: list[messages_pb2.Frame] = []
        while len(heard) < count:
            heard += self.hear().batch.frames
        return heard

    def close(self) -> None:
        self._connection.close()
        assert self.uplink.close(WITHIN)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    """An agent that a worker has attached to."""
    agent = Agent(tmp_path / "worker.sock")
    assert agent.hear().attach.worker == "worker"
    yield agent
    agent.close()


def part(number: int, size: int = 0) -> bytes:
    return encode(messages_pb2.Frame(id=number, kind=messages_pb2.KIND_REPLY, data=bytes(size)))


@pytest.mark.slow
def test_an_agent_that_does_not_read_clogs_the_uplink_and_loses_nothing(agent: Agent) -> None:
    for number in range(24):
        agent.uplink.post([part(number, framing.MAX_BODY)])
    assert agent.uplink.clogged
    agent.freed.clear()
    assert [frame.id for frame in agent.answers(24)] == list(range(24))
    assert agent.freed.wait(WITHIN), "who waits for the way to be free hears of it"


def test_what_waits_is_written_in_order_whatever_the_socket_takes_at_once(agent: Agent) -> None:
    for number in range(5000):
        agent.uplink.post([part(number, number % 700)])
    heard = agent.answers(5000)
    assert [(frame.id, len(frame.data)) for frame in heard] == [(n, n % 700) for n in range(5000)]
    assert not agent.uplink.clogged


def test_what_waits_for_an_agent_that_has_gone_holds_nobody_back(agent: Agent) -> None:
    agent.uplink.post([part(1, uplink.CLOGGED_BYTES // 4) for _ in range(5)])
    assert agent.uplink.clogged
    agent.freed.clear()
    agent._connection.close()
    assert agent.freed.wait(WITHIN)
