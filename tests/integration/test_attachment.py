"""The agent's end of the worker socket: connections that break, stall, lie or come back."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from node_agent import attachment
from node_agent.worker import framing
from registry.errors import Invalid, NoOwner, Overloaded
from registry.events import LinkDropped
from registry.v1 import messages_pb2, names_pb2, worker_pb2
from tests.support.worker import WITHIN, Desk, Watched

REFUSED, UNKNOWN = messages_pb2.OUTCOME_REFUSED, messages_pb2.OUTCOME_UNKNOWN


class RawWorker:
    """A worker that says exactly what a test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def say(self, message: worker_pb2.WorkerMessage) -> None:
        self.writer.write(framing.pack(message))

    def attach(self, worker: str = "raw", *, ready: bool = True) -> None:
        method = names_pb2.Method(name="echo", kind="call")
        self.say(
            worker_pb2.WorkerMessage(
                attach=worker_pb2.Attach(protocol=1, worker=worker, methods=[method], ready=ready)
            )
        )

    def answer(self, *frames: messages_pb2.Frame, accepted: int = 0) -> None:
        batch = messages_pb2.Batch(frames=frames, accepted=accepted)
        self.say(worker_pb2.WorkerMessage(batch=batch))

    async def hear(self) -> worker_pb2.AgentMessage:
        async with asyncio.timeout(WITHIN):
            (length,) = struct.unpack("<I", await self.reader.readexactly(4))
            return framing.agent_message(await self.reader.readexactly(length))

    async def hear_frames(self, count: int) -> list[messages_pb2.Frame]:
        frames: list[messages_pb2.Frame] = []
        while len(frames) < count:
            frames += (await self.hear()).batch.frames
        return frames

    async def until_dropped(self) -> None:
        async with asyncio.timeout(WITHIN):
            try:
                while await self.reader.read(65536):
                    pass
            except ConnectionError:
                return


@pytest_asyncio.fixture
async def raw(desk: Desk) -> AsyncIterator[RawWorker]:
    """A connection that has said nothing yet."""
    worker = RawWorker(*await asyncio.open_unix_connection(str(desk.path)))
    yield worker
    worker.writer.close()


@pytest_asyncio.fixture
async def attached(desk: Desk, raw: RawWorker) -> Watched:
    """What the agent sees of ``raw``, attached and ready."""
    watched = desk.watched["raw"] = Watched()
    raw.attach()
    assert (await raw.hear()).attached.credit == attachment.CREDIT
    await watched.until(lambda w: w.ready)
    return watched


def dropped(desk: Desk) -> list[str]:
    return [r.event.why for r in desk.events.all() if isinstance(r.event, LinkDropped)]


async def test_an_attached_worker_is_known_with_what_it_offers(attached: Watched) -> None:
    assert attached.attachment is not None
    assert (attached.attachment.worker, attached.attachment.closed) == ("raw", False)
    assert [method.name for method in attached.attachment.methods] == ["echo"]
    assert (attached.attached, attached.ready) == (1, 1)


async def test_replies_are_matched_in_any_order(attached: Watched, raw: RawWorker) -> None:
    first, second = attached.ask("echo", '"1"'), attached.ask("echo", '"2"')
    frames = await raw.hear_frames(2)
    for frame in reversed(frames):
        raw.answer(messages_pb2.Frame(id=frame.id, kind=messages_pb2.KIND_REPLY, json=frame.json))
    assert [(await first).json, (await second).json] == ['"1"', '"2"']


async def test_what_is_sent_in_one_turn_travels_in_one_batch(attached: Watched, raw: RawWorker) -> None:
    for _ in range(10):
        attached.send("echo")
    assert len((await raw.hear()).batch.frames) == 10


async def test_a_frame_carries_the_time_that_is_left(attached: Watched, raw: RawWorker) -> None:
    attached.send("echo", timeout=10.0)
    [frame] = await raw.hear_frames(1)
    assert 9000 < frame.remaining_ms <= 10_000


async def test_casts_are_answered_when_they_are_accepted(attached: Watched, raw: RawWorker) -> None:
    casts = [attached.ask("wake", kind=messages_pb2.KIND_CAST) for _ in range(3)]
    call = attached.ask("echo")
    await raw.hear_frames(4)
    raw.answer(accepted=2)
    await asyncio.wait_for(casts[1], WITHIN)
    assert [cast.done() for cast in casts] == [True, True, False]
    raw.answer(accepted=4)
    assert not (await casts[2]).HasField("error")
    assert not call.done()


