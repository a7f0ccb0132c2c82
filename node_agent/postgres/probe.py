"""A quick look at the configured databases, for `pgherd status`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from node_agent.postgres.install import InstallFailed, status
from registry.config import Database
from registry.v1 import cluster_pb2

PROBE_TIMEOUT = 1.0
"""Seconds for one database."""


async def probe_databases(
    databases: Mapping[str, Database], cluster: str
) -> tuple[cluster_pb2.DatabaseStatus, ...]:
    """Look at all of them at once; never raises for one that is not usable."""
    names = sorted(databases)
    return tuple(await asyncio.gather(*(_probe(databases[name], cluster) for name in names)))


async def _probe(database: Database, cluster: str) -> cluster_pb2.DatabaseStatus:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            found = await status(database.conninfo)
    except TimeoutError:
        return cluster_pb2.DatabaseStatus(name=database.name, problem=f"no answer in {PROBE_TIMEOUT:g} s")
    except InstallFailed as error:
        return cluster_pb2.DatabaseStatus(name=database.name, problem=str(error))
    problems = list(found.problems)
    if found.version is None:
        problems = [f"no schema herd, needed for fences: `pgherd sql install {database.name}`"]
    elif found.cluster not in ("", cluster):
        problems.append(f"schema herd belongs to cluster {found.cluster}")
    role = "standby" if found.standby else "primary"
    return cluster_pb2.DatabaseStatus(name=database.name, role=role, problem="; ".join(problems))
