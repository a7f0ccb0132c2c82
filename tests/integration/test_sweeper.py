"""The sweeper as a real worker process on a real database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from node_agent.daemons import sweeper_schema
from node_agent.postgres.fence import FenceRaiser
from node_agent.postgres.install import install
from node_agent.worker.main import EXIT_SUPERSEDED
from registry.v1 import messages_pb2
from tests.support.postgres import TestDatabase, eventually
from tests.support.worker import Desk, Watched, WorkerProcess

pytestmark = pytest.mark.slow

SWEEPER = "node_agent.daemons.sweeper:Sweeper"
NEVER = 3600.0


@pytest.fixture
async def app(postgres: TestDatabase) -> TestDatabase:
    """A database with the sweeper's tables, and a table with 25 rows of which 20 are a year old."""
    await install(postgres.conninfo, "test")
    assert await sweeper_schema.install(postgres.conninfo)
    postgres.execute("create table history (id serial, at timestamptz not null)")
    postgres.execute("insert into history (at) select now() - interval '1 year' from generate_series(1, 20)")
    postgres.execute("insert into history (at) select now() from generate_series(1, 5)")
    return postgres


@pytest.fixture
async def raiser(app: TestDatabase) -> AsyncIterator[FenceRaiser]:
    raiser = FenceRaiser({"app": app.conninfo})
    yield raiser
    await raiser.close()


async def own(
    desk: Desk, app: TestDatabase, raiser: FenceRaiser, token: tuple[int, int] = (7, 1), every: float = NEVER
) -> tuple[WorkerProcess, Watched]:
    """Raise the fence as an agent does, and start the process."""
    epoch, start = token
    await raiser.raise_fence("app", "sweeper", epoch, start, node="alpha", timeout=10)
    return await desk.ready(
        SWEEPER,
        name="sweeper",
        epoch=epoch,
        start=start,
        args={"database": "app", "every": every},
        databases={"app": app.conninfo},
    )


def keep(app: TestDatabase, relation: str, column: str = "at", batch_size: int = 1000) -> None:
    app.execute(
        "insert into herd_sweeper.policy values (%s, %s, interval '1 day', %s)", relation, column, batch_size
    )


async def status(sweeper: Watched) -> dict[str, Any]:
    answer: dict[str, Any] = await sweeper.call("status")
    return answer


async def had_its_first_round(sweeper: Watched) -> None:
    async def swept_once() -> bool:
        return (await status(sweeper))["last_sweep"] is not None

    await eventually(swept_once)


async def test_deletes_what_is_past_its_age_in_batches_and_accounts_for_each(
    app: TestDatabase, desk: Desk, raiser: FenceRaiser
) -> None:
    _, sweeper = await own(desk, app, raiser)
    await had_its_first_round(sweeper)
    keep(app, "history", batch_size=8)

    assert await sweeper.call("sweep_now") == {"deleted": {"history": 20}, "more": False}

    assert app.execute("select count(*) from history") == [(5,)]
    books = app.execute("select relation, epoch, start, deleted from herd_sweeper.log order by id")
    assert books == [("history", 7, 1, 8), ("history", 7, 1, 8), ("history", 7, 1, 4)]
    now = await status(sweeper)
    assert (now["epoch"], now["deleted"], now["batches"], now["policies"]) == (7, 20, 3, 2)
    assert now["failing"] == {}


def swept(app: TestDatabase) -> int:
    ((total,),) = app.execute("select coalesce(sum(deleted), 0) from herd_sweeper.log")
    return int(str(total))


async def test_sweeps_by_itself(app: TestDatabase, desk: Desk, raiser: FenceRaiser) -> None:
    keep(app, "history")
    await own(desk, app, raiser, every=0.05)
    await eventually(lambda: swept(app) == 20)

    app.execute("insert into history (at) values (now() - interval '1 month')")

    await eventually(lambda: swept(app) == 21)


async def test_a_policy_that_fails_is_reported_alone(
    app: TestDatabase, desk: Desk, raiser: FenceRaiser
) -> None:
    for relation, column in (
        ("gone", "at"),
        ("history", "at"),
        ("herd.fences", "name"),
        ("history; drop table history", "at"),
    ):
        keep(app, relation, column)
    _, sweeper = await own(desk, app, raiser)
    await sweeper.call("sweep_now")

    await eventually(lambda: swept(app) == 20)
    failing = (await status(sweeper))["failing"]
    assert failing.keys() == {"gone", "herd.fences", "history; drop table history"}
    assert failing["gone"] == "table gone does not exist"
    assert failing["herd.fences"] == "table herd.fences has no column name of a date or timestamp type"
    assert app.execute("select count(*) from history") == [(5,)]

    app.execute("create table gone (at date)")
    await sweeper.call("sweep_now")
    assert "gone" not in (await status(sweeper))["failing"]


