"""What PostgreSQL's errors mean for a fence: one translation for raising it and for working under it.

``PH001`` is :class:`~registry.errors.Fenced` where a successor is known, and :class:`FenceClosed` where there
is none: a process that ends by the first is not started again, one that ends by the second is, and its agent
raises the fence before.  Everything else that keeps a fence from being raised or checked is
:class:`FenceUnavailable`: nobody is known to be superseded, and somebody has to help.
"""

from __future__ import annotations

import re

import psycopg
from psycopg import errors

from registry.errors import Fenced

SCHEMA_VERSION = 1
"""The version of schema herd that this code works with."""

_NO_CONNECTION = ("08", "28", "53", "57")
"""SQLSTATE classes of a server that does not let us in: connection, authorisation, resources, operator."""
_SUPERSEDED_BY = re.compile(r"superseded by epoch (\d+\.\d+)")


class FenceUnavailable(Exception):
    """A fence could be neither raised nor checked; ``hint`` is what helps, often a command."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class FenceClosed(Exception):
    """No transaction of this token may commit here, and no successor is known: nothing was committed.

    The server was promoted since the fence was raised, or the fence was never raised, or it is another
    name's.  Do not go on: the agent raises the fence before it starts the process again.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


def lost(connection: psycopg.AsyncConnection[tuple[object, ...]], error: psycopg.Error) -> bool:
    """Tell whether ``error`` means that the session is gone, and with it whatever was not committed."""
    return connection.closed or is_loss(error)


def is_loss(error: psycopg.Error) -> bool:
    """Tell whether ``error`` says that its session ended."""
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError)
    return error.diag.severity_nonlocalized in ("FATAL", "PANIC")


def is_conflict(error: psycopg.Error) -> bool:
    """Tell whether ``error`` is a conflict with a row or transaction newer than a snapshot."""
    return isinstance(error, errors.SerializationFailure)


def refusal(error: psycopg.Error) -> Fenced | FenceClosed:
    """Return what PostgreSQL expressed as PH001."""
    message, detail = error.diag.message_primary or str(error), error.diag.message_detail or ""
    hint = error.diag.message_hint or ""
    if (superseded := _SUPERSEDED_BY.search(message)) is None:
        return FenceClosed(f"{message}: {detail}" if detail else message, hint=hint)
    return Fenced(message, hint=hint, details={"superseded_by": superseded[1], "detail": detail})


def translate(error: psycopg.Error, database: str) -> Fenced | FenceClosed | FenceUnavailable:
    """Return what an error of a statement of ours in ``database`` means."""
    primary = error.diag.message_primary or str(error).strip()
    match error.sqlstate:
        case "PH001":
            return refusal(error)
        case errors.InvalidSchemaName.sqlstate | errors.UndefinedFunction.sqlstate:
            return FenceUnavailable(
                f"database {database} has no schema herd", hint=f"pgherd sql install {database}"
            )
        case errors.InsufficientPrivilege.sqlstate:
            return FenceUnavailable(
                f"database {database}: {primary}",
                hint="grant herd_worker to the role of a worker, herd_admin to that of the agent",
            )
        case None | "3D000":
            return FenceUnavailable(f"database {database} cannot be reached: {primary}")
        case str(code) if code[:2] in _NO_CONNECTION:
            return FenceUnavailable(f"database {database} cannot be reached: {primary}")
        case _:
            return FenceUnavailable(f"database {database}: {primary}", hint=error.diag.message_hint or "")


def check_version(version: object, database: str) -> None:
    """Raise FenceUnavailable unless the schema has the version this code works with."""
    if version != SCHEMA_VERSION:
        raise FenceUnavailable(
            f"database {database} has version {version} of schema herd, this pgherd needs {SCHEMA_VERSION}",
            hint=f"install the pgherd that matches; pgherd sql status {database} shows what is there",
        )
