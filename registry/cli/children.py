"""``pgherd ps``, ``tree``, ``logs`` and ``restart``: processes, on whichever host they are."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TypeGuard

import click

from registry.cli.agent import Agent, asking_user, connect
from registry.cli.invocation import Command, Invocation, pass_invocation
from registry.cli.names import warn_if_stale
from registry.cli.output import as_plain, print_json, print_table, span, styled, token
from registry.clock import SYSTEM_CLOCK
from registry.units import format_duration
from registry.v1.names_pb2 import ListNamesRequest
from registry.v1.supervision_pb2 import Child, ChildrenRequest, ChildrenResponse, LogsRequest, RestartRequest

_RESTART_SECONDS = 30.0
_POLL_SECONDS = 0.02


def _children(invocation: Invocation, host: str) -> tuple[ChildrenResponse, str]:
    """Return children, and what to say when there are none."""
    with connect(invocation) as agent:
        answer = agent.ask(agent.supervision.Children, ChildrenRequest(host=host))
        return answer, "" if answer.children else _none(agent, host, answer)


def _none(agent: Agent, host: str, answer: ChildrenResponse) -> str:
    if host:
        return f"host {host} has no children"
    if answer.stale_since or answer.silent:
        return "no children are known here"
    names = len(agent.ask(agent.names.List, ListNamesRequest()).names)
    if names:
        return f"no children run; {names} {'name is' if names == 1 else 'names are'} known: pgherd names"
    return "no children: pgherd apply FILE declares some"


def _warn_of(answer: ChildrenResponse) -> None:
    warn_if_stale(not answer.stale_since, answer.stale_since)
    for host in answer.silent:
        click.echo(f"pgherd: host {host} did not answer, its children are missing here", err=True)


@click.command(cls=Command)
@click.argument("host", default="")
@pass_invocation
def ps(invocation: Invocation, host: str) -> None:
    """List children and their processes, of all hosts or of one."""
    answer, none = _children(invocation, host)
    if invocation.json:
        print_json(as_plain(answer))
        return
    _warn_of(answer)
    print_table(
        ("HOST", "CHILD", "NAME", "KIND", "STATE", "PID", "EPOCH.START", "UPTIME", "RESTARTS", "LAST EXIT"),
        (
            (
                child.host,
                child.child,
                child.name,
                child.kind,
                child.state,
                str(child.pid or ""),
                token(child.epoch, child.start),
                span(child.uptime) if child.pid else "",
                str(child.restarts),
                child.last_exit,
            )
            for child in answer.children
        ),
        empty=none,
    )


@click.command(cls=Command)
@pass_invocation
def tree(invocation: Invocation) -> None:
    """Show hosts with their children as a tree."""
    answer, none = _children(invocation, "")
    if invocation.json:
        print_json(as_plain(answer))
        return
    _warn_of(answer)
    for line in _tree(answer.children):
        click.echo(line)
    if none:
        click.echo(none)


def _tree(children: Iterable[Child]) -> Iterator[str]:
    for host, group in groupby(children, key=lambda child: child.host):
        yield host
        *others, last = group
        for child in (*others, last):
            parts = (
                "└─" if child is last else "├─",
                child.name or child.child,
                styled(child.state),
                f"pid {child.pid}" if child.pid else "",
                f"epoch {token(child.epoch, child.start)}" if child.epoch else "",
            )
            yield " ".join(part for part in parts if part)


@click.command(cls=Command)
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with new output until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(min=0), default=0, help="Only the last lines.")
@pass_invocation
def logs(invocation: Invocation, name: str, follow: bool, lines: int) -> None:
    """Print what a worker wrote: its last 1 MiB, also after a crash."""
    with connect(invocation) as agent:
        request = LogsRequest(name=name, follow=follow, lines=lines)
        missing = "earlier bytes are not kept any more"
        for chunk in agent.follow(agent.supervision.Logs, request):
            if chunk.dropped:
                click.echo(f"pgherd: {chunk.dropped} {missing}", err=True)
            missing = "bytes are missing here: they came faster than they were read"
            if invocation.json:
                print_json(as_plain(chunk), indent=None)
            else:
                sys.stdout.buffer.write(chunk.data)
            sys.stdout.flush()


@click.command(cls=Command)
@click.argument("name")
@pass_invocation
def restart(invocation: Invocation, name: str) -> None:
    """Stop a worker's process and start it again on the same host.

    Its epoch stays the same.  Returns when it is ready; exit code 1 after --timeout (30s).
    """
    seconds = invocation.seconds(_RESTART_SECONDS)
    begin = SYSTEM_CLOCK.now()
    with connect(invocation) as agent:
        before = _process(agent, name)
        request = RestartRequest(name=name, who=asking_user())
        agent.ask(agent.supervision.Restart, request, changes=True)
        while not _is_next(child := _process(agent, name), before):
            if SYSTEM_CLOCK.now() > begin + seconds:
                state = child.state if child else "gone"
                raise click.ClickException(
                    f"{name} is {state}, not ready {format_duration(seconds)} after its restart\n"
                    f"hint: pgherd why {name}"
                )
            time.sleep(_POLL_SECONDS)
    if invocation.json:
        print_json(as_plain(child))
        return
    took = (SYSTEM_CLOCK.now() - begin) * 1000
    click.echo(f"{name} restarted on {child.host} in {took:.0f} ms: pid {child.pid}, start {child.start}")


def _process(agent: Agent, name: str) -> Child | None:
    """Find a child by its global name, or by its id on the asked host."""
    children = agent.ask(agent.supervision.Children, ChildrenRequest()).children
    return next((child for child in children if name in (child.name, child.child) and child.pid), None)


def _is_next(child: Child | None, before: Child | None) -> TypeGuard[Child]:
    """Tell whether this is a ready process, and another one than before."""
    return child is not None and child.state == "ready" and (before is None or child.pid != before.pid)