async def test_a_broken_connection_makes_what_was_written_unknown_and_refuses_the_rest(
    attached: Watched, raw: RawWorker
) -> None:
    call, cast = attached.ask("echo"), attached.ask("wake", kind=messages_pb2.KIND_CAST)
    await raw.hear_frames(2)
    raw.answer(accepted=1)
    raw.writer.close()
    for answer in (await call, await cast):
        assert answer.error.reason == messages_pb2.REASON_UNKNOWN_OUTCOME
    await attached.until(lambda w: w.closed)
    assert attached.attachment is not None
    assert attached.attachment.closed
    with pytest.raises(NoOwner):
        attached.send("echo")


async def test_what_was_never_written_is_refused(attached: Watched) -> None:
    assert attached.attachment is not None
    waiting = attached.ask("echo")
    attached.attachment.close("a test")
    error = (await waiting).error
    assert (error.reason, error.outcome) == (messages_pb2.REASON_NO_OWNER, REFUSED)
    assert "a test" in error.message


async def test_a_worker_that_answers_nothing_uses_up_its_credit(attached: Watched, raw: RawWorker) -> None:
    waiting = [attached.ask("echo") for _ in range(attachment.CREDIT)]
    with pytest.raises(Overloaded):
        attached.send("echo")
    ping = attached.ask("ping", kind=messages_pb2.KIND_SYSTEM)
    frames = await raw.hear_frames(attachment.CREDIT + 1)
    raw.answer(*(messages_pb2.Frame(id=frame.id, kind=messages_pb2.KIND_REPLY) for frame in frames[:2]))
    await waiting[1]
    attached.send("echo")
    assert not ping.done(), "system messages have a lane of their own"


async def test_a_worker_that_does_not_read_is_not_buffered_for_without_bound(attached: Watched) -> None:
    async def fill() -> None:
        for _ in range(10):
            attached.send("echo", "x" * (4 * 1024 * 1024))
            await asyncio.sleep(0)

    with pytest.raises(Overloaded, match="bytes wait for it"):
        await fill()


async def test_a_frame_that_is_too_large_is_refused(attached: Watched) -> None:
    with pytest.raises(Invalid):
        attached.send("echo", "x" * (framing.MAX_BODY + 100_000))


async def test_a_deadline_ends_a_request_and_the_worker_is_told(attached: Watched, raw: RawWorker) -> None:
    patient = attached.ask("echo")
    hasty = attached.ask("echo", timeout=0.01)
    frames = await raw.hear_frames(2)
    error = (await asyncio.wait_for(hasty, WITHIN)).error
    assert (error.reason, error.outcome) == (messages_pb2.REASON_UNKNOWN_OUTCOME, UNKNOWN)
    [cancel] = await raw.hear_frames(1)
    assert (cancel.kind, cancel.id) == (messages_pb2.KIND_CANCEL, frames[1].id)
    raw.answer(messages_pb2.Frame(id=frames[1].id, kind=messages_pb2.KIND_REPLY, json="1"))
    await attached.until(lambda w: w.late)
    assert not patient.done()


async def test_a_deadline_that_passed_before_the_write_costs_the_worker_nothing(
    attached: Watched, raw: RawWorker
) -> None:
    expired = attached.ask("echo", timeout=-1.0)
    answered = await asyncio.wait_for(expired, WITHIN)
    assert answered.error.outcome in (UNKNOWN, REFUSED)


async def test_replies_are_acknowledged_without_more_traffic(attached: Watched, raw: RawWorker) -> None:
    call = attached.ask("echo")
    [frame] = await raw.hear_frames(1)
    raw.answer(messages_pb2.Frame(id=frame.id, kind=messages_pb2.KIND_REPLY))
    await call
    heard = await raw.hear()
    assert (heard.batch.accepted, len(heard.batch.frames)) == (1, 0)


async def test_stop_and_deadline_are_passed_on(attached: Watched, raw: RawWorker) -> None:
    assert attached.attachment is not None
    attached.attachment.set_deadline(123.5)
    attached.attachment.stop(250)
    assert (await raw.hear()).deadline.boottime == 123.5
    assert (await raw.hear()).stop.wait_ms == 250


async def test_a_worker_becomes_ready_once(desk: Desk, raw: RawWorker) -> None:
    watched = desk.watched["raw"] = Watched()
    raw.attach(ready=False)
    await watched.until(lambda w: w.attached)
    assert watched.ready == 0
    for _ in range(2):
        raw.say(worker_pb2.WorkerMessage(ready=worker_pb2.Ready()))
    raw.say(worker_pb2.WorkerMessage(crashed=worker_pb2.Crashed(why="w", traceback="t")))
    await watched.until(lambda w: w.crashed)
    assert (watched.ready, watched.crashed) == (1, [("w", "t")])


async def test_an_unknown_worker_is_told_so(desk: Desk, raw: RawWorker) -> None:
    raw.attach("stranger")
    assert (await raw.hear()).attached.refused == "nobody started it"
    await raw.until_dropped()
    assert desk.watched == {}


