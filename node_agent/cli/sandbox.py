"""``pgherd sandbox``: the whole system on one machine, to play with and to break."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import click

from node_agent.sandbox.cluster import HOSTS, Sandbox
from node_agent.sandbox.narrator import narrate
from node_agent.sandbox.process import ServerFailed
from registry.cli.invocation import Command

CALLED_AS = "PGHERD_CALLED_AS"
"""What to type for `pgherd`, where that is something else: ./dev in a clone."""
RESTART_AFTER = 15.0
"""Seconds until a host or a member of etcd that was killed is started again."""


@click.command(cls=Command)
@click.option("--etcd-members", type=click.IntRange(1, 5), default=3, show_default=True)
@click.option(
    "--postgres",
    metavar="CONNINFO",
    default="",
    help="Use this server's database instead of an embedded one (schema herd is installed there).",
)
@click.option("--keep", is_flag=True, help="Leave all files when it ends.")
def sandbox(etcd_members: int, postgres: str, keep: bool) -> None:
    """Run etcd, PostgreSQL and three hosts on this machine until Ctrl-C, and tell what happens.

    Commands typed in this directory find the sandbox by themselves.
    """
    try:
        asyncio.run(_run(Sandbox(Path.cwd(), members=etcd_members, conninfo=postgres), keep))
    except ServerFailed as error:
        raise click.ClickException(str(error)) from error


async def _run(sandbox: Sandbox, keep: bool) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    sandbox.refuse_a_second()
    click.echo(f"starting {len(HOSTS)} hosts, etcd and PostgreSQL in {sandbox.directory} ...")
    try:
        await sandbox.start()
        await sandbox.apply_sweeper()
        _introduce(sandbox)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(narrate(host, click.echo)) for host in sandbox.hosts.values()]
            running.append(tasks.create_task(_revive(sandbox)))
            await stop.wait()
            for task in running:
                task.cancel()
    finally:
        click.echo("stopping ...")
        await sandbox.stop(keep=keep)
        if keep:
            click.echo(f"kept: {sandbox.directory}")


def _introduce(sandbox: Sandbox) -> None:
    pgherd = os.environ.get(CALLED_AS, "pgherd")
    psql = ".pgherd/psql" if sandbox.postgres else f'psql "{sandbox.conninfo}"'
    click.echo(
        "\nup.  In another terminal, in this directory:\n\n"
        f"  {pgherd} status\n"
        f"  {pgherd} call sweeper status\n"
        f"  {psql} -c 'table herd.fences'\n"
        f"  kill -9 $(cat {sandbox.directory}/owner.pid)      # the whole host that runs the sweeper\n\n"
        "Ctrl-C ends it.\n"
    )


class Revivals:
    """When what was killed is started again: each :data:`RESTART_AFTER` seconds after its end was seen."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}

    def look(self, down: Collection[str], now: float) -> tuple[list[str], list[str]]:
        """Return what has ended since the last look, and what is to be started now."""
        fresh = [name for name in down if name not in self._at]
        self._at = {name: self._at.get(name, now + RESTART_AFTER) for name in down}
        ripe = [name for name, at in self._at.items() if now >= at]
        for name in ripe:
            del self._at[name]
        return fresh, ripe


async def _revive(sandbox: Sandbox) -> None:
    """Start hosts and members of etcd that were killed again, and keep the pointers up to date."""
    revivals, etcd, hosts = Revivals(), sandbox.etcd, sandbox.hosts
    members = {f"etcd{member}": member for member in range(len(etcd.endpoints))}
    while True:
        down = [host.name for host in hosts.values() if not host.pid]
        down += [name for name, member in members.items() if member not in etcd.running]
        fresh, ripe = revivals.look(down, asyncio.get_running_loop().time())
        for name in fresh:
            now = datetime.now().strftime("%H:%M:%S")  # noqa: DTZ005
            what = "its host" if name in hosts else "this member of etcd"
            click.echo(f"{now} {name:>6}  {what} was killed; started again in {RESTART_AFTER:g} s")
        for name in ripe:
            if name in hosts:
                sandbox.start_host(hosts[name])
            else:
                etcd.revive_member(members[name])
        with suppress(ServerFailed):
            if fresh:
                sandbox.point_at_a_living_host()
            await sandbox.note_owner("sweeper")
        await asyncio.sleep(0.2)
