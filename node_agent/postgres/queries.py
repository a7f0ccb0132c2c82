"""SQL lives in ``.sql`` files, each statement under a ``-- name:`` line; this module hands it out by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from psycopg import sql

_HEADER = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


def load(path: Path) -> Mapping[str, bytes]:
    """Return the statements of a file by name, without their comments at the top."""
    _, *parts = _HEADER.split(path.read_text())
    return {
        name: re.sub(r"^(--.*\n)+", "", body).strip().encode()
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def compose(statement: bytes, **values: object) -> sql.Composed:
    """Fill ``{...}`` with quoted literals, for messages of several statements, which take no parameters."""
    # Not text of a user: it comes from a file of ours.
    template = sql.SQL(statement.decode())
    return template.format(
        **{
            key: value if isinstance(value, sql.Composable) else sql.Literal(value)
            for key, value in values.items()
        }
    )


HERE = Path(__file__).parent
QUERIES = load(HERE / "queries.sql")
"""The statements of ``queries.sql``."""