async def test_a_worker_of_an_older_protocol_is_refused(desk: Desk, raw: RawWorker) -> None:
    raw.say(worker_pb2.WorkerMessage(attach=worker_pb2.Attach(protocol=0, worker="raw")))
    assert "protocol is 0" in (await raw.hear()).attached.refused


@pytest.mark.parametrize(
    ("bytes_sent", "why"),
    [
        (struct.pack("<I", 17 * 1024 * 1024), "a message of 17825792 bytes was announced"),
        (struct.pack("<I", 5) + b"\xff" * 5, "5 bytes that are no WorkerMessage"),
        (struct.pack("<I", 0), "it did not say Attach first"),
        (
            framing.pack(worker_pb2.WorkerMessage(ready=worker_pb2.Ready())),
            "it did not say Attach first",
        ),
    ],
)
async def test_garbage_ends_the_connection_and_nothing_else(
    desk: Desk, raw: RawWorker, bytes_sent: bytes, why: str
) -> None:
    raw.writer.write(bytes_sent)
    await raw.until_dropped()
    assert why in dropped(desk)[0]
    other = RawWorker(*await asyncio.open_unix_connection(str(desk.path)))
    desk.watched["raw"] = Watched()
    other.attach()
    assert (await other.hear()).attached.refused == ""
    other.writer.close()


async def test_garbage_from_an_attached_worker_makes_its_requests_unknown(
    desk: Desk, attached: Watched, raw: RawWorker
) -> None:
    waiting = attached.ask("echo")
    await raw.hear_frames(1)
    raw.attach()
    assert (await waiting).error.outcome == UNKNOWN
    await attached.until(lambda w: w.closed)
    assert "twice" in dropped(desk)[0]


async def test_a_connection_that_says_nothing_is_dropped(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "ATTACH_WITHIN", 0.01)
    silent = RawWorker(*await asyncio.open_unix_connection(str(desk.path)))
    await silent.until_dropped()
    assert "did not say who it is" in dropped(desk)[0]
    silent.writer.close()


async def test_the_socket_of_a_dead_agent_is_replaced(desk: Desk, tmp_path: Path) -> None:
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    server = attachment.WorkerSocket(stale, lambda *_: "no", desk.events)
    await server.start()
    connection = RawWorker(*await asyncio.open_unix_connection(str(stale)))
    connection.attach()
    assert (await connection.hear()).attached.refused == "no"
    connection.writer.close()
    await server.close()
    await server.close()


async def test_a_worker_attaches_to_the_next_agent_and_is_not_interrupted(desk: Desk) -> None:
    process, worker = await desk.ready("Probe")
    running = worker.ask("hold")
    await worker.until_handling("hold")
    accepted = await worker.cast("remember", '{"what": "accepted by the old agent"}')
    assert not accepted.HasField("error")
    await desk.close()
    assert (await running).error.outcome == UNKNOWN
    await desk.open()
    await worker.until(lambda w: w.attached == 2 and w.ready == 2)
    assert worker.was_ready
    assert (await worker.ping())["handling"] == "hold"
    desk.gate.let_one_pass()
    await worker.until(lambda w: w.late)
    assert json.loads(worker.late[0].json) == "let go"
    assert await worker.call("remembered") == ["accepted by the old agent"]
    assert (await worker.call("who"))["pid"] == process.pid


async def test_answers_given_without_an_agent_are_told_to_the_next_one(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    before = await worker.call("echo", '{"value": "acknowledged"}')
    assert before == "acknowledged"
    worker.send("hold", key="request 1")
    await worker.until_handling("hold")
    await desk.close()
    desk.gate.let_one_pass()
    await desk.open()
    await worker.until(lambda w: w.attached == 2)
    await worker.until(lambda w: w.late)
    [late] = worker.late
    assert (json.loads(late.json), late.idempotency_key) == ("let go", "request 1")
    assert await worker.call("hold", key="request 1") == "let go", "the same request is not executed again"
    await desk.close()
    await desk.open()
    await worker.until(lambda w: w.attached == 3)
    await worker.call("who")
    assert len(worker.late) == 1, "the second agent had acknowledged it"


async def test_a_worker_waits_for_its_first_agent(desk: Desk) -> None:
    await desk.close()
    desk.path.unlink()
    _, worker = desk.start("Probe")
    await desk.open()
    await worker.until(lambda w: w.ready)
    assert await worker.call("echo", '{"value": 1}') == 1


async def test_a_worker_stops_without_an_agent(desk: Desk, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    process, _ = await desk.ready("Probe", args={"journal": str(journal)})
    await desk.close()
    process.kill(signal.SIGTERM)
    assert await process.exit_code() == 0
    assert journal.read_text() == "terminate shutdown\n"
