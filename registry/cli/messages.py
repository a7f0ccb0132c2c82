"""``pgherd call`` and ``pgherd cast``."""

from __future__ import annotations

import base64
import json
import sys

import click

from registry.cli.agent import connect
from registry.cli.invocation import Command, Invocation, pass_invocation
from registry.cli.output import as_plain, print_json
from registry.errors import Invalid
from registry.v1.messages_pb2 import CallRequest, CallResponse
from registry.wire import error_from_pb


def _arguments(text: str) -> str:
    """Return the JSON text to send; ``-`` reads standard input.  Raises Invalid with the position."""
    source = sys.stdin.read() if text == "-" else text
    try:
        json.loads(source)
    except json.JSONDecodeError as error:
        line = source.splitlines()[error.lineno - 1] if source.strip() else ""
        where = (
            f"line {error.lineno}, column {error.colno}"
            if "\n" in source.strip()
            else f"column {error.colno}"
        )
        marker = f"\n{line}\n{' ' * (error.colno - 1)}^" if line and len(line) < 200 else ""
        raise Invalid(
            f"the arguments are not JSON: {error.msg} at {where}{marker}",
            hint="""write an object in single quotes: '{"table": "history"}'""",
        ) from error
    return source


_EPOCH = click.option(
    "--epoch",
    type=click.IntRange(min=0),
    default=0,
    help="Only if the owner has this epoch, else WRONG_EPOCH.",
)
_KEY = click.option(
    "--key", default="", help="Idempotency key: one process executes requests with the same key at most once."
)


@click.command(cls=Command)
@click.argument("name")
@click.argument("method")
@click.argument("arguments", default="{}", metavar="[JSON]")
@_EPOCH
@_KEY
@pass_invocation
def call(invocation: Invocation, name: str, method: str, arguments: str, epoch: int, key: str) -> None:
    """Ask a daemon and print its answer.

    JSON is an object with the method's arguments by name; `-` reads it from standard input.
    """
    request = CallRequest(
        name=name, method=method, json=_arguments(arguments), expect_epoch=epoch, idempotency_key=key
    )
    with connect(invocation) as agent:
        response = agent.ask(agent.messages.Call, request, changes=True)
    if response.HasField("error"):
        raise error_from_pb(response.error)
    if invocation.json:
        print_json(_document(response))
    elif response.WhichOneof("body") == "data":
        sys.stdout.buffer.write(response.data)
    else:
        click.echo(_readable(response.json or "{}"))


@click.command(cls=Command)
@click.argument("name")
@click.argument("method")
@click.argument("arguments", default="{}", metavar="[JSON]")
@_EPOCH
@_KEY
@pass_invocation
def cast(invocation: Invocation, name: str, method: str, arguments: str, epoch: int, key: str) -> None:
    """Send a daemon a message; returns when it is in its mailbox."""
    request = CallRequest(
        name=name, method=method, json=_arguments(arguments), expect_epoch=epoch, idempotency_key=key
    )
    with connect(invocation) as agent:
        response = agent.ask(agent.messages.Cast, request, changes=True)
    if invocation.json:
        print_json(as_plain(response))
    else:
        click.echo(f"accepted by epoch {response.epoch}, start {response.start}")


def _document(response: CallResponse) -> dict[str, object]:
    token: dict[str, object] = {"epoch": response.epoch, "start": response.start}
    if response.WhichOneof("body") == "data":
        return {"data": base64.b64encode(response.data).decode(), **token}
    return {"result": json.loads(response.json or "{}"), **token}


def _readable(text: str) -> str:
    """Return JSON with line breaks for a person at a terminal, else as the daemon wrote it."""
    return json.dumps(json.loads(text), indent=2, ensure_ascii=False) if sys.stdout.isatty() else text
