"""What stands beside the messages: health, reflection, TLS, the sync client, further services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from registry import sync_client, wire
from registry.client import Client
from registry.config import ListenConfig
from registry.errors import (
    HerdError,
    Invalid,
    NoSuchName,
    StoreAmbiguous,
    StoreUnavailable,
    UnknownOutcome,
    Unreachable,
)
from registry.ownership import WorkerState
from registry.security import add_port, channel
from tests.support.agents import Agent, Herd, a_herd, echo, until
from tests.support.certificates import Authority

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(agent: Agent, service: str) -> int:
    async with channel(agent.address) as connection:
        stub: Any = health_pb2_grpc.HealthStub(connection)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return int(answer.status)


async def test_health_tells_alive_from_ready_from_serving() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        await herd.serve("sweeper", beta)
        herd.declare("idle")
        herd.own("starting", beta, WorkerState.STARTING)
        await herd.settled()
        assert await health(alpha, "") == SERVING
        assert await health(alpha, "ready") == SERVING
        assert await health(alpha, "name/sweeper") == SERVING
        assert await health(alpha, "name/idle") == NOT_SERVING
        assert await health(alpha, "name/starting") == NOT_SERVING
        alpha.ready = False
        assert await health(alpha, "") == SERVING
        assert await health(alpha, "ready") == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(alpha, "name/nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_can_be_watched() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        herd.declare("sweeper")
        await herd.settled()
        async with channel(alpha.address) as connection:
            stub: Any = health_pb2_grpc.HealthStub(connection)
            told = aiter(stub.Watch(health_pb2.HealthCheckRequest(service="name/sweeper")))
            async with asyncio.timeout(5):
                assert (await anext(told)).status == NOT_SERVING
                await herd.serve("sweeper", alpha)
                assert (await anext(told)).status == SERVING
                herd.release("sweeper")
                assert (await anext(told)).status == NOT_SERVING


async def test_reflection_lists_the_services() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        async with channel(alpha.address) as connection:
            untyped: Any = connection
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(untyped)
            asked = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="pgherd.v1.Messages"),
            ]
            answers = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
        names = {service.name for service in answers[0].list_services_response.service}
        assert {"pgherd.v1.Messages", "pgherd.v1.Names", "grpc.health.v1.Health"} <= names
        assert answers[1].file_descriptor_response.file_descriptor_proto


RAISED: list[tuple[Exception, type[HerdError]]] = [
    (NoSuchName("gone", hint="look"), NoSuchName),
    (StoreUnavailable("no leader"), Unreachable),
    (StoreAmbiguous("timed out"), UnknownOutcome),
]


def further_service(raised: Exception) -> grpc.GenericRpcHandler:
    async def one(request: bytes, context: object) -> bytes:
        raise raised

    async def many(request: bytes, context: object) -> AsyncIterator[bytes]:
        yield b"first"
        raise raised

    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "One": grpc.unary_unary_rpc_method_handler(one),
        "Many": grpc.unary_stream_rpc_method_handler(many),
    }
    return grpc.method_handlers_generic_handler("test.Further", methods)


@pytest.mark.parametrize(("raised", "expected"), RAISED)
async def test_what_a_further_service_raises_reaches_its_caller(
    raised: Exception, expected: type[HerdError]
) -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await alpha.deafen(
            (("test.Further", lambda server: server.add_generic_rpc_handlers((further_service(raised),))),)
        )
        await alpha.listen()
        async with Client(alpha.address) as client:
            with pytest.raises(expected) as caught:
                await client.rpc(client.channel.unary_unary("/test.Further/One"), b"")
            if isinstance(raised, HerdError):
                assert (caught.value.message, caught.value.hint) == (raised.message, raised.hint)
            many: Any = client.channel.unary_stream("/test.Further/Many")
            received = many(b"")
            assert await received.read() == b"first"
            with pytest.raises(grpc.aio.AioRpcError) as aborted:
                await received.read()
            assert isinstance(wire.error_of_rpc(aborted.value), expected)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


async def test_certificates_are_demanded_from_both_sides_and_name_the_sender(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> None:
    agent_tls, client_tls = authority.issue("alpha"), authority.issue("app")
    stranger = Authority(tmp_path_factory.mktemp("strange")).issue("stranger")
    senders: list[str] = []

    def note(frame: Any, deadline: float, reply: Any) -> None:
        senders.append(frame.sender)
        echo(frame, deadline, reply)

    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("echo", alpha, note)
        await alpha.deafen()
        await alpha.serve_at(ListenConfig(grpc=f"127.0.0.1:{alpha.port}", tls=agent_tls))
        async with Client(alpha.address, tls=client_tls) as client:
            assert await client.call("echo", "echo", 1) == 1
        assert senders == ["cert:app"]
        for refused in (Client(alpha.address), Client(alpha.address, tls=stranger)):
            with pytest.raises(Unreachable):
                await refused.open()
            await refused.close()


async def test_renewed_certificate_is_used_without_a_restart(authority: Authority) -> None:
    server = grpc.aio.server()
    tls = authority.issue("before", "renewed")
    port = add_port(server, "127.0.0.1:0", tls)
    await server.start()
    try:
        seen = []
        for name in ("before", "after"):
            if name == "after":
                authority.issue(name, "renewed")
            certificate = await asyncio.to_thread(served_certificate, port, authority, tls.cert, tls.key)
            seen.append(certificate)
        assert seen == ["before", "after"]
    finally:
        await server.stop(0)


def served_certificate(port: int, authority: Authority, cert: Path, key: Path) -> str:
    import socket
    import ssl

    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
    ):
        described: Any = connection.getpeercert()
        return str(dict(part[0] for part in described["subject"])["commonName"])


async def test_sync_client_has_the_same_methods_and_errors() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("echo", alpha)

        def work() -> None:
            with sync_client.Client(alpha.address) as client:
                assert client.call("echo", "echo", [1, 2]) == [1, 2]
                assert client.ask("echo", "echo", b"x").value == b"x"
                assert client.cast("echo", "echo").start == 1
                assert client.whereis("echo").host == "alpha"
                assert [name.name for name in client.names()] == ["echo"]
                assert [method.name for method in client.methods("echo")] == ["echo"]
                with pytest.raises(NoSuchName):
                    client.call("nobody", "echo")
                with pytest.raises(Invalid):
                    client.call("echo", "echo", object())
            client.close()

        await asyncio.to_thread(work)


async def test_sync_client_without_an_agent_leaves_no_thread() -> None:
    import threading

    def work() -> None:
        with pytest.raises(Unreachable):
            sync_client.Client("/nowhere/agent.sock")

    await asyncio.to_thread(work)
    assert not any(thread.name == "pgherd client" for thread in threading.enumerate())


async def test_link_follows_a_node_to_its_end(herd_of_two: tuple[Herd, Agent, Agent]) -> None:
    herd, alpha, beta = herd_of_two
    await herd.serve("echo", beta)
    connection = alpha.peers.channel(beta.node)
    assert connection is not None
    assert alpha.peers.channel(alpha.node) is None
    herd.leave(beta)
    await herd.settled()
    assert alpha.peers.channel(beta.node) is None
    await until(lambda: connection.get_state() is grpc.ChannelConnectivity.SHUTDOWN)


@pytest.fixture
async def herd_of_two() -> AsyncIterator[tuple[Herd, Agent, Agent]]:
    async with a_herd() as herd:
        yield herd, await herd.agent("alpha"), await herd.agent("beta")
