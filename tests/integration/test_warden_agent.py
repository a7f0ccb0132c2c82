"""The agent may die, hang or be replaced: the warden keeps everything for the next one."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys

import pytest

from node_agent.warden import kernel, protocol
from tests.support.warden import Herd, death, shell, start, token

pytestmark = pytest.mark.slow


async def test_the_next_agent_gets_everything_and_the_workers_notice_nothing(herd: Herd) -> None:
    first = await herd.agent()
    deadline = kernel.boottime() + 60
    first.link.raise_deadline(5, deadline)
    first.link.remember("window/job", {"times": [1.5]})
    first.link.remember("gone", 1)
    first.link.remember("gone", None)
    wanted = start("job", "sleep", token(), name="job", lease=5, epoch=4)
    started = await first.started(wanted)
    os.kill(first.pid, signal.SIGKILL)
    second = await herd.agent()
    before, after = first.link.welcome, second.link.welcome
    assert (before.generation, after.generation) == (1, 2)
    assert (after.warden, after.warden_pid) == (before.warden, before.warden_pid)
    assert after.remembered == {"window/job": {"times": [1.5]}}
    assert after.leases == {5: deadline}
    assert after.starts == {("job", 4): 1}
    (row,) = after.workers
    assert (row.worker, row.pid, row.state) == (wanted.worker, started.pid, "running")
    second.link.signal(row.worker, signal.SIGTERM)
    assert isinstance(await second.next(), protocol.Exited)
    assert isinstance(await second.next(), protocol.Gone)


async def test_an_end_nobody_saw_is_told_to_the_next_agent(full: Herd) -> None:
    first = await full.agent()
    wanted = start("job", "sleep", token())
    pid = (await first.started(wanted)).pid
    os.kill(first.pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGTERM)
    os.kill(first.pid, signal.SIGKILL)
    second = await full.agent()
    assert [row.worker for row in second.link.welcome.workers] == [wanted.worker]
    exited, gone = await second.next(), await second.next()
    assert isinstance(exited, protocol.Exited)
    assert (exited.worker, exited.signal) == (wanted.worker, signal.SIGTERM)
    assert gone == protocol.Gone(worker=wanted.worker, child="job")


async def test_a_dropped_child_is_not_handed_over(full: Herd) -> None:
    first = await full.agent()
    await first.started(shell("job", "echo done"))
    await first.next()
    await first.next()
    first.link.drop("job")
    assert (await first.link.output("job", 100)).data == b""
    os.kill(first.pid, signal.SIGKILL)
    second = await full.agent()
    assert (second.link.welcome.workers, second.link.welcome.starts) == ((), {})


async def test_an_agent_that_does_not_pet_is_killed_and_replaced(full: Herd) -> None:
    first = await full.agent(hang_limit=0.5)
    worker = (await first.started(start("job", "sleep", token()))).pid
    hung = kernel.boottime()
    assert 0.3 <= await death(first.pid) - hung <= 3.0
    second = await full.agent()
    assert second.link.welcome.generation == 2
    assert worker in kernel.processes()


async def test_an_agent_that_pets_lives(full: Herd) -> None:
    agent = await full.agent(hang_limit=0.4)
    petting = asyncio.ensure_future(agent.link.keep_petting())
    with pytest.raises(TimeoutError):
        await death(agent.pid, within=1.5)
    petting.cancel()


async def test_deadlines_raised_by_another_thread_do_not_count_as_petting(full: Herd) -> None:
    agent = await full.agent(hang_limit=0.5)
    raising = True

    def raise_on() -> None:
        while raising:
            agent.link.raise_deadline(5, kernel.boottime() + 60)
            os.sched_yield()

    thread = asyncio.ensure_future(asyncio.to_thread(raise_on))
    await death(agent.pid)
    raising = False
    await thread


async def test_the_agent_is_not_blamed_for_a_stopped_warden(full: Herd) -> None:
    agent = await full.agent(hang_limit=1.0)
    os.kill(agent.link.welcome.warden_pid, signal.SIGSTOP)
    stopped = kernel.boottime()
    with pytest.raises(TimeoutError):
        await death(agent.pid, within=2.5)
    os.kill(agent.link.welcome.warden_pid, signal.SIGCONT)
    agent.link.pet()
    assert isinstance(await agent.answer(shell("job", "exit 0")), protocol.Started)
    assert kernel.boottime() > stopped + 2.5


async def test_an_older_generation_cannot_speak(full: Herd) -> None:
    first = await full.agent()
    os.kill(first.pid, signal.SIGKILL)
    second = await full.agent()
    async with asyncio.timeout(5):
        await first.lost.wait()
    assert not first.link.raise_deadline(5, kernel.boottime() + 60)
    assert isinstance(await second.answer(shell("job", "x", name="job", lease=5)), protocol.StartFailed)


async def test_an_agent_that_hangs_up_is_replaced(full: Herd) -> None:
    first = await full.agent()
    first.link.close()
    os.kill(first.pid, signal.SIGTERM)
    assert (await full.agent()).link.welcome.generation == 2


async def test_agents_that_die_young_come_back_ever_more_slowly(full: Herd) -> None:
    born = []
    for _ in range(5):
        agent = await full.agent()
        os.kill(agent.pid, signal.SIGKILL)
        born.append(await death(agent.pid))
    gaps = [later - earlier for earlier, later in itertools.pairwise(born)]
    assert gaps[3] >= 0.4
    assert gaps[2] >= 0.2
    assert max(gaps) < 10


async def test_nonsense_from_the_agent_is_ignored(full: Herd) -> None:
    agent = await full.agent()
    for packet in (b"nonsense", b'{"is":"Forget","lease":"x"}', b'{"is":"Later"}'):
        agent.link._socket.send(packet)
    job = start("job", "sleep", token())
    await agent.started(job)
    agent.link.signal(job.worker, 999)
    agent.link.signal(job.worker, 2**70)
    agent.link.signal("no such worker", signal.SIGTERM)
    agent.link.raise_deadline(5, float("inf"))
    agent.link.forget_lease(0)
    answer = await agent.answer(shell("other", "exit 0", env={"KEY": "nul\0"}))
    assert isinstance(answer, protocol.StartFailed)
    assert isinstance(await agent.answer(shell("other", "exit 0")), protocol.Started)


async def test_the_warden_has_one_thread_and_its_image_starts_none(full: Herd) -> None:
    warden = (await full.agent()).link.welcome.warden_pid
    assert os.listdir(f"/proc/{warden}/task") == [str(warden)]
    script = (
        "from node_agent.warden.preload import *; import os;"
        "print(repr(Image().fill(AGENT_ENTRY, WORKER_ENTRY)), len(os.listdir('/proc/self/task')))"
    )
    image = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    printed, _ = await image.communicate()
    assert printed == b"'' 1\n"


async def test_the_link_reports_the_death_of_the_warden(full: Herd) -> None:
    agent = await full.agent()
    os.kill(agent.link.welcome.warden_pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        await agent.lost.wait()
