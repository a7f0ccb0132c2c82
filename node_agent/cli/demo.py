"""``pgherd demo``: a tour of the promises on this machine, which checks itself."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import click

from node_agent.sandbox.cluster import Sandbox
from node_agent.sandbox.process import ServerFailed
from node_agent.sandbox.tour import CheckFailed, Step, Tour
from registry.cli.invocation import Command
from registry.errors import HerdError

LIMIT = 180.0
"""Seconds the whole tour may take."""


@click.command(cls=Command)
@click.option("--etcd-members", type=click.IntRange(1, 5), default=3, show_default=True)
@click.option("--keep", is_flag=True, help="Leave configuration, data and logs when it ends.")
def demo(etcd_members: int, keep: bool) -> None:
    """Start a cluster, break it in every way it promises to survive, and check each promise.

    Exit code 1 when a check fails; then the logs stay.
    """
    sys.exit(asyncio.run(_run(etcd_members, keep)))


async def _run(etcd_members: int, keep: bool) -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pgherd-demo-") as workplace:
        sandbox = Sandbox(Path(workplace), members=etcd_members)
        problem = ""
        try:
            async with asyncio.timeout(LIMIT):
                await Tour(sandbox, _print).run()
        except (CheckFailed, ServerFailed, HerdError, TimeoutError) as error:
            problem = str(error) or f"not finished within {LIMIT:g} s"
        finally:
            await sandbox.stop(keep=keep or bool(problem))
    if problem:
        click.echo(f"✗ {problem}\n  logs: {sandbox.directory}/*/pgherd.log", err=True)
        click.echo(sandbox.last_words(), err=True)
        return 1
    click.echo(f"\nP1 to P5 and P7 held, in {time.monotonic() - began:.0f} s.  Now yours: ./dev sandbox")
    if keep:
        click.echo(f"kept: {sandbox.directory}")
    return 0


def _print(step: Step) -> None:
    milliseconds = step.seconds * 1000
    took = f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{step.seconds:.1f} s"
    click.secho("✓", fg="green", nl=False)
    click.echo(f" {took:>7}  {step.done}  ", nl=False)
    click.secho(f"$ {step.typed}", dim=True)
