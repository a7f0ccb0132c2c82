"""Calls and casts through real gRPC: client, owner's agent, other agents, and what happens when one goes."""

from __future__ import annotations

import asyncio
import contextlib
import json

import grpc
import pytest

from registry import wire
from registry.client import Client
from registry.errors import (
    DaemonError,
    Invalid,
    NoOwner,
    NoSuchMethod,
    NoSuchName,
    UnknownOutcome,
    Unreachable,
    WrongEpoch,
)
from registry.link import METHOD, Stream
from registry.specs import Desired
from registry.v1 import messages_pb2 as pb
from registry.v1 import messages_pb2_grpc
from tests.support.agents import Herd, Keeps, a_herd, echo, refuses, until


async def test_call_reaches_a_daemon_of_the_asked_agent() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("echo", alpha)
        async with Client(alpha.address) as client:
            assert await client.call("echo", "echo", {"x": [1, "ä"]}) == {"x": [1, "ä"]}
            assert await client.call("echo", "echo", b"\x00bytes") == b"\x00bytes"
            assert await client.call("echo", "echo") == {}


async def test_call_goes_to_the_owners_agent_directly() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        await herd.serve("echo", beta)
        senders: list[str] = []

        def note(frame: pb.Frame, deadline: float, reply: object) -> None:
            senders.append(frame.sender)
            echo(frame, deadline, reply)  # type: ignore[arg-type]

        beta.children.handlers["echo"] = note
        async with Client(alpha.address) as client:
            assert await client.call("echo", "echo", 1) == 1
        assert alpha.peers.heard(beta.node) is None
        assert senders[0].startswith("ipv4:127.0.0.1")


async def test_agent_passes_on_what_is_for_another_host() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        await herd.serve("echo", beta)
        async with grpc.aio.insecure_channel(alpha.address) as channel:
            stub = messages_pb2_grpc.MessagesStub(channel)
            answer = await stub.Call(pb.CallRequest(name="echo", method="echo", json="[1]"), timeout=5)
        assert answer.json == "[1]"
        assert answer.epoch == 1
        assert alpha.peers.heard(beta.node) is not None
        assert beta.peers.heard(alpha.node) is not None


@pytest.mark.parametrize("method", ["Call", "Cast"])
async def test_plain_stub_gets_status_and_error_info(method: str) -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        async with grpc.aio.insecure_channel(alpha.address) as channel:
            stub = getattr(messages_pb2_grpc.MessagesStub(channel), method)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(pb.CallRequest(name="nobody", method="echo"), timeout=5)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        error = wire.error_of_rpc(caught.value)
        assert isinstance(error, NoSuchName)
        assert error.details["name"] == "nobody"


async def test_rejection_is_an_answer_for_a_plain_stub_and_an_exception_for_the_client() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("picky", alpha, refuses(DaemonError("no", details={"why": "taste"})))
        async with grpc.aio.insecure_channel(alpha.address) as channel:
            stub = messages_pb2_grpc.MessagesStub(channel)
            answer = await stub.Call(pb.CallRequest(name="picky", method="x"), timeout=5)
            assert answer.error.reason == pb.REASON_DAEMON_ERROR
        async with Client(alpha.address) as client:
            with pytest.raises(DaemonError) as caught:
                await client.call("picky", "x")
        assert caught.value.details == {"why": "taste"}


async def test_unknown_name_gets_a_suggestion() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("sweeper", alpha)
        async with Client(alpha.address) as client:
            with pytest.raises(NoSuchName) as caught:
                await client.call("sweper", "status")
        assert caught.value.hint == "did you mean 'sweeper'?"


@pytest.mark.parametrize(
    ("name", "problem"), [("Sweeper", "cannot begin"), ("", "empty"), ("a/b/c", "more than one")]
)
async def test_impossible_name_is_invalid(name: str, problem: str) -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        async with Client(alpha.address) as client:
            with pytest.raises(Invalid, match=problem):
                await client.call(name, "status")


