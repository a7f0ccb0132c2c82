"""How the workers of a host are, asked beside what their handlers do."""

from __future__ import annotations

import signal

import pytest

from node_agent.pulse import HANGS_AFTER, Pulse, feel
from registry.clock import SYSTEM_CLOCK
from tests.support.worker import Desk


@pytest.mark.parametrize(
    ("pulse", "text", "is_problem"),
    [
        (Pulse(), "", False),
        (Pulse(queued=2), "2 messages wait", False),
        (Pulse(handling="slow", seconds=1.0), "its handler `slow` runs for 1.0 s, 0 messages wait", False),
        (
            Pulse(handling="slow", seconds=HANGS_AFTER + 0.1, queued=1),
            "its handler `slow` runs for 5.1 s, 1 message waits",
            True,
        ),
        (Pulse(answered=False), "its process does not answer a ping within 0.5 s", True),
    ],
)
def test_a_pulse_says_what_it_means(pulse: Pulse, text: str, is_problem: bool) -> None:
    assert (pulse.describe(), pulse.is_problem) == (text, is_problem)


async def test_a_handler_that_holds_its_process_is_seen_and_so_is_what_waits_for_it(desk: Desk) -> None:
    _, worker = await desk.ready("Probe")
    assert worker.attachment is not None
    blocked = worker.ask("block_loop")
    await worker.until_handling("block_loop")
    waiting = [worker.ask("echo") for _ in range(3)]
    pulse = (await feel({"probe": worker.attachment}, SYSTEM_CLOCK))["probe"]
    assert (pulse.answered, pulse.handling, pulse.queued) == (True, "block_loop", 3)
    assert pulse.seconds > 0
    desk.gate.let_one_pass()
    for answer in (blocked, *waiting):
        await answer
    assert await feel({"probe": worker.attachment}, SYSTEM_CLOCK) == {"probe": Pulse()}


@pytest.mark.slow
async def test_a_process_that_stands_still_has_no_pulse_and_one_that_is_gone_is_not_asked(desk: Desk) -> None:
    process, worker = await desk.ready("Probe")
    assert worker.attachment is not None
    attached = {"probe": worker.attachment}
    process.kill(signal.SIGSTOP)
    assert await feel(attached, SYSTEM_CLOCK) == {"probe": Pulse(answered=False)}
    process.kill()
    await worker.until(lambda w: w.closed)
    assert await feel(attached, SYSTEM_CLOCK) == {}
