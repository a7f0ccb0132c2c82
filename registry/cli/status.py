"""``pgherd status``: one screen, and whether all is well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence

import click

from registry.cli.agent import connect
from registry.cli.invocation import Command, Invocation, pass_invocation
from registry.cli.names import state_of, warn_if_stale
from registry.cli.output import as_plain, one_line, print_json, print_table, span, styled
from registry.v1.cluster_pb2 import Node, NodesRequest, StatusRequest, StatusResponse
from registry.v1.names_pb2 import ListNamesRequest, Name

_SHOWN = 10


@click.command(cls=Command)
@pass_invocation
def status(invocation: Invocation) -> int:
    """Show the cluster on one screen; exit code 1 when something is not well."""
    with connect(invocation) as agent:
        own = agent.ask(agent.cluster.Status, StatusRequest())
        nodes = agent.ask(agent.cluster.Nodes, NodesRequest()).nodes
        names = agent.ask(agent.names.List, ListNamesRequest()).names
    lost = _lost(own, nodes)
    found = list(problems(own, nodes))
    if invocation.json:
        document = {
            "well": not found,
            "problems": found,
            "agent": as_plain(own),
            "nodes": [as_plain(node) for node in nodes],
            "names": [as_plain(name) for name in names],
        }
        print_json(document)
    else:
        warn_if_stale(own.in_sync, own.stale_since)
        _print_screen(own, nodes, _counted(names, lost), found)
    return 1 if found else 0


def problems(own: StatusResponse, nodes: Iterable[Node]) -> Iterator[str]:
    """Yield what is not well: what the asked agent says, and hosts that are not ready."""
    yield from own.problems
    if own.state != "ready" and not own.problems:
        yield f"this host is {own.state}"
    yield from (f"host {node.host} is {node.state}" for node in nodes if node.state != "ready")


def _print_screen(own: StatusResponse, nodes: Iterable[Node], counted: str, found: Sequence[str]) -> None:
    click.echo(f"cluster {own.cluster}, asked {own.host} (pgherd {own.version}): {styled(own.state)}")
    for title, text in _facts(own):
        click.echo(f"  {title:<11} {one_line(text)}")
    click.echo()
    print_table(
        ("HOST", "STATE", "NAMES", "VERSION", "ADDRESS"),
        ((node.host, node.state, str(node.names), node.version, node.address) for node in nodes),
        empty="no nodes",
    )
    click.echo(f"\nnames: {counted}")
    for problem in found[:_SHOWN]:
        click.echo(f"  {styled('wrong')}  {one_line(problem)}")
    if len(found) > _SHOWN:
        click.echo(f"  and {len(found) - _SHOWN} more: pgherd status --json")
    click.echo(f"{len(found)} not well: pgherd why" if found else "all is well")


def _facts(own: StatusResponse) -> Iterator[tuple[str, str]]:
    if own.lease_ttl:
        yield "lease", f"{own.lease_ttl:g}s, named workers could run {span(own.lease_slack)} without etcd"
    yield "registry", f"in sync at revision {own.revision}" if own.in_sync else f"behind: {own.stale_since}"
    if own.etcd:
        good = [member for member in own.etcd if not member.problem]
        versions = sorted({member.version for member in good if member.version})
        yield "etcd", f"{len(good)} of {len(own.etcd)} members answer {' '.join(versions)}".rstrip()
    for database in own.databases:
        yield "database", f"{database.name} {database.problem or database.role}".rstrip()
    yield "containment", own.containment


def _lost(own: StatusResponse, nodes: Iterable[Node]) -> Container[str]:
    """Return the hosts whose names nobody can vouch for: down, lost, or the asked one without a lease."""
    hosts = {node.host for node in nodes if node.state in ("down", "lost")}
    return hosts | ({own.host} if own.state in ("joining", "lost") or not own.lease_slack else set())


def _counted(names: Iterable[Name], lost: Container[str]) -> str:
    counts = Counter(
        "on a host without a lease" if name.epoch and name.host in lost else state_of(name) for name in names
    )
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"
