"""``pgherd sandbox``: the whole system on one machine, to play with and to break."""

from __future__ import annotations

import asyncio
import os
import signal
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
"""Seconds until a host that was killed is started again."""


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


async def _revive(sandbox: Sandbox) -> None:
    """Start hosts that were killed again, and keep the pointers up to date."""
    while True:
        down = [host for host in sandbox.hosts.values() if not host.pid]
        for host in down:
            now = datetime.now().strftime("%H:%M:%S")  # noqa: DTZ005
            click.echo(f"{now} {host.name:>6}  its host was killed; started again in {RESTART_AFTER:g} s")
        if down:
            with suppress(ServerFailed):
                sandbox.point_at_a_living_host()
            await asyncio.sleep(RESTART_AFTER)
            for host in down:
                sandbox.start_host(host)
        await sandbox.note_owner("sweeper")
        await asyncio.sleep(0.2)
