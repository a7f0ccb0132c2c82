"""Clients that do not read, ask too much, or listen where somebody listens already."""

from __future__ import annotations

import asyncio
import socket
import stat
from pathlib import Path
from typing import Any

import grpc
import pytest

from registry import wire
from registry.client import Client
from registry.config import ListenConfig
from registry.errors import Denied, HerdError, Overloaded, UnknownOutcome, Unreachable
from registry.link import CONNECT_TIMEOUT, Reply
from registry.server import messages
from registry.v1 import messages_pb2 as pb
from registry.v1 import messages_pb2_grpc
from tests.support.agents import Keeps, a_herd, until


@pytest.mark.slow
async def test_client_that_does_not_read_is_held_back_and_others_are_served() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("echo", alpha)
        taken: list[int] = []
        patient = alpha.children.handlers["echo"]

        def count(frame: pb.Frame, deadline: float, reply: Reply) -> None:
            taken.append(frame.id)
            patient(frame, deadline, reply)

        alpha.children.handlers["echo"] = count
        narrow = [
            ("grpc.http2.lookahead_bytes", 16_384),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.max_receive_message_length", wire.MAX_BATCH),
        ]
        async with (
            Client(alpha.address) as client,
            grpc.aio.insecure_channel(alpha.address, options=narrow) as channel,
        ):
            stream = messages_pb2_grpc.MessagesStub(channel).Link()
            body = b"x" * (1 << 20)

            async def flood() -> None:
                for number in range(80):
                    frame = pb.Frame(id=number, kind=pb.KIND_CALL, to="echo", data=body)
                    await stream.write(pb.Batch(frames=[frame]))

            flooding = asyncio.ensure_future(flood())
            await until(lambda: len(taken) > messages.HELD_BACK_BYTES >> 20)
            assert await client.call("echo", "echo", 2) == 2
            assert len(taken) < 80, "what it would not read is not asked"
            answers: list[int] = []
            async with asyncio.timeout(10):
                while len(answers) < 80:
                    batch = await stream.read()
                    assert isinstance(batch, pb.Batch)
                    answers += [frame.id for frame in batch.frames]
            await flooding
            assert answers == list(range(80))


@pytest.mark.slow
async def test_large_answers_to_calls_of_one_link_that_come_at_once_all_arrive() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        keeps = Keeps()
        await herd.serve("mute", alpha, keeps)
        async with Client(alpha.address) as client:
            calls = [asyncio.ensure_future(client.call("mute", "x")) for _ in range(12)]
            await until(lambda: len(keeps.requests) == 12)
            for _, _, reply in keeps.requests:
                reply(pb.Frame(kind=pb.KIND_REPLY, data=bytes(wire.MAX_BODY)))
            for call in calls:
                assert len(await call) == wire.MAX_BODY


async def test_answer_for_which_there_is_no_room_is_unknown_and_the_others_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(messages, "MAX_ANSWER_BYTES", 1000)
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        keeps = Keeps()
        await herd.serve("mute", alpha, keeps)
        async with Client(alpha.address) as client:
            calls = [asyncio.ensure_future(client.call("mute", "x")) for _ in range(3)]
            await until(lambda: len(keeps.requests) == 3)
            for _, _, reply in keeps.requests:
                reply(pb.Frame(kind=pb.KIND_REPLY, data=bytes(600)))
            ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in ended] == [bytes, bytes, UnknownOutcome]
        assert "not being read" in str(ended[2])


async def test_link_with_too_many_unanswered_requests_is_refused_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(messages, "MAX_UNANSWERED", 10)
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        keeps = Keeps()
        await herd.serve("mute", alpha, keeps)
        async with Client(alpha.address) as client:
            calls = [asyncio.ensure_future(client.call("mute", "x", n)) for n in range(11)]
            await until(lambda: any(call.done() for call in calls))
            assert len(keeps.requests) == 10
            keeps.answer()
            ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in ended if isinstance(error, HerdError)] == [Overloaded]