async def test_payload_over_the_limit_is_refused_naming_size_and_limit() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("echo", alpha)
        async with Client(alpha.address) as client:
            largest = b"x" * wire.MAX_BODY
            assert await client.call("echo", "echo", largest) == largest
            with pytest.raises(Invalid, match=f"{wire.MAX_BODY + 1} bytes, at most {wire.MAX_BODY}"):
                await client.call("echo", "echo", largest + b"x")


async def test_stopped_name_is_refused_at_once_with_the_remedy() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        herd.declare("sweeper", Desired.STOPPED)
        await herd.settled()
        async with Client(alpha.address) as client:
            with pytest.raises(NoOwner) as caught:
                await client.call("sweeper", "status")
        assert "pgherd start sweeper" in caught.value.hint


async def test_call_waits_for_an_owner() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        herd.declare("echo")
        await herd.settled()
        async with Client(alpha.address) as client, asyncio.TaskGroup() as group:
            call = group.create_task(client.call("echo", "echo", 7))
            await until(lambda: alpha.router.waiting == 1)
            await herd.serve("echo", beta)
        assert call.result() == 7


async def test_ownerless_name_is_refused_before_the_caller_gives_up() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        herd.declare("echo")
        await herd.settled()
        async with Client(alpha.address) as client:
            with pytest.raises(NoOwner):
                await client.call("echo", "echo", timeout=0.2)
        assert alpha.router.waiting == 0


async def test_silent_daemon_ends_in_unknown() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("mute", alpha, Keeps())
        async with Client(alpha.address) as client:
            with pytest.raises(UnknownOutcome):
                await client.call("mute", "x", timeout=0.1)


async def test_expected_epoch_is_not_tried_elsewhere() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("echo", alpha, refuses(WrongEpoch("not this one")))
        async with Client(alpha.address) as client:
            with pytest.raises(WrongEpoch):
                await client.call("echo", "echo", expect_epoch=5)


async def test_wrong_epoch_is_tried_again_when_the_name_has_moved() -> None:
    async with a_herd() as herd:
        alpha, beta, gamma = [await herd.agent(host) for host in ("alpha", "beta", "gamma")]
        await herd.serve("echo", beta)
        del beta.children.handlers["echo"]
        async with grpc.aio.insecure_channel(alpha.address) as channel, asyncio.TaskGroup() as group:
            stub = messages_pb2_grpc.MessagesStub(channel)

            async def call() -> pb.CallResponse:
                return await stub.Call(pb.CallRequest(name="echo", method="echo", json="8"), timeout=5)

            task = group.create_task(call())
            await until(lambda: alpha.router.waiting == 1)
            await herd.serve("echo", gamma)
        assert task.result().json == "8"


async def test_call_that_was_handed_over_is_unknown_when_the_owners_agent_dies() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        keeps = Keeps()
        await herd.serve("mute", beta, keeps)
        async with Client(alpha.address) as direct, grpc.aio.insecure_channel(alpha.address) as relayed:
            stub = messages_pb2_grpc.MessagesStub(relayed)
            tasks = [
                asyncio.ensure_future(direct.call("mute", "x", 1)),
                asyncio.ensure_future(stub.Call(pb.CallRequest(name="mute", method="x"), timeout=5)),
            ]
            await until(lambda: len(keeps.requests) == 2)
            await beta.deafen()
            with pytest.raises(UnknownOutcome):
                await tasks[0]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await tasks[1]
            assert caught.value.code() is grpc.StatusCode.UNKNOWN
            assert isinstance(wire.error_of_rpc(caught.value), UnknownOutcome)


async def test_unreachable_agent_of_the_owner_is_tried_again_within_the_deadline() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        await herd.serve("echo", beta)
        await beta.deafen()
        async with Client(alpha.address) as client, asyncio.TaskGroup() as group:
            call = group.create_task(client.call("echo", "echo", 9))
            await until(lambda: alpha.router.waiting == 1)
            await beta.listen()
        assert call.result() == 9


