"""What a warden does with the processes an agent asks for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
from pathlib import Path

import pytest

from node_agent.warden import kernel, protocol
from node_agent.warden.output import KEPT
from tests.support.warden import Herd, death, running, shell, start, token, until

pytestmark = pytest.mark.slow


async def test_a_command_is_started_exits_and_is_gone(herd: Herd) -> None:
    agent = await herd.agent()
    wanted = shell("job", "exit 3")
    started = await agent.started(wanted)
    exited = await agent.next()
    assert exited == protocol.Exited(
        worker=wanted.worker, child="job", name="", epoch=0, start=1, pid=started.pid, code=3, signal=None,
        reason="own",
    )  # fmt: skip
    assert await agent.next() == protocol.Gone(worker=wanted.worker, child="job")


async def test_pids_are_those_of_the_host(herd: Herd) -> None:
    agent = await herd.agent()
    marker = token()
    started = await agent.started(start("job", "sleep", marker))
    assert running(marker) == [started.pid]
    assert agent.link.welcome.agent_pid == agent.pid
    assert agent.link.welcome.launcher_pid == herd.pid
    assert kernel.children(herd.pid) == [agent.link.welcome.warden_pid]


async def test_death_by_a_signal_is_told_apart_from_an_exit_code(herd: Herd) -> None:
    agent = await herd.agent()
    wanted = start("job", "sleep", token())
    await agent.started(wanted)
    agent.link.signal(wanted.worker, signal.SIGTERM)
    exited = await agent.next()
    assert isinstance(exited, protocol.Exited)
    assert (exited.code, exited.signal, exited.reason) == (None, signal.SIGTERM, "own")


async def test_a_signal_to_the_group_reaches_what_the_command_has_started(herd: Herd) -> None:
    agent = await herd.agent()
    wanted = shell(
        "job",
        "trap 'echo parent; wait' USR1; (trap 'echo child; exit' USR1; echo up; sleep 100 & wait); wait",
    )
    await agent.started(wanted)
    await agent.output("job", "up")
    agent.link.signal(wanted.worker, signal.SIGUSR1, group=True)
    assert "child" in await agent.output("job", "child")
    assert "parent" in await agent.output("job", "parent")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("no-such-command",), "command not found: no-such-command (searched in "),
        (("/no/such/command",), "command not found: /no/such/command"),
        (("/etc/passwd",), "permission denied: /etc/passwd cannot be executed by "),
    ],
)
async def test_a_command_that_cannot_be_executed_is_explained_and_leaves_nothing(
    full: Herd, command: tuple[str, ...], why: str
) -> None:
    agent = await full.agent()
    answer = await agent.answer(start("job", *command))
    assert isinstance(answer, protocol.StartFailed)
    assert answer.why.startswith(why)
    assert (answer.refused, answer.counted) == (False, 0)
    assert sorted(full.processes()) == sorted([agent.link.welcome.warden_pid, agent.pid])
    await agent.started(shell("job", "exit 0", start=1))


async def test_a_script_without_its_interpreter_is_explained(full: Herd, tmp_path: Path) -> None:
    script = tmp_path / "job"
    script.write_text("#!/no/such/shell\n")
    script.chmod(0o755)
    agent = await full.agent()
    answer = await agent.answer(start("job", str(script)))
    assert isinstance(answer, protocol.StartFailed)
    assert "interpreter its first line names does not exist" in answer.why


async def test_a_missing_directory_and_an_unknown_user_are_explained(full: Herd) -> None:
    agent = await full.agent()
    no_directory = await agent.answer(shell("job", "pwd", cwd="/no/such/directory"))
    no_user = await agent.answer(shell("job", "id", user="nobody-of-that-name"))
    assert isinstance(no_directory, protocol.StartFailed)
    assert isinstance(no_user, protocol.StartFailed)
    assert no_directory.why == "working directory '/no/such/directory': No such file or directory"
    assert no_user.why == "user 'nobody-of-that-name' does not exist on this host"


@pytest.mark.root
async def test_another_user_gets_its_own_home_and_no_privileges(full: Herd) -> None:
    agent = await full.agent()
    await agent.started(
        shell("job", 'id -un; id -Gn; echo "$HOME"; grep CapEff /proc/self/status', user="nobody")
    )
    nobody = pwd.getpwnam("nobody")
    user, groups, home, capabilities = (await agent.output("job", "CapEff")).splitlines()
    assert (user, home, capabilities.split()[1]) == ("nobody", nobody.pw_dir, "0" * 16)
    assert groups == "nogroup"


@pytest.mark.root
async def test_a_worker_of_another_user_dies_with_its_warden_too(partial: Herd) -> None:
    agent = await partial.agent()
    started = await agent.started(start("job", "sleep", token(), user="nobody"))
    os.kill(agent.link.welcome.warden_pid, signal.SIGKILL)
    await death(started.pid)


async def test_the_environment_is_only_what_was_given(full: Herd) -> None:
    agent = await full.agent()
    wanted = shell("job", "env; ls -l /proc/self/fd; cat /proc/self/oom_score_adj", env={"GIVEN": "yes"})
    await agent.started(wanted)
    await agent.next()
    lines = (await agent.output("job", "GIVEN")).splitlines()
    names = {line.partition("=")[0] for line in lines if "=" in line}
    assert names <= {
        "PATH",
        "HOME",
        "LANG",
        "TZ",
        "GIVEN",
        "PGHERD_WORKER",
        "PGHERD_WARDEN",
        "PWD",
        "OLDPWD",
        "SHLVL",
        "_",
    }
    assert f"PGHERD_WORKER={wanted.worker}" in lines
    assert {line.split()[8] for line in lines if " -> " in line} == {"0", "1", "2", "3"}
    assert lines[-1] == "0"


async def test_a_worker_leads_a_session_of_its_own_with_default_signals(full: Herd) -> None:
    agent = await full.agent()
    await agent.started(shell("job", "ps -o pid=,pgid=,sid= -p $$; grep -E 'Sig(Blk|Ign)' /proc/self/status"))
    await agent.next()
    first, *masks = (await agent.output("job", "SigIgn")).splitlines()
    assert len(set(first.split())) == 1
    assert {mask.split()[1] for mask in masks} == {"0" * 16}


async def test_starts_are_counted_and_others_refused(full: Herd) -> None:
    agent = await full.agent()
    agent.link.raise_deadline(5, kernel.boottime() + 60)

    async def run(epoch: int, number: int) -> protocol.Started | protocol.StartFailed:
        answer = await agent.answer(shell("job", "exit 0", name="job", lease=5, epoch=epoch, start=number))
        if isinstance(answer, protocol.Started):
            await agent.next()
            await agent.next()
        return answer

    assert isinstance(await run(3, 1), protocol.Started)
    repeated, skipped = await run(3, 1), await run(3, 3)
    assert isinstance(await run(3, 2), protocol.Started)
    assert isinstance(await run(4, 1), protocol.Started)
    older = await run(3, 3)
    for refused, words in (
        (repeated, "start 1 of epoch 3 instead of 2"),
        (skipped, "instead of 2"),
        (older, "is over"),
    ):
        assert isinstance(refused, protocol.StartFailed)
        assert refused.refused
        assert words in refused.why


async def test_a_child_that_still_runs_is_not_started_again(full: Herd) -> None:
    agent = await full.agent()
    await agent.started(start("job", "sleep", token()))
    answer = await agent.answer(start("job", "sleep", token(), start=2))
    assert isinstance(answer, protocol.StartFailed)
    assert "job still runs as pid" in answer.why


async def test_a_worker_is_gone_only_after_its_grandchildren(herd: Herd) -> None:
    agent = await herd.agent()
    same_session, own_session = token(), token()
    wanted = shell(
        "job",
        f"sleep {same_session} & setsid sh -c 'sleep {own_session} & sleep {own_session}' & echo up; wait",
    )
    await agent.started(wanted)
    await until(lambda: len(running(own_session)) >= 2 and bool(running(same_session)))
    left = [*running(own_session), *running(same_session)]
    agent.link.signal(wanted.worker, signal.SIGKILL)
    assert isinstance(await agent.next(), protocol.Exited)
    assert isinstance(await agent.next(), protocol.Gone)
    assert set(left) & set(kernel.processes()) == set()


@pytest.mark.parametrize(
    "script",
    [
        pytest.param('setsid sh "$0" "$1" & exit', id="hops from process to process"),
        pytest.param('while :; do setsid sh -c "sleep $1 &"; done', id="leaves one daemon after another"),
        pytest.param('sleep "$1" & setsid sh "$0" "$1" & wait', id="goes ever deeper"),
    ],
)
async def test_nothing_is_left_of_a_worker_that_runs_away(herd: Herd, tmp_path: Path, script: str) -> None:
    agent = await herd.agent()
    marker, path = token(), tmp_path / "run-away"
    path.write_text(f"ulimit -u 500; {script}\n")
    wanted = shell("job", f"sh {path} {marker} & exec sleep {marker}")
    await agent.started(wanted)
    await until(lambda: len(running(marker)) >= 2)
    agent.link.kill(wanted.worker)
    assert isinstance(await agent.next(), protocol.Exited)
    assert isinstance(await agent.next(), protocol.Gone)
    assert running(marker) == []


async def test_kill_reaches_descendants_that_wiped_their_environment(herd: Herd) -> None:
    agent = await herd.agent()
    hidden = token()
    wanted = shell("job", f"setsid env -i sleep {hidden} & wait")
    await agent.started(wanted)
    await until(lambda: bool(running(hidden)))
    agent.link.kill(wanted.worker)
    exited = await agent.next()
    assert isinstance(exited, protocol.Exited)
    assert exited.reason == "killed"
    await until(lambda: not running(hidden))


async def test_a_daemon_that_one_worker_left_behind_survives_the_end_of_another(herd: Herd) -> None:
    agent = await herd.agent()
    daemon = token()
    await agent.started(shell("keeper", f"setsid sh -c 'sleep {daemon} &'; echo up; exec sleep {token()}"))
    await agent.output("keeper", "up")
    await until(lambda: bool(running(daemon)))
    (pid,) = running(daemon)
    await agent.started(shell("other", "exit 0"))
    assert isinstance(await agent.next(), protocol.Exited)
    assert isinstance(await agent.next(), protocol.Gone)
    assert running(daemon) == [pid]


async def test_output_of_all_processes_of_a_child_is_kept(full: Herd) -> None:
    agent = await full.agent()
    for number in (1, 2):
        await agent.started(shell("job", f"echo out {number}; echo err {number} >&2", start=number))
        await agent.next()
        await agent.next()
    tail = await agent.link.output("job", KEPT)
    assert (tail.data, tail.dropped) == (b"out 1\nerr 1\nout 2\nerr 2\n", 0)
    assert (await agent.link.output("job", 6)).data == b"err 2\n"
    assert (await agent.link.output("job", 6)).dropped == len(tail.data) - 6
    assert (await agent.link.output("unknown", 6)).data == b""


async def test_a_flood_is_cut_to_its_last_mebibyte_and_the_rest_counted(full: Herd) -> None:
    agent = await full.agent()
    await agent.started(shell("job", "head -c 5000000 /dev/zero; echo the end"))
    assert isinstance(await agent.next(), protocol.Exited)
    assert isinstance(await agent.next(), protocol.Gone)
    tail = await agent.link.output("job", 2 * KEPT)
    assert len(tail.data) == KEPT
    assert tail.data.endswith(b"\0the end\n")
    assert tail.dropped == 5_000_000 + len("the end\n") - KEPT


async def test_an_endless_flood_delays_nothing_else(full: Herd) -> None:
    agent = await full.agent()
    flood = start("flood", "yes")
    await agent.started(flood)
    before = kernel.boottime()
    await agent.started(shell("job", "exit 0"))
    await agent.next()
    await agent.next()
    assert kernel.boottime() - before < 2.0
    agent.link.kill(flood.worker)
    await agent.next()
    await agent.next()


async def test_output_is_followed_as_it_comes(full: Herd) -> None:
    agent = await full.agent()
    wanted = shell(
        "job", 'while read line < "$FIFO"; do echo got $line; done', env={"FIFO": full.config + ".fifo"}
    )
    os.mkfifo(full.config + ".fifo")
    followed = agent.link.follow("job")
    first = asyncio.ensure_future(anext(followed))
    await agent.started(wanted)
    await asyncio.to_thread(Path(full.config + ".fifo").write_text, "news\n")
    async with asyncio.timeout(10):
        assert (await first).data == b"got news\n"
    await followed.aclose()  # type: ignore[attr-defined]


async def test_a_behaviour_is_forked_with_its_arguments_and_marker(herd: Herd) -> None:
    agent = await herd.agent()
    wanted = protocol.Start(worker="ab" * 16, child="job", behaviour="m:Class", args={"answer": 42})
    await agent.started(wanted)
    exited = await agent.next()
    assert isinstance(exited, protocol.Exited)
    assert exited.code == 0
    assert await agent.output("job", "m:Class") == f"m:Class ['answer'] {'ab' * 16}\n"


async def test_a_behaviour_that_crashes_leaves_its_traceback_in_its_output(full: Herd) -> None:
    agent = await full.agent()
    await agent.started(protocol.Start(worker="ab" * 16, child="job", behaviour="m:C", args={"crash": True}))
    exited = await agent.next()
    assert isinstance(exited, protocol.Exited)
    assert exited.code == 1
    assert "RuntimeError: as asked" in await agent.output("job", "RuntimeError")


@pytest.mark.parametrize("kind", ["leave_child", "leave_fork"])
async def test_what_a_behaviour_leaves_behind_is_found_by_its_marker(herd: Herd, kind: str) -> None:
    agent = await herd.agent()
    left = token()
    await agent.started(
        protocol.Start(worker="ab" * 16, child="job", behaviour="m:C", args={kind: left, "stay": True})
    )
    await until(lambda: bool(running(left)))
    agent.link.signal("ab" * 16, signal.SIGKILL)
    assert isinstance(await agent.next(), protocol.Exited)
    assert isinstance(await agent.next(), protocol.Gone)
    assert running(left) == []


async def test_two_hundred_workers_start_and_stop(full: Herd) -> None:
    agent = await full.agent()
    descriptors = f"/proc/{agent.link.welcome.warden_pid}/fd"
    before = len(os.listdir(descriptors))
    starts = [start(f"job{number}", "sleep", token()) for number in range(200)]
    answers = await asyncio.gather(*(agent.answer(each) for each in starts))
    assert {type(answer) for answer in answers} == {protocol.Started}
    for each in starts:
        agent.link.signal(each.worker, signal.SIGTERM)
    ended = [await agent.next() for _ in range(400)]
    gone = {each.worker for each in ended if isinstance(each, protocol.Gone)}
    assert gone == {each.worker for each in starts}
    assert len(os.listdir(descriptors)) == before


async def test_a_start_that_is_not_awaited_any_more_is_killed(full: Herd) -> None:
    agent = await full.agent()
    marker = token()
    waiting = asyncio.ensure_future(agent.link.start(start("job", "sleep", marker)))
    await asyncio.sleep(0)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert isinstance(await agent.next(), protocol.Exited)
    assert isinstance(await agent.next(), protocol.Gone)
    assert running(marker) == []


async def test_a_start_that_fits_no_packet_is_refused(full: Herd) -> None:
    agent = await full.agent()
    answer = await agent.answer(shell("job", "#" * protocol.MAX_PACKET))
    assert isinstance(answer, protocol.StartFailed)
    assert "fit into a packet" in answer.why