async def test_client_that_goes_away_leaves_nothing_behind() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        keeps = Keeps()
        await herd.serve("mute", alpha, keeps)
        async with Client(alpha.address) as client:
            call = asyncio.ensure_future(client.call("mute", "x"))
            await until(lambda: len(keeps.requests) == 1)
        assert isinstance((await asyncio.gather(call, return_exceptions=True))[0], HerdError)
        keeps.answer()
        async with Client(alpha.address) as client:
            alpha.children.handlers["mute"] = keeps
            again = asyncio.ensure_future(client.call("mute", "x", 2))
            await until(lambda: len(keeps.requests) == 1)
            keeps.answer()
            assert await again == 2


@pytest.mark.slow
async def test_thousands_of_unary_calls_are_served_up_to_a_bound_and_the_rest_is_refused() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        keeps = Keeps()
        await herd.serve("mute", alpha, keeps)
        async with grpc.aio.insecure_channel(alpha.address) as channel:
            stub = messages_pb2_grpc.MessagesStub(channel)
            request = pb.CallRequest(name="mute", method="x")
            calls = [stub.Call(request, timeout=30) for _ in range(messages.MAX_UNARY + 500)]
            ended = asyncio.gather(*calls, return_exceptions=True)
            await until(lambda: len(keeps.requests) == messages.MAX_UNARY, 20)
            await until(lambda: sum(call.done() for call in calls) == 500, 20)
            keeps.answer()
            failed = [error for error in await ended if isinstance(error, BaseException)]
        assert len(failed) == 500
        for error in failed:
            assert isinstance(error, grpc.aio.AioRpcError)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert isinstance(wire.error_of_rpc(error), Overloaded)


async def test_request_that_grpc_itself_turns_away_for_its_size_has_not_been_executed() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        keeps = Keeps()
        await herd.serve("mute", alpha, keeps)
        async with grpc.aio.insecure_channel(alpha.address) as channel:
            stub = messages_pb2_grpc.MessagesStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Call(pb.CallRequest(name="mute", data=b"x" * wire.MAX_BATCH), timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not keeps.requests


async def test_unary_garbage_is_invalid() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        async with grpc.aio.insecure_channel(alpha.address) as channel:
            call: Any = channel.unary_unary("/pgherd.v1.Messages/Call")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\xff\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_socket_of_a_dead_agent_is_replaced_and_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("echo", alpha)
        await alpha.deafen()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        await alpha.listen(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        async with Client(str(path)) as client:
            assert await client.call("echo", "echo", 1) == 1
        beta = await herd.agent("beta")
        await beta.deafen()
        with pytest.raises(OSError, match="another agent listens there"):
            await beta.listen(path)


async def test_port_in_use_is_an_error_with_the_address() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        await beta.deafen()
        beta.port = alpha.port
        with pytest.raises(OSError, match=f"127.0.0.1:{alpha.port}: it is in use"):
            await beta.listen()


async def test_file_in_the_way_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    path.write_text("mine")
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await alpha.deafen()
        with pytest.raises(OSError, match="no socket"):
            await alpha.listen(path)
    assert path.read_text() == "mine"


async def test_agent_does_not_listen_in_the_open_without_tls() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await alpha.deafen()
        with pytest.raises(Denied, match="without TLS"):
            await alpha.serve_at(ListenConfig(grpc="10.1.2.3:7430"))


async def test_client_does_not_speak_in_the_open_without_tls() -> None:
    with pytest.raises(Denied, match=r"10\.1\.2\.3:7430"):
        Client("10.1.2.3:7430")


@pytest.mark.slow
async def test_something_that_accepts_and_says_nothing_is_no_agent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(f"127.0.0.1:{silent.getsockname()[1]}")
        async with asyncio.timeout(CONNECT_TIMEOUT + 1):
            with pytest.raises(Unreachable, match=r"no agent at 127\.0\.0\.1"):
                await client.open()
        await client.close()
