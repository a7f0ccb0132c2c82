"""``pgherd apply``, ``delete``, ``specs``, ``start`` and ``stop``: what should run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import click
import grpc

from registry.cli.agent import Agent, asking_user, connect
from registry.cli.invocation import Command, Invocation, pass_invocation
from registry.cli.output import as_plain, moment, one_line, print_done, print_json, print_table
from registry.errors import Invalid, NoSuchName
from registry.v1.supervision_pb2 import ApplyRequest, ApplyResponse, Done, NameRequest, SpecsRequest


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@pass_invocation
def apply(invocation: Invocation, files: tuple[str, ...]) -> None:
    """Declare the children of spec files for the whole cluster; `-` is standard input.

    A file is checked whole before anything of it is written.
    """
    requests = [ApplyRequest(toml=_read(file), source=_source(file), who=asking_user()) for file in files]
    answer = ApplyResponse()
    with connect(invocation) as agent:
        for request in requests:
            answer.applied.extend(agent.ask(agent.supervision.Apply, request, changes=True).applied)
    if invocation.json:
        print_json(as_plain(answer))
    for applied in () if invocation.json else answer.applied:
        click.echo(f"{applied.name} {one_line(applied.what)}")


def _source(file: str) -> str:
    return "standard input" if file == "-" else file


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise Invalid(f"{file}: {why}") from error


@click.command(cls=Command)
@click.argument("name", default="")
@pass_invocation
def specs(invocation: Invocation, name: str) -> None:
    """List declared specs, or print one as a file that `apply` accepts."""
    with connect(invocation) as agent:
        answer = agent.ask(agent.supervision.Specs, SpecsRequest(name=name))
    if name and not answer.specs:
        raise NoSuchName(f'no spec is named "{name}"', hint="pgherd specs lists them")
    if invocation.json:
        print_json(as_plain(answer))
    elif name:
        click.echo("".join(spec.toml for spec in answer.specs), nl=False)
    else:
        print_table(
            ("NAME", "DESIRED", "CHANGED BY", "AT", "PROBLEM HERE"),
            ((spec.name, spec.desired, spec.who, moment(spec.at), spec.problem) for spec in answer.specs),
            empty="no specs: pgherd apply FILE declares some",
        )


_Wish: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[NameRequest, Done]"


def _wish(invocation: Invocation, name: str, method: Callable[[Agent], _Wish]) -> None:
    with connect(invocation) as agent:
        done = agent.ask(method(agent), NameRequest(name=name, who=asking_user()), changes=True)
    print_done(invocation, done)


@click.command(cls=Command)
@click.argument("name")
@pass_invocation
def delete(invocation: Invocation, name: str) -> None:
    """Remove a spec; its worker is stopped."""
    _wish(invocation, name, lambda agent: agent.supervision.Delete)


@click.command(cls=Command)
@click.argument("name")
@pass_invocation
def start(invocation: Invocation, name: str) -> None:
    """Wish that a worker runs; survives failover and reboot."""
    _wish(invocation, name, lambda agent: agent.supervision.Start)


@click.command(cls=Command)
@click.argument("name")
@pass_invocation
def stop(invocation: Invocation, name: str) -> None:
    """Wish that a worker does not run; survives failover and reboot."""
    _wish(invocation, name, lambda agent: agent.supervision.Stop)