async def test_names_of_tables_and_columns_are_quoted(
    app: TestDatabase, desk: Desk, raiser: FenceRaiser
) -> None:
    table = '"we ird"."it\'s; --"'
    app.execute('create schema "we ird"')
    app.execute(f'create table {table} ("the ""age""" timestamp)')
    app.execute(f"insert into {table} values ('2001-01-01'), ('2999-01-01')")
    keep(app, table, 'the "age"')
    _, sweeper = await own(desk, app, raiser)

    await sweeper.call("sweep_now")

    await eventually(lambda: app.execute(f"select count(*) from {table}") == [(1,)])
    assert (await status(sweeper))["failing"] == {}


async def test_rows_of_a_partitioned_table_with_the_same_position_are_kept(
    app: TestDatabase, desk: Desk, raiser: FenceRaiser
) -> None:
    app.execute("create table event (at timestamptz) partition by range (at)")
    app.execute("create table event_old partition of event for values from (minvalue) to ('2020-01-01')")
    app.execute("create table event_new partition of event for values from ('2020-01-01') to (maxvalue)")
    app.execute("insert into event select '2001-01-01' from generate_series(1, 10)")
    app.execute("insert into event select now() from generate_series(1, 10)")
    keep(app, "event", batch_size=3)
    _, sweeper = await own(desk, app, raiser)

    await sweeper.call("sweep_now")

    await eventually(lambda: app.execute("select count(*) from event_old") == [(0,)])
    assert app.execute("select count(*) from event_new") == [(10,)]


async def test_a_pause_outlives_the_process(app: TestDatabase, desk: Desk, raiser: FenceRaiser) -> None:
    first, sweeper = await own(desk, app, raiser)
    assert (await sweeper.call("pause"))["paused"] is True
    keep(app, "history")
    first.kill()
    await first.exit_code()

    _, sweeper = await own(desk, app, raiser, (7, 2), every=0.02)
    await sweeper.until_handling(None)
    ticks = (await status(sweeper))["last_sweep"]
    assert ticks is None
    assert swept(app) == 0

    assert (await sweeper.call("resume"))["paused"] is False
    await eventually(lambda: swept(app) == 20)


def has_swept(app: TestDatabase, start: int) -> bool:
    return app.execute("select count(*) > 5 from herd_sweeper.log where start = %s", start) == [(True,)]


async def test_the_books_are_exact_whenever_a_process_is_killed(
    app: TestDatabase, desk: Desk, raiser: FenceRaiser
) -> None:
    app.execute("insert into history (at) select now() - interval '1 year' from generate_series(1, 2000)")
    ((before,),) = app.execute("select count(*) from history")
    keep(app, "history", batch_size=5)
    for start in (1, 2, 3):
        process, _ = await own(desk, app, raiser, (7, start))
        await eventually(partial(has_swept, app, start))
        process.kill()
        await process.exit_code()
        await raiser.raise_fence("app", "sweeper", 7, start + 1, node="alpha", timeout=10)
        ((left,),) = app.execute("select count(*) from history")
        assert swept(app) == int(str(before)) - int(str(left))
    assert app.execute("select distinct start from herd_sweeper.log order by 1") == [(1,), (2,), (3,)]


async def test_a_superseded_sweeper_ends_and_deletes_nothing(
    app: TestDatabase, desk: Desk, raiser: FenceRaiser
) -> None:
    process, sweeper = await own(desk, app, raiser)
    await had_its_first_round(sweeper)
    keep(app, "history")
    await raiser.raise_fence("app", "sweeper", 8, 1, node="beta", timeout=10)

    sweeper.send("sweep_now")

    assert await process.exit_code() == EXIT_SUPERSEDED
    assert swept(app) == 0
    assert app.execute("select count(*) from history") == [(25,)]


async def test_a_closed_fence_ends_the_process_as_a_crash_so_that_it_is_started_and_raised_again(
    app: TestDatabase, desk: Desk, raiser: FenceRaiser
) -> None:
    process, sweeper = await own(desk, app, raiser)
    await had_its_first_round(sweeper)
    keep(app, "history")
    app.execute("update herd.fences set timeline = 7")

    sweeper.send("sweep_now")

    assert await process.exit_code() not in (0, EXIT_SUPERSEDED)
    assert swept(app) == 0


async def test_a_database_without_its_tables_is_reported_and_does_not_end_the_process(
    postgres: TestDatabase, desk: Desk
) -> None:
    await install(postgres.conninfo, "test")
    raiser = FenceRaiser({"app": postgres.conninfo})
    _, sweeper = await own(desk, postgres, raiser, every=0.02)

    async def reported() -> bool:
        return "herd_sweeper" in (await status(sweeper))["failing"].get("", "")

    await eventually(reported)
    answer: messages_pb2.Frame = await sweeper.ask("pause")
    assert "herd_sweeper" in answer.error.message

    assert await sweeper_schema.install(postgres.conninfo)
    assert not await sweeper_schema.install(postgres.conninfo)

    async def well() -> bool:
        return not (await status(sweeper))["failing"]

    await eventually(well)
    await raiser.close()
