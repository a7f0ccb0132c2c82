"""What a link does with requests, up to the moment they are handed to gRPC and when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import link as link_module
from registry import wire
from registry.clock import SYSTEM_CLOCK, Boottime
from registry.errors import HerdError
from registry.frames import encode
from registry.link import BATCH_BYTES, BATCH_FRAMES, METHOD, NODE, Link, Outbox, State
from registry.security import CHANNEL_OPTIONS
from registry.v1 import messages_pb2 as pb
from tests.support.agents import until

Answering = Callable[[Any], Awaitable[None]]


@dataclass
class Asked:
    """A request, and what it heard."""

    deadline: Boottime
    replies: list[pb.Frame] = field(default_factory=list)
    returned: list[HerdError] = field(default_factory=list)

    def __call__(self, frame: pb.Frame, /) -> None:
        assert not self.is_settled
        self.replies.append(frame)

    def taken_back(self, why: HerdError) -> None:
        assert not self.is_settled
        self.returned.append(why)

    @property
    def is_settled(self) -> bool:
        return bool(self.replies or self.returned)

    @property
    def is_unknown(self) -> bool:
        return [reply.error.reason for reply in self.replies] == [pb.REASON_UNKNOWN_OUTCOME]


def ask(link: Link, body: str = "{}", timeout: float = 5.0) -> Asked:
    now = SYSTEM_CLOCK.now()
    asked = Asked(now + timeout)
    link.request(wire.request(pb.KIND_CALL, "name", "method", body), asked, now)
    return asked


@asynccontextmanager
async def linked(answering: Answering) -> AsyncIterator[Link]:
    """A link to a server that does ``answering`` with the stream; it runs until the block ends."""
    server = grpc.aio.server()

    async def serve(_: object, context: Any) -> None:
        await context.send_initial_metadata(((NODE, "beta-1"),))
        await answering(context)

    service, _, method = METHOD.lstrip("/").partition("/")
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        method: grpc.stream_stream_rpc_method_handler(serve)
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        link = Link("beta", channel, SYSTEM_CLOCK)
        task = asyncio.ensure_future(link.run())
        try:
            yield link
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await server.stop(0)


async def echoes(context: Any) -> None:
    while isinstance(raw := await context.read(), bytes):
        await context.write(
            b"".join(encode(pb.Frame(id=f.id, kind=pb.KIND_REPLY, json=f.json)) for f in wire.decode(raw))
        )


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=150), st.integers(1, 150))
def test_outbox_gives_everything_once_and_in_order(parts: list[bytes], pause: int) -> None:
    outbox = Outbox()
    taken = []
    for number, part in enumerate(parts, 1):
        assert outbox.put(part)
        if number % pause == 0:
            taken.append(outbox.take())
    while outbox:
        taken.append(outbox.take())
    assert b"".join(taken) == b"".join(parts)
    assert outbox.taken == len(parts)
    assert not outbox


def test_outbox_closes_a_batch_that_is_large() -> None:
    outbox = Outbox()
    parts = [bytes([n]) * (BATCH_BYTES // 2 - 1) for n in range(5)]
    for part in parts:
        outbox.put(part)
    batches = [outbox.take(), outbox.take()]
    assert outbox.taken == 5
    assert b"".join(batches) == b"".join(parts)
    assert max(len(batch) for batch in batches) < 2 * BATCH_BYTES


def test_withdrawn_frame_is_not_sent_and_later_ones_keep_their_place() -> None:
    outbox = Outbox()
    for part in (b"a", b"b", b"c"):
        outbox.put(part)
    assert outbox.withdraw(2)
    assert outbox.take() == b"ac"
    assert outbox.taken == 3
    assert not outbox.withdraw(2)
    outbox.put(b"d")
    assert outbox.withdraw(4)
    assert outbox.take() == b""


def test_outbox_is_bounded_in_frames_and_bytes() -> None:
    frames = Outbox(max_frames=2)
    assert [frames.put(b"x") for _ in range(3)] == [True, True, False]
    size = Outbox(max_bytes=10)
    assert [size.put(b"123456") for _ in range(3)] == [True, True, False]
    assert size.take() == b"123456" * 2
    assert size.put(b"1")


async def test_requests_of_one_turn_travel_together_and_many_in_halves() -> None:
    batches: list[int] = []

    async def count(context: Any) -> None:
        while isinstance(raw := await context.read(), bytes):
            batches.append(len(wire.decode(raw)))

    async with linked(count) as link:
        await link.opened.wait()
        for _ in range(BATCH_FRAMES):
            ask(link)
        await until(lambda: sum(batches) == BATCH_FRAMES)
        assert batches == [BATCH_FRAMES]
        batches.clear()
        for _ in range(2 * BATCH_FRAMES):
            ask(link)
        await until(lambda: sum(batches) == 2 * BATCH_FRAMES)
        assert batches == [BATCH_FRAMES, BATCH_FRAMES]


async def test_replies_find_their_askers_and_the_link_knows_the_node() -> None:
    async with linked(echoes) as link:
        asked = [ask(link, str(n)) for n in range(50)]
        await until(lambda: all(one.is_settled for one in asked))
        assert [one.replies[0].json for one in asked] == [str(n) for n in range(50)]
        assert link.node == "beta-1"
        assert link.unanswered == 0
        assert link.heard > 0


async def test_reply_that_nobody_waits_for_is_dropped() -> None:
    async def twice(context: Any) -> None:
        while isinstance(raw := await context.read(), bytes):
            await context.write(raw + encode(pb.Frame(id=999)) + raw)

    async with linked(twice) as link:
        asked = [ask(link), ask(link)]
        await until(lambda: all(one.is_settled for one in asked))
        last = ask(link)
        await until(lambda: last.is_settled)


async def test_handed_over_requests_are_unknown_when_the_stream_breaks_and_later_ones_come_back() -> None:
    let_go = asyncio.Event()

    async def breaks(context: Any) -> None:
        await context.read()
        let_go.set()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    async with linked(breaks) as link:
        first = [ask(link), ask(link)]
        await asyncio.wait_for(let_go.wait(), 5)
        await until(lambda: link.state is State.CLOSED)
        assert all(one.is_unknown for one in first)
        late = ask(link)
        assert late.returned
        assert "gone" in late.returned[0].message


async def test_requests_come_back_in_order_when_there_is_nobody_to_connect_to() -> None:
    async with grpc.aio.insecure_channel("unix:/nowhere/agent.sock", options=CHANNEL_OPTIONS) as channel:
        link = Link("nobody", channel, SYSTEM_CLOCK)
        order: list[int] = []

        class Ordered(Asked):
            def taken_back(self, why: HerdError) -> None:
                super().taken_back(why)
                order.append(numbers[id(self)])

        numbers: dict[int, int] = {}
        kept = []
        for n in range(20):
            now = SYSTEM_CLOCK.now()
            asked = Ordered(now + 5)
            numbers[id(asked)] = n
            kept.append(asked)
            link.request(wire.request(pb.KIND_CALL, "a", "b", "{}"), asked, now)
        await asyncio.wait_for(link.run(), 5)
    assert order == list(range(20))
    assert link.state is State.CLOSED
    assert link.why


async def test_garbage_from_the_other_side_ends_the_link() -> None:
    async def garbage(context: Any) -> None:
        await context.read()
        await context.write(b"\xff\xff")
        await context.read()

    async with linked(garbage) as link:
        asked = ask(link)
        await until(lambda: asked.is_settled)
        assert asked.is_unknown
        assert "garbage" in link.why


async def test_deadline_of_what_was_handed_over_ends_in_unknown() -> None:
    async def silent(context: Any) -> None:
        while isinstance(await context.read(), bytes):
            pass

    async with linked(silent) as link:
        await link.opened.wait()
        quick, slow = ask(link, timeout=0.05), ask(link, timeout=5)
        await until(lambda: quick.is_settled)
        assert quick.is_unknown
        assert not slow.is_settled


async def test_deadline_before_the_link_is_up_is_refused_and_never_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[str] = []

    async def note(context: Any) -> None:
        while isinstance(raw := await context.read(), bytes):
            heard.extend(frame.json for frame in wire.decode(raw))

    async with linked(note) as link:
        # The writer is not there yet in this turn of the loop, so both are still ours.
        late, good = ask(link, "1", timeout=0.001), ask(link, "2")
        link._expire(SYSTEM_CLOCK.now() + 1)
        assert late.returned
        await until(lambda: bool(heard))
        assert heard == ["2"]
        assert not good.is_settled


async def test_request_without_time_left_comes_back() -> None:
    async with linked(echoes) as link:
        assert ask(link, timeout=0.0).returned
        assert ask(link, timeout=-1.0).returned


async def test_too_many_unanswered_requests_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_UNANSWERED", 3)

    async def silent(context: Any) -> None:
        await context.read()

    async with linked(silent) as link:
        asked = [ask(link) for _ in range(4)]
        assert [reply.error.reason for reply in asked[3].replies] == [pb.REASON_OVERLOADED]
        assert not any(one.is_settled for one in asked[:3])


async def test_cancelled_link_settles_everything() -> None:
    async with linked(echoes) as link:
        await link.opened.wait()
        asked = ask(link)
    assert asked.is_settled
    assert link.state is State.CLOSED
