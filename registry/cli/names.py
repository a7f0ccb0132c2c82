"""``pgherd names``, ``whereis`` and ``methods``: who owns what, and what it offers."""

from __future__ import annotations

import click

from registry.cli.agent import connect
from registry.cli.invocation import Command, Invocation, pass_invocation
from registry.cli.output import age, as_plain, enum_word, print_json, print_table, token
from registry.errors import NoOwner
from registry.v1.names_pb2 import ListNamesRequest, MethodsRequest, Name, NameState, ResolveRequest


def state_of(name: Name) -> str:
    """Return ``ready``, ``starting``, ``stopping``, ``stopped`` or ``unowned``."""
    return enum_word(NameState.Name(name.state), "NameState")


def warn_if_stale(in_sync: bool, why: str = "") -> None:
    """Say on standard error that an answer may be behind."""
    if not in_sync:
        click.echo(
            f"pgherd: this may be out of date: {why or 'the agent has not caught up with etcd'}", err=True
        )


@click.command(cls=Command)
@click.argument("prefix", default="")
@pass_invocation
def names(invocation: Invocation, prefix: str) -> None:
    """List names and their owners, all or those that start with PREFIX."""
    with connect(invocation) as agent:
        answer = agent.ask(agent.names.List, ListNamesRequest(prefix=prefix))
    if invocation.json:
        print_json(as_plain(answer))
        return
    warn_if_stale(answer.in_sync, answer.stale_since)
    print_table(
        ("NAME", "STATE", "HOST", "EPOCH.START", "PID", "SINCE"),
        (
            (
                name.name,
                state_of(name),
                name.host,
                token(name.epoch, name.start),
                str(name.pid or ""),
                age(name.since),
            )
            for name in answer.names
        ),
        empty=_none(prefix, in_sync=answer.in_sync),
    )


def _none(prefix: str, *, in_sync: bool) -> str:
    which = f"no name that starts with {prefix!r}" if prefix else "no name"
    if not in_sync:
        return f"{which} is known here"
    return f"there is {which}" if prefix else "no names yet: pgherd apply FILE declares some"


@click.command(cls=Command)
@click.argument("name")
@click.option("--linearizable", is_flag=True, help="Ask etcd instead of the agent's copy.")
@pass_invocation
def whereis(invocation: Invocation, name: str, linearizable: bool) -> None:
    """Show the owner of a name; exit code 1 when it has none."""
    with connect(invocation) as agent:
        answer = agent.ask(agent.names.Resolve, ResolveRequest(name=name, linearizable=linearizable))
    owner, state = answer.name, state_of(answer.name)
    if not owner.epoch:
        raise NoOwner(f"{owner.name or name} has no owner, it is {state}", hint=f"pgherd why {name}")
    if invocation.json:
        print_json(as_plain(answer))
        return
    since = f" for {age(owner.since)}" if owner.since else ""
    click.echo(
        f"{owner.name} is on {owner.host} (node {owner.node}, {owner.address}), epoch {owner.epoch}, "
        f"start {owner.start}, pid {owner.pid}, {state}{since}"
    )


@click.command(cls=Command)
@click.argument("name")
@pass_invocation
def methods(invocation: Invocation, name: str) -> None:
    """List what a daemon offers."""
    with connect(invocation) as agent:
        answer = agent.ask(agent.names.Methods, MethodsRequest(name=name))
    if invocation.json:
        print_json(as_plain(answer))
        return
    print_table(
        ("METHOD", "KIND", "SIGNATURE", "DESCRIPTION"),
        ((method.name, method.kind, method.signature, method.description) for method in answer.methods),
        empty=f"{name} offers no methods (a plain command has none)",
    )
