"""A superseded owner that does not know it: holds an old token, and goes on writing.

    python -m node_agent.sandbox.zombie CONNINFO NAME EPOCH START

A plain process with plain psycopg, outside of every warden.  It opens one fenced transaction and prints
``open``; when told on standard input that the takeover is over, it tries to finish that transaction, then to
begin another, and prints what PostgreSQL answers to each: one JSON object a line.
"""

from __future__ import annotations

import json
import sys

import psycopg

FENCE = "select herd.fence(%s, %s, %s)"
WRITE = "update herd_sweeper.policy set keep = keep"


def main(conninfo: str, name: str, epoch: int, start: int) -> None:
    """Be the zombie."""
    before = psycopg.connect(conninfo)
    before.execute(FENCE, (name, epoch, start))
    _say("open")
    sys.stdin.readline()
    _say(_end_of_open(before))
    after = psycopg.connect(conninfo)
    _say(_begun_after(after, name, epoch, start))


def _end_of_open(connection: psycopg.Connection) -> str:
    """Write in the transaction that was open before the takeover, and commit it."""
    try:
        connection.execute(WRITE)
        connection.commit()
    except psycopg.Error as error:
        return _words(error)
    return "committed"


def _begun_after(connection: psycopg.Connection, name: str, epoch: int, start: int) -> str:
    """Begin a transaction with the old token, as its code would have done without a pause."""
    try:
        connection.execute(FENCE, (name, epoch, start))
        connection.execute(WRITE)
        connection.commit()
    except psycopg.Error as error:
        return _words(error)
    return "committed"


def _words(error: psycopg.Error) -> str:
    """Return PostgreSQL's own line, as psql shows it with VERBOSITY verbose."""
    state = error.sqlstate or (
        "57P01" if "terminating connection due to administrator command" in str(error) else "08006"
    )
    return f"ERROR:  {state}: {str(error).splitlines()[0]}"


def _say(what: str) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
