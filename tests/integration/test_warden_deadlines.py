"""No worker outlives the hard deadline of its lease, whoever is asleep."""

from __future__ import annotations

import os
import signal
import struct
import time

import pytest

from node_agent.warden import kernel, lifeline, protocol
from tests.support.warden import Agent, Herd, death, running, shell, start, token, until

pytestmark = pytest.mark.slow

SLACK = 0.25
"""Seconds after the moment by which a process must be dead; for a busy machine."""


async def named(agent: Agent, child: str, lease: int, **more: object) -> tuple[protocol.Start, int]:
    """Start a named worker that does nothing; return what was asked, and its pid."""
    wanted = start(child, "sleep", token(), name=child, lease=lease, epoch=1, **more)
    return wanted, (await agent.started(wanted)).pid


async def test_the_workers_of_a_passed_lease_are_killed_and_no_others(herd: Herd) -> None:
    agent = await herd.agent()
    deadline = kernel.boottime() + 0.5
    agent.link.raise_deadline(5, deadline)
    agent.link.raise_deadline(6, deadline + 60)
    doomed, pid = await named(agent, "doomed", 5)
    _, safe = await named(agent, "safe", 6)
    local = (await agent.started(start("local", "sleep", token()))).pid
    died = await death(pid)
    assert deadline <= died <= deadline + SLACK
    exited = await agent.next()
    assert isinstance(exited, protocol.Exited)
    assert (exited.worker, exited.signal, exited.reason) == (doomed.worker, signal.SIGKILL, "deadline")
    assert isinstance(await agent.next(), protocol.Gone)
    assert {safe, local} <= set(kernel.processes())


async def test_a_passed_lease_takes_what_its_workers_left_behind_too(herd: Herd) -> None:
    agent = await herd.agent()
    agent.link.raise_deadline(5, kernel.boottime() + 0.7)
    left = token()
    await agent.started(
        shell("job", f"setsid sh -c 'sleep {left} &'; exec sleep 1000", name="job", lease=5, epoch=1)
    )
    await until(lambda: bool(running(left)))
    assert isinstance(await agent.next(), protocol.Exited)
    assert isinstance(await agent.next(), protocol.Gone)
    assert running(left) == []


async def test_a_raised_deadline_keeps_its_workers_and_a_lower_one_changes_nothing(full: Herd) -> None:
    agent = await full.agent()
    first = kernel.boottime() + 0.4
    agent.link.raise_deadline(5, first)
    _, pid = await named(agent, "job", 5)
    agent.link.raise_deadline(5, first + 0.4)
    agent.link.raise_deadline(5, first + 0.1)
    assert await death(pid) >= first + 0.4


async def test_a_passed_lease_is_never_raised_again(full: Herd) -> None:
    agent = await full.agent()
    agent.link.raise_deadline(5, kernel.boottime() + 0.3)
    await named(agent, "job", 5)
    await agent.next()
    await agent.next()
    agent.link.raise_deadline(5, kernel.boottime() + 60)
    answer = await agent.answer(shell("job", "exit 0", name="job", lease=5, epoch=1, start=2))
    assert isinstance(answer, protocol.StartFailed)
    assert (answer.why, answer.refused) == ("lease 5 is unknown or over", True)


async def test_no_worker_starts_under_an_unknown_lease_or_a_name_without_one(full: Herd) -> None:
    agent = await full.agent()
    unknown = await agent.answer(shell("job", "exit 0", name="job", lease=5, epoch=1))
    without = await agent.answer(shell("job", "exit 0", name="job", epoch=1))
    assert isinstance(unknown, protocol.StartFailed)
    assert isinstance(without, protocol.StartFailed)
    assert unknown.why == "lease 5 is unknown or over"
    assert without.why == "job has a global name, so it needs a lease"


async def test_a_forgotten_lease_ends_at_once_and_for_ever(full: Herd) -> None:
    agent = await full.agent()
    agent.link.raise_deadline(5, kernel.boottime() + 60)
    _, pid = await named(agent, "job", 5)
    agent.link.forget_lease(5)
    await death(pid, within=2)
    agent.link.raise_deadline(5, kernel.boottime() + 60)
    assert isinstance(
        await agent.answer(shell("other", "exit 0", name="other", lease=5)), protocol.StartFailed
    )


async def test_workers_of_a_lease_die_in_time_without_an_agent(herd: Herd) -> None:
    agent = await herd.agent()
    deadline = kernel.boottime() + 1.0
    agent.link.raise_deadline(5, deadline)
    _, pid = await named(agent, "job", 5)
    os.kill(agent.pid, signal.SIGSTOP)
    assert deadline <= await death(pid) <= deadline + SLACK


