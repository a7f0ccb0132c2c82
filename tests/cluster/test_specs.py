"""Specs come, change and go, and children that do not work are tried elsewhere."""

from __future__ import annotations

import pytest

from registry.errors import NoOwner, NoSuchName
from tests.cluster.herd import FAILOVER, RESTART, Herd

pytestmark = pytest.mark.slow


async def test_stop_and_start_are_wishes_that_stay(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name), names=[name])
    await herd.wish("Stop", name)
    await herd.ended(first, RESTART)
    with pytest.raises(NoOwner, match="stopped"):
        await (await herd.client()).call(name, "add", {"op": "x"})
    host = herd.owner(first)
    await host.kill()
    await herd.ready()
    assert not herd.observer.alive(name)
    (other, *_) = herd.others(host)
    await herd.wish("Start", name, via=other)
    # What is left of the killed host may have claimed it in its last moment.
    await herd.answers(name, within=FAILOVER, above=first.token, via=other)


async def test_a_deleted_spec_leaves_nothing(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name), names=[name])
    await herd.wish("Delete", name)
    await herd.ended(first, RESTART)
    await herd.unowned(name)
    with pytest.raises(NoSuchName):
        await (await herd.client()).call(name, "add", {"op": "x"})


async def test_a_changed_spec_restarts_the_process_under_the_same_epoch(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name), names=[name])
    async with herd.traffic([name]):
        await herd.apply(herd.ledger(name, env={"SOMETHING": "else"}))
        second = await herd.answers(name, within=RESTART, above=first.token)
    assert (second.host, second.token.epoch) == (first.host, first.token.epoch)


async def test_what_is_wished_last_counts_however_slow_the_stop_is(herd: Herd) -> None:
    stop = [{"signal": "SIGTERM", "wait": "600ms"}]
    deleted, stopped, changed = (herd.name(word) for word in ("deleted", "stopped", "changed"))
    lives = await herd.up(
        *(herd.command(name, "--deaf", stop=stop) for name in (deleted, stopped, changed)),
        names=[deleted, stopped, changed],
    )
    for name in (deleted, stopped, changed):
        await herd.apply(herd.command(name, "--deaf", stop=stop, env={"ROUND": "2"}))
    await herd.wish("Delete", deleted)
    await herd.wish("Stop", stopped)
    await herd.apply(herd.command(changed, "--deaf", "--orphan", stop=stop))
    for life in lives:
        await herd.ended(life, RESTART)
    await herd.runs(changed, above=lives[2].token)
    await herd.runs(f"{changed}.orphan")
    await herd.unowned(deleted, stopped)
    assert not herd.observer.alive(deleted)
    assert not herd.observer.alive(stopped)


async def test_specs_that_come_and_go_faster_than_claims_hurt_nobody(herd: Herd) -> None:
    bystander, fickle = herd.name("bystander"), herd.name("fickle")
    (first,) = await herd.up(herd.ledger(bystander), names=[bystander])
    pids = {name: await herd.pids(host) for name, host in herd.hosts.items()}
    for number in range(30):
        await herd.apply(herd.ledger(fickle, env={"ROUND": str(number)}))
        await herd.wish("Stop" if number % 3 == 0 else "Delete", fickle)
        if number % 3 == 0:
            await herd.wish("Delete", fickle)
    await herd.apply(herd.ledger(fickle))
    await herd.answers(fickle, within=RESTART)
    await herd.answers(bystander, within=RESTART)
    assert herd.observer.alive(bystander) == (first,)
    assert {name: await herd.pids(host) for name, host in herd.hosts.items()} == pids


async def test_a_worker_that_crashes_again_and_again_is_tried_elsewhere(herd: Herd) -> None:
    name = herd.name("ledger")
    await herd.apply(herd.ledger(name, prefer=["alpha"], args={"broken_on": "alpha"}, intensity=1))
    life = await herd.answers(name, within=FAILOVER, via="beta")
    assert life.host != "alpha"
    # The penalty is kept: it does not go back to the host it prefers when it moves again.
    herd.nemesis.kill(life.pid)
    again = await herd.answers(name, within=RESTART, above=life.token, via="beta")
    assert again.host == life.host
    assert "alpha" in await herd.why(name, via=life.host)


async def test_a_worker_that_works_nowhere_says_so_and_waits(herd: Herd) -> None:
    name = herd.name("ledger")
    broken = {"broken_on": " ".join(herd.hosts)}
    await herd.apply(herd.ledger(name, args=broken, intensity=0))
    for host in herd.hosts:
        await herd.says(name, "was given up on every host", "RuntimeError: broken on", via=host, within=15.0)
    # A fixed one need not wait.
    await herd.apply(herd.ledger(name))
    await herd.answers(name, within=RESTART)


async def test_a_command_that_is_not_there_is_explained(herd: Herd) -> None:
    name = herd.name("nothing")
    spec = f'[[child]]\nid = "{name}"\nname = "{name}"\nrun.command = ["no-such-program"]\nintensity = 1\n'
    await herd.apply(spec)
    await herd.says(name, "command not found: no-such-program", within=20.0)


async def test_a_worker_that_is_never_ready_is_killed_and_tried_elsewhere(herd: Herd) -> None:
    name = herd.name("ledger")
    spec = herd.ledger(
        name,
        prefer=["beta"],
        args={"never_ready_on": "beta"},
        intensity=0,
        ready={"timeout": "500ms"},
    )
    await herd.apply(spec)
    life = await herd.answers(name, within=FAILOVER, via="alpha")
    assert life.host != "beta"
    assert "not ready" in await herd.why(name, via="beta")


async def test_fenced_specs_wait_for_their_database(herd: Herd) -> None:
    name = herd.name("ledger")
    assert herd.cluster.postgres is not None
    await herd.cluster.postgres.stop()
    await herd.apply(herd.ledger(name, fence=True, prefer=["alpha"]))
    await herd.says(name, "fencing", "fence in database app", via="alpha")
    assert not herd.observer.alive(name)
    assert (await herd.call(name, timeout=0.5)).outcome == "refused"
    await herd.cluster.postgres.start()
    await herd.answers(name, within=10.0, method="write")
