"""What commands print: tables, JSON, moments and spans of time.

On a terminal tables have colours and fit its width; anywhere else they are plain columns with two spaces
between them.  JSON has the fields of the gRPC messages under their names in ``proto/``, numbers as numbers
and enums as their last word in small letters.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from registry.cli.invocation import Invocation
    from registry.v1.supervision_pb2 import Done

_STYLES = {
    **dict.fromkeys(("ready", "ok", "running"), "green"),
    **dict.fromkeys(
        ("recovering", "starting", "stopping", "waiting", "claiming", "fencing", "backoff"), "yellow"
    ),
    **dict.fromkeys(("down", "lost", "unowned", "failed", "err", "wrong"), "red"),
    **dict.fromkeys(("stopped", "finished", "-"), "bright_black"),
}


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """Print rows under their column names, or ``empty`` when there are none."""
    cells = [[one_line(cell) or "-" for cell in row] for row in rows]
    if not cells:
        click.echo(empty)
    elif sys.stdout.isatty():
        _print_rich(columns, cells)
    else:
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for row in (columns, *cells):
            line = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            click.echo("  ".join(line).rstrip())


_CONTROL = re.compile(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029]+\s*")


def one_line(text: str) -> str:
    """Return text that others wrote so that it stays in its line and moves no cursor."""
    return _CONTROL.sub(" ", text).strip()


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    Console(highlight=False).print(table)


def styled(word: str) -> str:
    """Return a state's word in its colour; click removes it where there is no terminal."""
    style = _STYLES.get(word)
    return click.style(word, fg=style) if style else word


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print JSON on standard output."""
    click.echo(json.dumps(value, indent=indent, ensure_ascii=False))


def print_done(invocation: Invocation, done: Done) -> None:
    """Print what an agent says it did."""
    if invocation.json:
        print_json(as_plain(done))
    else:
        click.echo(done.what)


def as_plain(message: Message) -> dict[str, Any]:
    """Return every field of a message, set or not, as values of JSON."""
    return {
        field.name: _field(message, field) for field in message.DESCRIPTOR.fields if _shown(message, field)
    }


def _shown(message: Message, field: Any) -> bool:
    return not field.has_presence or message.HasField(field.name)


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(sorted(value.items()))
    if field.is_repeated:
        return [_value(field, item) for item in value]
    return _value(field, value)


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_plain(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type.values_by_number[value].name, field.enum_type.name)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def enum_word(name: str, enum: str) -> str:
    """Return ``ready`` for NAME_STATE_READY of the enum NameState."""
    prefix = "".join(f"_{letter}" if letter.isupper() else letter for letter in enum).lstrip("_").upper()
    return name.removeprefix(f"{prefix}_").lower()


def token(epoch: int, start: int) -> str:
    """Return which process of which ownership: ``31.2``; empty without an owner."""
    return f"{epoch}.{start}" if epoch else ""


def span(seconds: float) -> str:
    """Return a span of time in its two largest units at most: ``0.4s``, ``12s``, ``3m 5s``, ``2d 4h``."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f}s"
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count}{unit}" if count else "")
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if part)


def moment(unix: float) -> str:
    """Return a moment in local time, with its date when that is not today; ``now`` for 0."""
    if not unix:
        return "now"
    local = datetime.fromtimestamp(unix, UTC).astimezone()
    today = datetime.now(UTC).astimezone().date()
    return local.strftime("%H:%M:%S" if local.date() == today else "%Y-%m-%d %H:%M:%S")


def age(unix: float) -> str:
    """Return how long ago a moment was."""
    return span(datetime.now(UTC).timestamp() - unix) if unix else ""
