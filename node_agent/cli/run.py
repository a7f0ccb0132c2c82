"""``pgherd run``: the host process.  Validates the configuration, then becomes the launcher."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from node_agent.cli.check import check as check_files
from registry.cli.invocation import Command, config_option
from registry.config import load


@click.command(cls=Command)
@config_option()
@click.option("--check", is_flag=True, help="Only validate it, and the specs in its children.d.")
@click.pass_context
def run(context: click.Context, config: Path, check: bool) -> None:
    """Run pgherd on this host: launcher, warden and agent; never returns.

    For systemd or a container's first process.  Exit code 2 when the configuration is wrong.
    """
    loaded = load(config)
    if check:
        specs = [loaded.children_dir] if loaded.children_dir.is_dir() else []
        context.exit(context.invoke(check_files, files=[config, *specs]))
    _make(loaded.run_dir)
    # -P: a directory called registry or node_agent where we were started is not ours.
    module = ["-P", "-m", "node_agent.launcher"]
    os.execv(sys.executable, [sys.executable, *module, "-c", str(config.absolute())])


def _make(run_dir: Path) -> None:
    """Make the directory of our sockets: whoever can enter it can use them."""
    try:
        run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        message = f"run_dir {run_dir} cannot be made: {error.strerror}\nhint: make it, or set run_dir"
        raise click.ClickException(message) from error