@pytest.mark.slow
async def test_unreachable_agent_of_the_owner_is_refused_at_the_deadline() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        await herd.serve("echo", beta)
        await beta.deafen()
        async with Client(alpha.address) as client:
            with pytest.raises(Unreachable):
                await client.call("echo", "echo", timeout=0.5)


async def test_link_to_a_node_that_left_is_closed_and_its_calls_are_unknown() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        keeps = Keeps()
        await herd.serve("mute", beta, keeps)
        async with grpc.aio.insecure_channel(alpha.address) as channel:
            stub = messages_pb2_grpc.MessagesStub(channel)
            call = asyncio.ensure_future(stub.Call(pb.CallRequest(name="mute", method="x"), timeout=5))
            await until(lambda: len(keeps.requests) == 1)
            herd.leave(beta)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
        assert caught.value.code() is grpc.StatusCode.UNKNOWN
        assert alpha.peers.heard(beta.node) is not None


async def test_no_agent_is_unreachable_with_a_hint() -> None:
    with pytest.raises(Unreachable, match="no agent at unix:/nowhere") as caught:
        async with Client("/nowhere/agent.sock"):
            pass
    assert "PGHERD_AGENT" in caught.value.hint


async def test_client_finds_the_new_owner_after_its_agent_has_gone() -> None:
    async with a_herd() as herd:
        alpha, beta, gamma = [await herd.agent(host) for host in ("alpha", "beta", "gamma")]
        await herd.serve("echo", beta)
        async with Client(alpha.address) as client:
            assert await client.call("echo", "echo", 1) == 1
            await beta.deafen()
            del beta.children.handlers["echo"]
            herd.leave(beta)
            await herd.serve("echo", gamma)
            # The link may break under the first calls; these are unknown, and the route is sought anew.
            async with asyncio.timeout(5):
                answer = None
                while answer is None:
                    with contextlib.suppress(UnknownOutcome):
                        answer = await client.call("echo", "echo", 2)
            assert answer == 2


async def test_cast_is_answered_and_refused_like_a_call() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("echo", alpha)
        await herd.serve("none", alpha, refuses(NoSuchMethod("no such method")))
        async with Client(alpha.address) as client:
            assert (await client.cast("echo", "echo")).epoch == 1
            with pytest.raises(NoSuchMethod):
                await client.cast("none", "x")


async def test_requests_for_one_name_arrive_in_order_even_before_a_route_is_known() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        keeps = Keeps()
        await herd.serve("list", beta, keeps)
        async with Client(alpha.address) as client:
            calls = [asyncio.ensure_future(client.call("list", "add", n)) for n in range(300)]
            await until(lambda: len(keeps.requests) == 300)
            assert [json.loads(body) for body in keeps.bodies] == list(range(300))
            keeps.answer()
            assert await asyncio.gather(*calls) == list(range(300))


async def test_garbage_ends_its_own_stream_only() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("echo", alpha)
        async with Client(alpha.address) as client, grpc.aio.insecure_channel(alpha.address) as channel:
            stream: Stream = channel.stream_stream(METHOD)()
            await stream.write(b"\xff\xffgarbage")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert isinstance(wire.error_of_rpc(caught.value), Invalid)
            assert await client.call("echo", "echo", 1) == 1


async def test_garbage_after_requests_does_not_call_them_refused() -> None:
    """One of them is being executed: a caller who reads "refused" would repeat it."""
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        keeps = Keeps()
        await herd.serve("mute", alpha, keeps)
        async with grpc.aio.insecure_channel(alpha.address) as channel:
            stream: Stream = channel.stream_stream(METHOD)()
            frame = pb.Frame(id=1, kind=pb.KIND_CALL, to="mute")
            await stream.write(pb.Batch(frames=[frame]).SerializeToString())
            await until(lambda: len(keeps.requests) == 1)
            await stream.write(b"\xff\xffgarbage")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
        assert caught.value.code() is grpc.StatusCode.UNKNOWN
        error = wire.error_of_rpc(caught.value)
        assert isinstance(error, UnknownOutcome)
        assert error.details["cause"] == "INVALID"
        assert "not a pgherd.v1.Batch" in error.message


