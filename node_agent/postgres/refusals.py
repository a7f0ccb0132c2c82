"""What PostgreSQL's errors mean for a fence: one translation for raising it and for working under it.

``PH001`` is :class:`~registry.errors.Fenced`.  Everything else that keeps a fence from being raised or
checked is :class:`FenceUnavailable`: nothing was executed, nobody is known to be superseded, and somebody has
to help.
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


def fenced(error: psycopg.Error) -> Fenced:
    """Return the refusal that PostgreSQL expressed as PH001."""
    message = error.diag.message_primary or str(error)
    details = {"database_detail": error.diag.message_detail or ""}
    if (superseded := _SUPERSEDED_BY.search(message)) is not None:
        details["superseded_by"] = superseded[1]
    return Fenced(message, hint=error.diag.message_hint or "", details=details)


def translate(error: psycopg.Error, database: str) -> Fenced | FenceUnavailable:
    """Return what an error of a statement of ours in ``database`` means."""
    primary = error.diag.message_primary or str(error).strip()
    match error.sqlstate:
        case "PH001":
            return fenced(error)
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
