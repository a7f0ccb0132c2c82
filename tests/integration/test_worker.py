"""One worker process, as its agent sees it."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pytest

from node_agent import attachment
from registry.clock import SYSTEM_CLOCK
from registry.v1 import messages_pb2
from tests.support.worker import WITHIN, Desk

REFUSED, UNKNOWN, REPLY = (
    messages_pb2.OUTCOME_REFUSED,
    messages_pb2.OUTCOME_UNKNOWN,
    messages_pb2.OUTCOME_REPLY,
)


async def test_a_daemon_knows_who_it_is_and_answers_calls(desk: Desk) -> None:
    process, worker = await desk.ready("Probe", epoch=7, start=3, args={"names": ["a"]})
    who = await worker.call("who")
    assert who == {
        "name": "probe",
        "epoch": 7,
        "start": 3,
        "node": "alpha-1",
        "host": "alpha",
        "pid": process.pid,
        "names": ["a"],
    }
    answer = await worker.ask("echo", '{"value": [1, "ä", null]}')
    assert (json.loads(answer.json), answer.epoch, answer.start) == ([1, "ä", None], 7, 3)


async def test_a_child_without_a_global_name_is_called_by_its_id(desk: Desk) -> None:
    _, worker = await desk.ready("Probe", name="", epoch=0, child="local")
    assert (await worker.call("who"))["name"] == "local"


async def test_bytes_travel_as_bytes(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    assert await worker.call("raw", b"abc\x00") == b"\x00cba"


async def test_a_worker_tells_what_it_offers(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    offered = {method.name: method for method in worker.methods}
    assert offered["order"].signature == "(order: Order, urgent: bool = False) -> Order"
    assert offered["order"].description == "Take an order."
    assert offered["remember"].kind == "cast"
    told = await worker.call("methods", kind=messages_pb2.KIND_SYSTEM)
    assert [method["name"] for method in told] == list(offered)


async def test_messages_are_handled_one_at_a_time_in_order(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    waiting = worker.ask("hold")
    for number in range(100):
        worker.send("remember", f'{{"what": "{number}"}}', kind=messages_pb2.KIND_CAST)
    after = worker.ask("remembered")
    desk.gate.let_one_pass()
    assert json.loads((await after).json) == [str(number) for number in range(100)]
    assert waiting.done()


async def test_a_plain_def_is_serial_too_and_leaves_the_loop_alone(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    await worker.call("later", '{"delay": 0.0, "what": "timer"}')
    waiting = worker.ask("block_thread")
    await worker.until_handling("block_thread")
    after = worker.ask("remembered")
    assert (await worker.ping())["handling"] == "block_thread"
    assert not after.done()
    desk.gate.let_one_pass()
    assert json.loads((await waiting).json) == "let go"
    assert "timer" in json.loads((await after).json)


async def test_a_cast_is_answered_by_its_acceptance(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    waiting = worker.ask("hold")
    accepted = await worker.cast("remember", '{"what": "x"}')
    assert not accepted.HasField("error")
    assert (accepted.epoch, accepted.start) == (7, 1)
    assert not waiting.done()
    desk.gate.let_one_pass()
    assert await worker.call("remembered") == ["x"]


async def test_casts_that_nobody_could_handle_are_refused(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    unknown = await worker.cast("rememberr")
    wrong = await worker.cast("remember", '{"what": 5}')
    assert unknown.error.reason == messages_pb2.REASON_NO_SUCH_METHOD
    assert unknown.error.hint == 'did you mean "remember"?'
    assert wrong.error.reason == messages_pb2.REASON_INVALID
    assert "must be str" in wrong.error.message


async def test_a_reject_is_an_answer(desk: Desk) -> None:
    process, worker = await desk.ready("Probe")
    error = (await worker.ask("refuse")).error
    assert (error.reason, error.outcome) == (messages_pb2.REASON_DAEMON_ERROR, REPLY)
    assert error.message == "not today"
    assert {"day": "monday", "limit": "3"}.items() <= dict(error.details).items()
    assert (await worker.call("who"))["pid"] == process.pid


async def test_an_exception_crashes_the_process_and_its_caller_does_not_know(desk: Desk) -> None:
    process, worker = await desk.ready("Probe")
    crashing = worker.ask("crash", '{"what": "disk on fire\\nreally"}')
    behind = worker.ask("echo")
    error = (await crashing).error
    assert (error.reason, error.outcome) == (messages_pb2.REASON_UNKNOWN_OUTCOME, UNKNOWN)
    assert (await behind).error.outcome == REFUSED, "it never started, and the worker knew"
    assert await process.exit_code() == 1
    await worker.until(lambda w: w.closed)
    [(why, traceback)] = worker.crashed
    assert why == "crash: RuntimeError: disk on fire"
    assert "daemons.py" in traceback
    assert "RuntimeError: disk on fire" in process.output


async def test_a_result_that_cannot_be_written_is_a_crash_of_its_author(desk: Desk) -> None:
    process, worker = await desk.ready("Probe")
    assert (await worker.ask("unspeakable")).error.outcome == UNKNOWN
    assert await process.exit_code() == 1
    assert "unspeakable returned" in worker.crashed[0][0]


async def test_a_result_that_is_too_large_is_an_error_of_a_call_that_ran(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    assert len(await worker.call("large", f'{{"size": {4 * 1024 * 1024}}}')) == 4 * 1024 * 1024
    error = (await worker.ask("large", f'{{"size": {4 * 1024 * 1024 + 1}}}')).error
    assert error.reason == messages_pb2.REASON_DAEMON_ERROR
    assert "4194305 bytes" in error.message


async def test_a_fence_that_was_refused_ends_the_process_with_its_own_code(desk: Desk) -> None:
    process, worker = await desk.ready("Probe")
    assert (await worker.ask("superseded")).error.outcome == UNKNOWN
    assert await process.exit_code() == 75
    assert worker.crashed[0][0] == "superseded: superseded: Fenced: a newer owner has epoch 8"


async def test_a_worker_killed_in_a_call_leaves_it_unknown(desk: Desk) -> None:
    process, worker = await desk.ready("Probe")
    running, queued = worker.ask("hold"), worker.ask("echo")
    await worker.until_handling("hold")
    process.kill()
    for answer in (await running, await queued):
        assert answer.error.reason == messages_pb2.REASON_UNKNOWN_OUTCOME
        assert (answer.epoch, answer.start) == (7, 1)
    await worker.until(lambda w: w.closed)
    assert await process.exit_code() == -signal.SIGKILL


async def test_a_stop_finishes_the_running_handler_and_refuses_the_rest(desk: Desk, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    process, worker = await desk.ready("Probe", args={"journal": str(journal)})
    running = worker.ask("hold")
    queued = [worker.ask("echo"), worker.ask("count")]
    await worker.until_handling("hold")
    assert worker.attachment is not None
    worker.attachment.stop(1000)
    for answer in queued:
        error = (await answer).error
        assert (error.reason, error.outcome) == (messages_pb2.REASON_NO_OWNER, REFUSED)
    assert not running.done()
    late = (await worker.ask("echo")).error
    assert late.reason == messages_pb2.REASON_NO_OWNER
    desk.gate.let_one_pass()
    assert json.loads((await running).json) == "let go"
    assert await process.exit_code() == 0
    assert journal.read_text() == "terminate shutdown\n"
    assert worker.crashed == []


async def test_sigterm_is_a_stop(desk: Desk, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    process, _ = await desk.ready("Probe", args={"journal": str(journal)})
    process.kill(signal.SIGTERM)
    assert await process.exit_code() == 0
    assert journal.read_text() == "terminate shutdown\n"


async def test_a_stop_interrupts_init(desk: Desk) -> None:
    process, worker = desk.start("NeverReady")
    await worker.until(lambda w: w.attached)
    assert (await worker.ping())["state"] == "starting"
    process.kill(signal.SIGTERM)
    assert await process.exit_code() == 0
    assert worker.ready == 0


@pytest.mark.parametrize(
    ("behaviour", "args", "why"),
    [
        ("BrokenInit", {}, "init: LookupError: no such queue"),
        ("no_such_module:Shop", {}, "cannot import no_such_module: ModuleNotFoundError"),
        ("Prob", {}, 'daemons.py has no class Prob: did you mean "Probe"?'),
        (
            "Probe",
            {"name": []},
            'Probe: args: there is no argument "name" (did you mean "names"?)',
        ),
    ],
)
async def test_what_cannot_be_started_says_why_in_one_line(
    desk: Desk, behaviour: str, args: dict[str, object], why: str
) -> None:
    process, worker = desk.start(behaviour, args=args)
    await worker.until(lambda w: w.crashed)
    assert await process.exit_code() == 1
    [(told, _)] = worker.crashed
    assert why in told
    assert "\n" not in told
    assert told.split(": ", 1)[1] in process.output
    assert worker.ready == 0


async def test_a_repeated_key_is_executed_once(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    holding = worker.ask("hold")
    first, joined = worker.ask("count", key="k"), worker.ask("count", key="k")
    desk.gate.let_one_pass()
    await holding
    repeated = await worker.ask("count", key="k")
    other = await worker.ask("count", key="other")
    none = await worker.ask("count")
    answers = [json.loads(a.json) for a in (await first, await joined, repeated, other, none)]
    assert answers == [1, 1, 1, 2, 3]


@pytest.mark.slow
async def test_a_handler_that_blocks_the_loop_does_not_make_the_worker_deaf(desk: Desk) -> None:
    process, worker = await desk.ready("Probe")
    before = worker.ask("echo", '{"value": "before"}')
    blocked = worker.ask("block_loop")
    assert json.loads((await before).json) == "before", "answers leave although the loop is held"
    await worker.until_handling("block_loop")
    assert not (await worker.cast("remember", '{"what": "x"}')).HasField("error")
    assert (await worker.ping())["queued"] == 1
    while "holds the event loop" not in process.output:
        assert (await worker.ping())["handling"] == "block_loop"
    assert "in block_loop" in process.output, "with the stack of the handler"
    desk.gate.let_one_pass()
    assert json.loads((await blocked).json) == "let go"


@pytest.mark.slow
async def test_a_handler_that_waits_is_not_reported(desk: Desk) -> None:
    process, worker = await desk.ready("Probe")
    waiting = worker.ask("hold")
    while ((await worker.ping())["handling_seconds"] or 0) < 2.5:
        pass
    desk.gate.let_one_pass()
    await waiting
    assert process.output == ""


async def test_a_full_mailbox_refuses(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    waiting = worker.ask("hold")
    await worker.until_handling("hold")
    queued = [worker.ask("echo") for _ in range(1000)]
    error = (await worker.ask("echo")).error
    assert (error.reason, error.outcome) == (messages_pb2.REASON_OVERLOADED, REFUSED)
    assert "1000 messages" in error.message
    assert (await worker.ping())["queued"] == 1000
    desk.gate.let_one_pass()
    await waiting
    for answer in queued:
        assert not (await answer).HasField("error")


async def test_a_request_whose_time_is_up_is_not_started(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    waiting = worker.ask("hold")
    await worker.until_handling("hold")
    late = await worker.ask("count", timeout=0.02)
    assert late.error.outcome in (UNKNOWN, REFUSED)
    await worker.cast("remember", '{"what": "kept"}')
    desk.gate.let_one_pass()
    await waiting
    assert await worker.call("remembered") == ["kept"], "the late one was cancelled"


async def test_a_request_whose_time_ends_in_the_mailbox_is_refused_while_its_caller_listens(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, worker = await desk.ready("Probe")
    waiting = worker.ask("hold")
    await worker.until_handling("hold")
    monkeypatch.setattr(attachment, "KEPT_SHARE", 0.999)
    monkeypatch.setattr(attachment, "KEPT", WITHIN)
    late, keyed = worker.ask("count"), worker.ask("count", key="count")
    for answer in (await late, await keyed):
        assert (answer.error.reason, answer.error.outcome) == (messages_pb2.REASON_OVERLOADED, REFUSED)
        assert "its time is over, and hold runs for" in answer.error.message
    monkeypatch.undo()
    desk.gate.let_one_pass()
    assert json.loads((await waiting).json) == "let go"
    assert await worker.call("count", key="count") == 1, "the late ones were not executed"


async def test_a_worker_past_its_deadline_handles_nothing(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    assert worker.attachment is not None
    worker.attachment.set_deadline(SYSTEM_CLOCK.now() - 1)
    error = (await worker.ask("count")).error
    assert (error.reason, error.outcome) == (messages_pb2.REASON_FENCED, REFUSED)
    worker.attachment.set_deadline(SYSTEM_CLOCK.now() + 60)
    assert await worker.call("count") == 1


async def test_a_request_for_another_epoch_is_refused(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    error = (await worker.ask("count", epoch=6)).error
    assert (error.reason, error.outcome) == (messages_pb2.REASON_WRONG_EPOCH, REFUSED)
    assert error.details["epoch"] == "7"
    assert not (await worker.ask("count", epoch=7)).HasField("error")


async def test_undeclared_methods_reach_the_catch_all(desk: Desk) -> None:
    _, worker = await desk.ready("CatchAll")
    assert await worker.call("declared") == "declared"
    await worker.cast("anything", '{"a": 1}')
    assert await worker.call("whatever", '{"b": [2]}') == {
        "method": "whatever",
        "arguments": "{'b': [2]}",
        "sender": "uid:0",
        "casts": ["anything"],
    }


async def test_a_timer_is_a_message_to_oneself(desk: Desk, tmp_path: Path) -> None:
    _, worker = await desk.ready("Probe")
    await worker.call("later", '{"delay": 0.01, "what": "tick"}')
    while await worker.call("remembered") == []:
        pass
    assert await worker.call("remembered") == ["tick"]
    assert await worker.call("never_mind") is False, "it has been handled"
    await worker.call("later", '{"delay": 60, "what": "never"}')
    assert await worker.call("never_mind") is True


async def test_a_timer_waits_until_the_daemon_may_act_again(desk: Desk) -> None:
    process, worker = await desk.ready("Probe")
    assert worker.attachment is not None
    await worker.call("later", '{"delay": 0.02, "what": "tick"}')
    worker.attachment.set_deadline(SYSTEM_CLOCK.now() - 1)
    async with asyncio.timeout(WITHIN):
        while "the timer for remember waits" not in process.output:
            await worker.ping()
    worker.attachment.set_deadline(SYSTEM_CLOCK.now() + 60)
    async with asyncio.timeout(WITHIN):
        while await worker.call("remembered") == []:
            pass


async def test_an_accepted_cast_is_handled_however_late(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    worker.send("hold")
    await worker.until_handling("hold")
    await worker.cast("remember", '{"what": "late"}', timeout=0.05)
    expired = await worker.ask("echo", timeout=0.06)
    assert expired.error.outcome in (UNKNOWN, REFUSED), "so the time of the cast is over too"
    desk.gate.let_one_pass()
    assert await worker.call("remembered") == ["late"]


async def test_an_argument_type_that_fails_is_an_invalid_request(desk: Desk) -> None:
    process, worker = await desk.ready("Probe")
    error = (await worker.ask("picky", '{"thing": {"value": 1}}')).error
    assert error.reason == messages_pb2.REASON_INVALID
    assert "KeyError" in error.message
    assert (await worker.call("who"))["pid"] == process.pid


async def test_a_timer_with_a_mistake_fails_where_it_is_set(desk: Desk) -> None:
    process, worker = await desk.ready("Probe")
    await worker.ask("wrong_timer")
    assert await process.exit_code() == 1
    assert worker.crashed[0][0] == (
        'wrong_timer: ValueError: probe has no method "rember" to send itself; did you mean "remember"?'
    )


async def test_an_unknown_database_is_named(desk: Desk) -> None:
    process, worker = await desk.ready("Probe", databases={"app": "service=app"})
    await worker.ask("open_database", '{"database": "apps"}')
    assert await process.exit_code() == 1
    assert 'has no database "apps": did you mean "app"?' in worker.crashed[0][0]


async def test_system_messages_are_known_or_refused(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    error = (await worker.ask("pong", kind=messages_pb2.KIND_SYSTEM)).error
    assert (error.reason, error.hint) == (messages_pb2.REASON_NO_SUCH_METHOD, 'did you mean "ping"?')


async def test_an_unwanted_worker_ends_without_being_restarted(desk: Desk) -> None:
    process, worker = desk.start("Probe")
    desk.watched.clear()
    assert await process.exit_code() == 75
    assert "nobody started it" in process.output
    assert worker.attached == 0


@pytest.mark.slow
async def test_answers_that_are_made_faster_than_they_are_read_hold_the_handlers_back(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    calls = [worker.ask("large", f'{{"size": {4 * 1024 * 1024}}}') for _ in range(40)]
    for call in calls:
        answer = await asyncio.wait_for(call, WITHIN)
        assert not answer.HasField("error"), answer.error
    assert (worker.attached, worker.closed) == (1, [])
