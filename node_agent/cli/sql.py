"""``pgherd sql``: schema herd in a database.  Needs PostgreSQL only, no agent and no etcd."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from node_agent.postgres import install as installing
from node_agent.postgres.refusals import SCHEMA_VERSION
from registry.addresses import contains_password
from registry.cli.invocation import Command, Invocation, config_option, pass_invocation
from registry.cli.output import print_json, print_table, token
from registry.config import AgentConfig, load
from registry.errors import Denied, Invalid, Unreachable

_T = TypeVar("_T")

_config = config_option("The host's configuration, which says what a database's name means.")
_from_env = click.option(
    "--from-env", is_flag=True, help="The database of PGHOST, PGDATABASE, PGSERVICE ... instead of a name."
)


@click.group()
def sql() -> None:
    """Install schema herd into databases, and look at it.

    A database is a name in the agent's configuration ([database.NAME]).  Passwords belong into a passfile or
    a service file, never into a command.
    """


@sql.command(cls=Command)
@click.argument("database", required=False)
@_config
@_from_env
@click.option("--cluster", help="The cluster that works in it.  Default: the configuration's.")
@pass_invocation
def install(
    invocation: Invocation, database: str | None, config: Path, from_env: bool, cluster: str | None
) -> int:
    """Install schema herd into DATABASE; harmless where it is installed.

    In a copy of a database (a dump restored elsewhere, or a server after pg_upgrade) this also says that the
    daemons of the cluster shall work in the copy.  Needs CREATE on the database, no superuser.
    """
    name, conninfo, loaded = _which(database, config, from_env)
    if cluster is None:
        cluster = loaded.cluster if loaded else ""
    if not cluster:
        raise click.UsageError("which cluster works in this database? --cluster NAME")
    done = _run(installing.install(conninfo, cluster))
    if invocation.json:
        print_json({"database": name, "cluster": cluster} | dataclasses.asdict(done))
        return 0
    click.echo(f"{name}: {_what_was_done(done)}, cluster {cluster}")
    for notice in done.notices:
        click.echo(f"{name}: note: {notice}")
    return 0


@sql.command(cls=Command)
@click.argument("database", required=False)
@_config
@_from_env
@pass_invocation
def status(invocation: Invocation, database: str | None, config: Path, from_env: bool) -> int:
    """Show schema herd and the fences in DATABASE, or in every configured one.

    Exit code 1 when it is missing, of another version, or a copy; 4 when a database cannot be reached.
    """
    if database is None and not from_env:
        loaded = load(config)
        chosen = {name: entry.conninfo for name, entry in loaded.databases.items()}
        if not chosen:
            raise click.UsageError(f"{config} configures no database")
    else:
        name, conninfo, _ = _which(database, config, from_env)
        chosen = {name: conninfo}
    found = {name: _run(installing.status(conninfo)) for name, conninfo in chosen.items()}
    if invocation.json:
        print_json([_plain(name, each) for name, each in found.items()])
    else:
        _print(found)
    return 1 if any(each.problems for each in found.values()) else 0


def _which(database: str | None, config: Path, from_env: bool) -> tuple[str, str, AgentConfig | None]:
    """Return name and conninfo of the database that is meant, and the configuration if it was read."""
    if from_env:
        if database is not None:
            raise click.UsageError("either a DATABASE or --from-env")
        return os.environ.get("PGDATABASE") or os.environ.get("PGSERVICE") or "database", "", None
    if database is None:
        raise click.UsageError("which DATABASE?  A name of the configuration, or --from-env")
    if "=" in database or "://" in database:
        # Not repeated in the message: it may hold a password, and is in the process list as it is.
        secret = " with a password" if contains_password(database) else ""
        raise click.UsageError(
            f"DATABASE is a name in {config}, not a connection string{secret}; or set PGSERVICE, PGPASSFILE "
            "and use --from-env"
        )
    loaded = load(config)
    if database not in loaded.databases:
        known = ", ".join(sorted(loaded.databases)) or "none"
        raise Invalid(f"{config} has no [database.{database}]", hint=f"configured: {known}")
    return database, loaded.databases[database].conninfo, loaded


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    try:
        return asyncio.run(work)
    except installing.DatabaseUnreachable as error:
        raise Unreachable(str(error), hint=error.hint or "pgherd doctor") from error
    except installing.InstallFailed as error:
        raise Denied(str(error), hint=error.hint) from error


def _what_was_done(done: installing.Installed) -> str:
    if done.created:
        return f"schema herd version {SCHEMA_VERSION} installed"
    if done.identity == "copy":
        return "schema herd now belongs to this copy of the database"
    return f"schema herd version {SCHEMA_VERSION} was installed already"


def _plain(name: str, found: installing.Status) -> dict[str, Any]:
    plain = dataclasses.asdict(found) | {"name": name}
    plain["installed_at"] = found.installed_at.isoformat() if found.installed_at else None
    plain["fences"] = [
        dataclasses.asdict(fence) | {"raised_at": fence.raised_at.isoformat()} for fence in found.fences
    ]
    return plain


def _print(found: dict[str, installing.Status]) -> None:
    for name, each in found.items():
        role = "standby" if each.standby else "primary"
        click.echo(f"{name}: database {each.database}, PostgreSQL {each.server_version}, {role}")
        if each.version is not None:
            click.echo(f"{name}: schema herd version {each.version}, cluster {each.cluster or '-'}")
        for problem in each.problems:
            click.echo(f"{name}: {problem}\n  try: pgherd sql install {name}")
        if each.fences:
            print_table(("NAME", "EPOCH", "NODE", "RAISED", "STATE"), _rows(each), empty="")


def _rows(found: installing.Status) -> Sequence[Sequence[str]]:
    return [
        (
            fence.name,
            token(fence.epoch, fence.start),
            fence.node,
            f"{fence.raised_at:%Y-%m-%d %H:%M:%S%z}",
            "open" if fence.open else "closed",
        )
        for fence in found.fences
    ]
