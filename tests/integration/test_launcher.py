"""The launcher keeps one warden, ends with it, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

import pytest

from node_agent import launcher
from node_agent.warden import kernel, protocol
from tests.support.warden import Herd, death, running, shell, start, token, until

pytestmark = pytest.mark.slow


@pytest.mark.root
@pytest.mark.parametrize("victim", ["launcher", "warden"])
async def test_in_a_namespace_every_descendant_dies_with_launcher_or_warden(full: Herd, victim: str) -> None:
    agent = await full.agent()
    double_forked, hidden = token(), token()
    await agent.started(shell("job", f"setsid sh -c 'sleep {double_forked} &'; sleep {token()}"))
    await agent.started(shell("other", f"setsid env -i sh -c 'sleep {hidden} &'; sleep {token()}"))
    await until(lambda: bool(running(double_forked) and running(hidden)))
    everything = [*full.processes(), *running(hidden)]
    os.kill(full.pid if victim == "launcher" else agent.link.welcome.warden_pid, signal.SIGKILL)
    for pid in everything:
        await death(pid, within=5)


async def test_the_launchers_death_ends_warden_agent_and_workers(herd: Herd) -> None:
    agent = await herd.agent()
    worker = (await agent.started(start("job", "sleep", token()))).pid
    os.kill(herd.pid, signal.SIGKILL)
    for pid in (agent.link.welcome.warden_pid, agent.pid, worker):
        await death(pid, within=5)


async def test_a_dead_warden_is_replaced_by_one_that_knows_nothing(herd: Herd) -> None:
    first = await herd.agent()
    first.link.raise_deadline(5, kernel.boottime() + 60)
    first.link.remember("key", 1)
    await first.started(start("job", "sleep", token(), name="job", lease=5, epoch=1))
    os.kill(first.link.welcome.warden_pid, signal.SIGKILL)
    second = await herd.agent()
    before, after = first.link.welcome, second.link.welcome
    assert after.warden != before.warden
    assert (after.generation, after.launcher_pid) == (1, before.launcher_pid)
    assert (after.workers, dict(after.leases), dict(after.remembered)) == ((), {}, {})


async def test_a_new_warden_starts_only_after_everything_of_the_former_is_dead(partial: Herd) -> None:
    agent = await partial.agent()
    double_forked, hidden = token(), token()
    await agent.started(shell("job", f"setsid sh -c 'sleep {double_forked} &'; sleep {token()}"))
    await agent.started(shell("other", f"setsid env -i sh -c 'sleep {hidden} &'; sleep {token()}"))
    await until(lambda: bool(running(double_forked) and running(hidden)))
    os.kill(agent.link.welcome.warden_pid, signal.SIGKILL)
    await partial.agent()
    assert running(double_forked) == running(hidden) == []


async def test_a_new_launcher_kills_what_survived_the_former(partial: Herd) -> None:
    agent = await partial.agent()
    survivor = token()
    await agent.started(shell("job", f"setsid sh -c 'sleep {survivor} &'; sleep {token()}"))
    await until(lambda: bool(running(survivor)))
    pid = max(running(survivor), key=kernel.start_ticks)
    os.kill(partial.pid, signal.SIGKILL)
    await partial.exit_code()
    assert pid in kernel.processes()
    partial.launch()
    await partial.agent()
    assert running(survivor) == []


async def test_a_second_launcher_of_the_same_configuration_refuses_and_harms_nobody(herd: Herd) -> None:
    agent = await herd.agent()
    worker = (await agent.started(start("job", "sleep", token()))).pid
    second = herd.launch()
    await until(lambda: second.poll() is not None)
    assert second.returncode == 1
    assert {worker, agent.pid} <= set(kernel.processes())


async def test_shutdown_kills_what_is_left_and_gives_the_exit_code(herd: Herd) -> None:
    agent = await herd.agent()
    worker = (await agent.started(shell("job", "trap '' TERM INT QUIT; sleep 1000"))).pid
    await agent.link.shutdown(3)
    assert await herd.exit_code() == 3
    await death(worker, within=1)
    assert herd.processes() == []


@pytest.mark.parametrize(("signum", "mode"), [(signal.SIGTERM, "smart"), (signal.SIGINT, "fast")])
async def test_a_stop_is_passed_on_to_the_agent_which_ends_it(herd: Herd, signum: int, mode: str) -> None:
    agent = await herd.agent()
    herd.send(signum)
    async with asyncio.timeout(5):
        assert await anext(agent.link.orders()) == protocol.Stop(mode=mode)  # type: ignore[arg-type]
    await agent.link.shutdown()
    assert await herd.exit_code() == 0


async def test_a_stop_the_agent_does_not_finish_in_time_ends_everything(full: Herd) -> None:
    agent = await full.agent(stop_within=0.5)
    worker = (await agent.started(start("job", "sleep", token()))).pid
    asked = kernel.boottime()
    full.send(signal.SIGTERM)
    assert 0.4 <= await death(worker) - asked <= 3.0
    assert await full.exit_code() == 0


async def test_an_agent_that_dies_while_stopping_is_not_replaced(full: Herd) -> None:
    agent = await full.agent()
    full.send(signal.SIGTERM)
    await anext(agent.link.orders())
    os.kill(agent.pid, signal.SIGKILL)
    assert await full.exit_code(within=5) == 0


async def test_a_stop_during_the_start_reaches_the_agent_when_it_comes(full: Herd) -> None:
    await until(lambda: bool(full.processes()))
    full.send(signal.SIGTERM)
    agent = await full.agent()
    async with asyncio.timeout(5):
        assert await anext(agent.link.orders()) == protocol.Stop(mode="smart")
    await agent.link.shutdown()
    assert await full.exit_code() == 0


async def test_sigquit_ends_everything_at_once(herd: Herd) -> None:
    agent = await herd.agent()
    worker = (await agent.started(shell("job", "trap '' TERM INT QUIT; sleep 1000"))).pid
    asked = kernel.boottime()
    herd.send(signal.SIGQUIT)
    assert await death(worker) - asked <= 2.0
    assert await herd.exit_code() == 0
    assert herd.processes() == []


async def test_sighup_is_passed_on_as_reload(full: Herd) -> None:
    agent = await full.agent()
    full.send(signal.SIGHUP)
    async with asyncio.timeout(5):
        assert await anext(agent.link.orders()) == protocol.Reload()


async def test_containment_is_published(herd: Herd, request: pytest.FixtureRequest) -> None:
    agent = await herd.agent()
    assert agent.link.welcome.containment == request.node.callspec.params["herd"]


async def test_a_launcher_that_may_not_make_a_namespace_is_partial(tmp_path: Path) -> None:
    async with Herd(tmp_path, wrapper=["setpriv", "--bounding-set=-sys_admin", "--"]) as herd:
        assert (await herd.agent()).link.welcome.containment == "partial"


async def test_no_privilege_is_needed_but_for_other_users_and_a_namespace(tmp_path: Path) -> None:
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"]
    async with Herd(tmp_path, wrapper=drop if os.geteuid() == 0 else ()) as herd:
        agent = await herd.agent()
        deadline = kernel.boottime() + 0.5
        agent.link.raise_deadline(5, deadline)
        left = token()
        job = shell(
            "job", f"setsid sh -c 'sleep {left} &'; exec sleep {token()}", name="job", lease=5, epoch=1
        )
        pid = (await agent.started(job)).pid
        await until(lambda: bool(running(left)))
        assert await death(pid) >= deadline
        assert isinstance(await agent.next(), protocol.Exited)
        assert isinstance(await agent.next(), protocol.Gone)
        assert running(left) == []
        await agent.link.shutdown()
        assert await herd.exit_code() == 0


@pytest.mark.root
async def test_another_user_is_refused_without_the_capabilities_for_it(tmp_path: Path) -> None:
    async with Herd(tmp_path, wrapper=["setpriv", "--bounding-set=-setuid", "--"]) as herd:
        agent = await herd.agent()
        answer = await agent.answer(shell("job", "id", user="nobody"))
        assert isinstance(answer, protocol.StartFailed)
        assert "needs CAP_SETUID" in answer.why
        assert isinstance(await agent.answer(shell("job", "id", user="root")), protocol.Started)


@pytest.mark.root
async def test_the_first_process_of_a_container_has_full_containment_without_privileges(
    tmp_path: Path,
) -> None:
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    assert shutil.which("unshare")
    async with Herd(tmp_path, wrapper=[*unshare, "setpriv", "--bounding-set=-sys_admin", "--"]) as herd:
        agent = await herd.agent()
        assert agent.link.welcome.containment == "full"
        double_forked = token()
        await agent.started(shell("job", f"setsid sh -c 'sleep {double_forked} &'; sleep {token()}"))
        await until(lambda: bool(running(double_forked)))
        os.kill(agent.pid, signal.SIGKILL)
        agent = await herd.agent()
        (init,) = kernel.children(herd.pid)
        (first,) = kernel.children(init)
        (warden,) = kernel.children(first)
        os.kill(warden, signal.SIGKILL)
        agent = await herd.agent()
        assert running(double_forked) == []
        await agent.link.shutdown(5)
        assert await herd.exit_code() == 5


def test_wrong_usage_is_exit_code_two(capfd: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["-x"]) == 2
    assert "usage:" in capfd.readouterr().err
