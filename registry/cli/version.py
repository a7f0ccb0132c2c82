"""``pgherd version``: nothing is asked and next to nothing imported."""

from __future__ import annotations

import platform
from importlib.metadata import version as installed

import click

from registry.cli.invocation import Command, Invocation, pass_invocation
from registry.cli.output import print_json


@click.command(cls=Command)
@pass_invocation
def version(invocation: Invocation) -> None:
    """Print the version of this program; `nodes` shows those of the agents."""
    pgherd, python = installed("pgherd"), platform.python_version()
    if invocation.json:
        print_json({"pgherd": pgherd, "python": python})
    else:
        click.echo(f"pgherd {pgherd} (Python {python})")
