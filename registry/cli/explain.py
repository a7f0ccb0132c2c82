"""``pgherd why``, ``events`` and ``wait``: what happened, what happens, and that it has happened."""

from __future__ import annotations

import click

from registry.cli.agent import NoAnswer, connect
from registry.cli.invocation import Command, Invocation, pass_invocation
from registry.cli.output import as_plain, moment, one_line, print_json, print_table
from registry.units import format_duration
from registry.v1.cluster_pb2 import EventsRequest, WaitRequest, WhyRequest

_WAIT_SECONDS = 60.0


@click.command(cls=Command)
@click.argument("name", default="")
@pass_invocation
def why(invocation: Invocation, name: str) -> None:
    """Explain a name or child, or everything that is not ready.

    Answered from the agent's memory: works without etcd, and says how old it is.
    """
    with connect(invocation) as agent:
        answer = agent.ask(agent.cluster.Why, WhyRequest(name=name))
    if invocation.json:
        print_json(as_plain(answer))
        return
    if answer.caveat:
        click.echo(one_line(answer.caveat))
    print_table(
        ("SINCE", "WHAT", "TRY"),
        ((moment(line.at), line.what, getattr(line, "try")) for line in answer.lines),
        empty=f"nothing is known about {name}" if name else "everything is ready",
    )


@click.command(cls=Command)
@click.argument("name", default="")
@click.option("-f", "--follow", is_flag=True, help="Go on with new events until Ctrl-C.")
@pass_invocation
def events(invocation: Invocation, name: str, follow: bool) -> None:
    """Print what the asked agent saw happen, about everything or one name."""
    seen = False
    with connect(invocation) as agent:
        for event in agent.follow(agent.cluster.Events, EventsRequest(name=name, follow=follow)):
            seen = True
            if invocation.json:
                print_json(as_plain(event), indent=None)
            else:
                click.echo(f"{moment(event.at)}  {event.level:<7}  {one_line(event.text)}")
    if not seen and not invocation.json:
        click.echo(f"no events about {name} here" if name else "no events here")


@click.command(cls=Command)
@click.argument("name")
@click.option(
    "--for", "state", type=click.Choice(["ready", "stopped", "moved"]), default="ready", show_default=True
)
@click.option(
    "--above-epoch", type=click.IntRange(min=0), default=0, help="With moved: default the present one."
)
@pass_invocation
def wait(invocation: Invocation, name: str, state: str, above_epoch: int) -> None:
    """Wait until a name is ready, stopped or moved.

    Exit code 1 when that does not happen within --timeout (60s).
    """
    seconds = invocation.seconds(_WAIT_SECONDS)
    request = WaitRequest(name=name, above_epoch=above_epoch)
    setattr(request, "for", state)
    try:
        with connect(invocation) as agent:
            answer = agent.ask(agent.cluster.Wait, request, seconds=seconds)
    except NoAnswer as error:
        raise click.ClickException(
            f"{name} was not {state} within {format_duration(seconds)}\nhint: pgherd why {name}"
        ) from error
    if invocation.json:
        print_json(as_plain(answer))
    elif state == "stopped":
        click.echo(f"{name} is stopped")
    else:
        click.echo(f"{name} is ready on {answer.host}, epoch {answer.epoch}")
