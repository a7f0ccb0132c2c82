"""Installing the sweeper's tables; idempotent."""

from __future__ import annotations

from pathlib import Path

import psycopg

from node_agent.postgres.queries import load

_HERE = Path(__file__).parent
QUERIES = load(_HERE / "sweeper.sql")


async def install(conninfo: str) -> bool:
    """Install schema herd_sweeper where it is missing; tell whether it was.

    Raises psycopg.Error when that is not possible.
    """
    async with await psycopg.AsyncConnection.connect(conninfo, connect_timeout=5) as connection:
        await connection.execute(QUERIES["install_lock"])
        row = await (await connection.execute(QUERIES["schema_exists"])).fetchone()
        if row == (True,):
            return False
        await connection.execute((_HERE / "sweeper.install.sql").read_bytes())
        return True