@pytest.mark.root
async def test_the_launchers_timer_kills_all_when_agent_and_warden_are_stopped(full: Herd) -> None:
    agent = await full.agent()
    deadline = kernel.boottime() + 0.8
    agent.link.raise_deadline(5, deadline)
    daemon = token()
    await agent.started(
        shell("job", f"setsid sh -c 'sleep {daemon} &'; exec sleep 1000", name="job", lease=5, epoch=1)
    )
    await until(lambda: bool(running(daemon)))
    below = full.processes()
    for pid in (agent.pid, agent.link.welcome.warden_pid, *running(daemon)):
        os.kill(pid, signal.SIGSTOP)
    last = max([await death(pid) for pid in below])
    assert deadline + lifeline.GRACE <= last <= deadline + lifeline.GRACE + SLACK
    assert await full.exit_code() == -signal.SIGKILL


async def test_the_launchers_timer_works_while_the_launcher_is_stopped_too(herd: Herd) -> None:
    agent = await herd.agent()
    deadline = kernel.boottime() + 0.8
    agent.link.raise_deadline(5, deadline)
    _, pid = await named(agent, "job", 5)
    for stopped in (agent.pid, pid, agent.link.welcome.warden_pid, herd.pid):
        os.kill(stopped, signal.SIGSTOP)
    died = await death(pid)
    assert deadline + lifeline.GRACE <= died <= deadline + lifeline.GRACE + SLACK


async def test_raising_goes_on_through_the_timer(full: Herd) -> None:
    agent = await full.agent()
    begin = kernel.boottime()
    agent.link.raise_deadline(5, begin + 0.4)
    _, pid = await named(agent, "job", 5)
    for step in range(1, 8):
        agent.link.raise_deadline(5, begin + 0.4 + step / 5)
        await until(lambda step=step: kernel.boottime() > begin + step / 5)  # type: ignore[misc]
    assert pid in kernel.processes()
    assert full.process is not None
    assert full.process.poll() is None


async def test_a_lease_without_workers_passes_without_hurting_anybody(full: Herd) -> None:
    agent = await full.agent()
    deadline = kernel.boottime() + 0.3
    agent.link.raise_deadline(5, deadline)
    local = (await agent.started(start("local", "sleep", token()))).pid
    os.kill(agent.link.welcome.warden_pid, signal.SIGSTOP)
    await until(lambda: kernel.boottime() > deadline + lifeline.GRACE + SLACK)
    os.kill(agent.link.welcome.warden_pid, signal.SIGCONT)
    assert isinstance(await agent.answer(shell("job", "exit 0")), protocol.Started)
    assert local in kernel.processes()


async def test_a_start_is_refused_when_the_launcher_cannot_set_its_timer(full: Herd) -> None:
    agent = await full.agent()
    agent.link.raise_deadline(5, kernel.boottime() + 60)
    os.kill(full.pid, signal.SIGSTOP)
    answer = await agent.answer(shell("job", "exit 0", name="job", lease=5, epoch=1))
    assert isinstance(answer, protocol.StartFailed)
    assert "does not confirm" in answer.why
    os.kill(full.pid, signal.SIGCONT)
    assert isinstance(
        await agent.answer(shell("job", "exit 0", name="job", lease=5, epoch=1)), protocol.Started
    )


async def test_a_raise_that_waited_behind_a_stopped_warden_comes_too_late(full: Herd) -> None:
    agent = await full.agent()
    deadline = kernel.boottime() + 0.5
    agent.link.raise_deadline(5, deadline)
    _, pid = await named(agent, "job", 5)
    os.kill(agent.link.welcome.warden_pid, signal.SIGSTOP)
    agent.link.raise_deadline(5, deadline + 60)
    await until(lambda: kernel.boottime() > deadline)
    os.kill(agent.link.welcome.warden_pid, signal.SIGCONT)
    assert await death(pid) <= deadline + lifeline.GRACE + SLACK


def test_the_timer_fires_in_a_stopped_process_and_can_be_moved_and_disarmed() -> None:
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        timer = kernel.SuicideTimer()
        timer.arm(kernel.boottime() + 0.01)
        timer.arm(None)
        time.sleep(0.05)
        deadline = kernel.boottime() + 0.1
        timer.arm(deadline)
        os.write(writable, struct.pack("d", deadline))
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(1)
    (deadline,) = struct.unpack("d", os.read(readable, 8))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert deadline <= kernel.boottime() <= deadline + SLACK
    os.close(readable)
    os.close(writable)
