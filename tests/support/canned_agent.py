"""An agent that only recites: a real gRPC server on a unix socket with answers given beforehand.

For the command line alone, which must be right about every answer there is, also about those that a healthy
agent gives once a year.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest
from google.protobuf.message import Message

from registry import wire
from registry.errors import HerdError
from registry.v1 import (
    cluster_pb2_grpc,
    messages_pb2_grpc,
    names_pb2_grpc,
    supervision_pb2_grpc,
)


@dataclass
class CannedAgent:
    """``answers`` by RPC: a message, an error, a list for a stream, or what computes one of these.

    ``asked`` are the requests so far.
    """

    socket: Path
    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, Message]] = field(default_factory=list)

    def __getattr__(self, rpc: str) -> Callable[[Message, grpc.ServicerContext], Any]:
        if not rpc[0].isupper():
            raise AttributeError(rpc)
        return lambda request, context: self._answer(rpc, request, context)

    def _answer(self, rpc: str, request: Message, context: grpc.ServicerContext) -> Any:
        self.asked.append((rpc, request))
        answer = self.answers[rpc]
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, HerdError):
            _abort(context, answer)
        return iter(answer) if isinstance(answer, list) else answer


def _abort(context: grpc.ServicerContext, error: HerdError) -> NoReturn:
    context.set_trailing_metadata(wire.trailers(error))
    context.abort(wire.grpc_code(error), error.message)
    raise AssertionError("abort raises")


@pytest.fixture
def canned_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedAgent]:
    """A running :class:`CannedAgent`, which is also the one that ``PGHERD_AGENT`` names."""
    agent = CannedAgent(tmp_path / "agent.sock")
    servicer: Any = agent
    server = grpc.server(ThreadPoolExecutor(2))
    cluster_pb2_grpc.add_ClusterServicer_to_server(servicer, server)
    messages_pb2_grpc.add_MessagesServicer_to_server(servicer, server)
    names_pb2_grpc.add_NamesServicer_to_server(servicer, server)
    supervision_pb2_grpc.add_SupervisionServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{agent.socket}")
    server.start()
    monkeypatch.setenv("PGHERD_AGENT", str(agent.socket))
    yield agent
    server.stop(None).wait()
