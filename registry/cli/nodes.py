"""``pgherd nodes`` and ``restart-agent``."""

from __future__ import annotations

import time

import click

from registry.cli.agent import connect
from registry.cli.invocation import Command, Invocation, pass_invocation
from registry.cli.names import warn_if_stale
from registry.cli.output import as_plain, print_json, print_table
from registry.clock import SYSTEM_CLOCK
from registry.errors import HerdError, Unreachable
from registry.v1.cluster_pb2 import (
    NodesRequest,
    RestartAgentRequest,
    StatusRequest,
    StatusResponse,
)

_RESTART_SECONDS = 20.0


@click.command(cls=Command)
@pass_invocation
def nodes(invocation: Invocation) -> None:
    """List hosts and the nodes they are at present."""
    with connect(invocation) as agent:
        answer = agent.ask(agent.cluster.Nodes, NodesRequest())
    if invocation.json:
        print_json(as_plain(answer))
        return
    warn_if_stale(answer.in_sync)
    print_table(
        ("HOST", "STATE", "NODE", "ADDRESS", "VERSION", "CONTAINMENT", "NAMES", "DATABASES", "LABELS"),
        (
            (
                node.host,
                node.state,
                node.node,
                node.address,
                node.version,
                node.containment,
                str(node.names),
                " ".join(node.databases),
                " ".join(f"{key}={value}" for key, value in sorted(node.labels.items())),
            )
            for node in answer.nodes
        ),
        empty="no nodes",
    )


@click.command("restart-agent", cls=Command)
@pass_invocation
def restart_agent(invocation: Invocation) -> None:
    """Replace the agent's process; its workers are not interrupted."""
    begin = SYSTEM_CLOCK.now()
    give_up = begin + invocation.seconds(_RESTART_SECONDS)
    with connect(invocation) as agent:
        before = agent.ask(agent.cluster.RestartAgent, RestartAgentRequest(), changes=True).generation
    while (answer := _status(invocation)) is None or answer.generation <= before or answer.state != "ready":
        if SYSTEM_CLOCK.now() > give_up:
            raise Unreachable(
                f"the agent after generation {before} was not ready within {give_up - begin:g} s",
                hint="pgherd status; pgherd doctor",
            )
        time.sleep(0.02)
    if invocation.json:
        print_json(as_plain(answer))
        return
    took = (SYSTEM_CLOCK.now() - begin) * 1000
    pid = answer.pids.get("agent", 0)
    click.echo(f"agent of {answer.host} replaced in {took:.0f} ms: generation {answer.generation}, pid {pid}")


def _status(invocation: Invocation) -> StatusResponse | None:
    """Ask the agent how it is; None while there is none."""
    try:
        with connect(invocation) as agent:
            return agent.ask(agent.cluster.Status, StatusRequest(), seconds=1.0)
    except HerdError:
        return None