@pytest.mark.parametrize("kind", [pb.KIND_UNSPECIFIED, pb.KIND_REPLY, pb.KIND_SYSTEM, 77])
async def test_frame_that_is_no_request_is_refused_and_the_link_goes_on(kind: int) -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("echo", alpha)
        async with grpc.aio.insecure_channel(alpha.address) as channel:
            stream = messages_pb2_grpc.MessagesStub(channel).Link()
            odd = pb.Frame(id=1, kind=kind, to="echo")  # type: ignore[arg-type]
            good = pb.Frame(id=2, kind=pb.KIND_CALL, to="echo", json="5")
            await stream.write(pb.Batch(frames=[odd, good]))
            await stream.done_writing()
            answers = {frame.id: frame async for batch in stream for frame in batch.frames}
        assert answers[1].error.reason == pb.REASON_INVALID
        assert answers[2].json == "5"


async def test_oversized_frame_of_a_foreign_client_is_refused() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("echo", alpha)
        async with grpc.aio.insecure_channel(alpha.address) as channel:
            stream = messages_pb2_grpc.MessagesStub(channel).Link()
            large = pb.Frame(id=1, kind=pb.KIND_CALL, to="echo", data=b"x" * (wire.MAX_BODY + 1))
            wide = pb.Frame(id=2, kind=pb.KIND_CALL, to="echo", method="m" * (wire.MAX_HEAD + 1))
            await stream.write(pb.Batch(frames=[large, wide]))
            await stream.done_writing()
            answers = {frame.id: frame async for batch in stream for frame in batch.frames}
        assert str(wire.MAX_BODY) in answers[1].error.message
        assert str(wire.MAX_HEAD) in answers[2].error.message


@pytest.mark.slow
async def test_directory_out_of_sync_is_unreachable_not_unknown_name() -> None:
    async with a_herd() as herd:
        alpha = await herd.agent("alpha")
        await herd.serve("echo", alpha)
        herd.store.go_away()
        await until(lambda: not alpha.directory.in_sync, 10)
        async with Client(alpha.address) as client:
            assert await client.call("echo", "echo", 1) == 1
            with pytest.raises(Unreachable, match="not in sync"):
                await client.call("other", "echo")


async def test_peer_request_is_not_relayed_again() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        await herd.serve("echo", beta)
        async with grpc.aio.insecure_channel(alpha.address) as channel:
            metadata = (("pgherd-role", "peer"), ("pgherd-node", "gamma-00000000"))
            stream = messages_pb2_grpc.MessagesStub(channel).Link(metadata=metadata)
            await stream.write(pb.Batch(frames=[pb.Frame(id=4, kind=pb.KIND_CALL, to="echo")]))
            batch = await anext(aiter(stream))
            stream.cancel()
        assert batch.frames[0].error.reason == pb.REASON_WRONG_EPOCH
        assert batch.frames[0].error.details["owner"] == "beta"
        assert alpha.peers.heard("gamma-00000000") is not None


async def names_of(herd: Herd, address: str) -> dict[str, str]:
    async with Client(address) as client:
        return {name.name: name.state for name in await client.names()}


async def test_names_say_where_they_stand() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        epoch = await herd.serve("ready", beta)
        herd.declare("unowned")
        herd.declare("stopped", Desired.STOPPED)
        herd.declare("starting")
        herd.own("starting", beta, None)
        await herd.settled()
        assert await names_of(herd, alpha.address) == {
            "ready": "ready",
            "unowned": "unowned",
            "stopped": "stopped",
            "starting": "starting",
        }
        async with Client(alpha.address) as client:
            where = await client.whereis("ready", linearizable=True)
            assert (where.host, where.epoch, where.address) == ("beta", epoch, beta.address)
            assert [method.name for method in await client.methods("ready")] == ["echo"]
            with pytest.raises(NoOwner):
                await client.methods("unowned")
            herd.store.go_away()
            with pytest.raises(Unreachable):
                await client.whereis("ready", linearizable=True)
