"""Fenced transactions as a worker sees them: how each ends, and what the server has afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import psycopg
import pytest

from node_agent.postgres.backend import Databases, FenceClosed
from node_agent.postgres.fence import FenceRaiser, FenceUnavailable
from node_agent.postgres.install import install
from registry.errors import Fenced, UnknownOutcome
from tests.support.postgres import Clusters, TestDatabase, eventually

pytestmark = pytest.mark.slow


@pytest.fixture
async def app(postgres: TestDatabase) -> TestDatabase:
    """A database with schema herd and a table to write to."""
    await install(postgres.conninfo, "test")
    postgres.execute("create table effect (token text unique deferrable initially deferred)")
    return postgres


@pytest.fixture
async def raiser(app: TestDatabase) -> AsyncIterator[FenceRaiser]:
    raiser = FenceRaiser({"app": app.conninfo})
    await raiser.raise_fence("app", "sweeper", 10, 1, node="alpha", timeout=10)
    yield raiser
    await raiser.close()


@pytest.fixture
async def owner(app: TestDatabase, raiser: FenceRaiser) -> AsyncIterator[Databases]:
    """What the process with token 10.1 has."""
    databases = Databases({"app": app.conninfo}, "sweeper", 10, 1)
    yield databases
    await databases.close()


async def supersede(raiser: FenceRaiser) -> None:
    await raiser.raise_fence("app", "sweeper", 11, 1, node="beta", timeout=10)


async def test_the_owner_commits(app: TestDatabase, owner: Databases) -> None:
    async with owner.backend("app") as tx:
        inserted = await tx.execute("insert into effect values (%s), (%s)", ["a", "b"])
        assert inserted.rowcount == 2
        assert await tx.fetch_one("select count(*) from effect") == (2,)
        assert await tx.fetch_all("select token from effect order by 1") == [("a",), ("b",)]
    assert app.execute("select count(*) from effect") == [(2,)]


async def test_an_exception_rolls_back_and_the_connection_is_used_again(
    app: TestDatabase, owner: Databases
) -> None:
    pids = []

    async def work() -> None:
        async with owner.backend("app") as tx:
            pids.append(await tx.fetch_one("select pg_backend_pid()"))
            await tx.execute("insert into effect values ('a')")
            raise KeyError("the daemon's own")

    with pytest.raises(KeyError):
        await work()
    async with owner.backend("app") as tx:
        pids.append(await tx.fetch_one("select pg_backend_pid()"))
    assert app.execute("select * from effect") == []
    assert pids[0] == pids[1]


async def test_a_superseded_owner_is_refused_at_the_start(
    app: TestDatabase, owner: Databases, raiser: FenceRaiser
) -> None:
    await supersede(raiser)
    with pytest.raises(Fenced, match=r"epoch 10\.1 is superseded by epoch 11\.1") as error:
        async with owner.backend("app"):
            pytest.fail("the block of a superseded owner must not run")
    assert error.value.details["superseded_by"] == "11.1"
    assert error.value.hint


async def test_an_owner_superseded_inside_its_transaction_does_not_commit(
    app: TestDatabase, owner: Databases, raiser: FenceRaiser
) -> None:
    async def work() -> None:
        async with owner.backend("app") as tx:
            await tx.execute("insert into effect values ('a')")
            await supersede(raiser)
            await tx.execute("insert into effect values ('b')")

    with pytest.raises(Fenced, match=r"epoch 10\.1 is superseded by epoch 11\.1"):
        await work()
    assert app.execute("select * from effect") == []


async def test_an_owner_superseded_before_its_commit_does_not_commit(
    app: TestDatabase, owner: Databases, raiser: FenceRaiser
) -> None:
    async def work() -> None:
        async with owner.backend("app") as tx:
            await tx.execute("insert into effect values ('a')")
            await supersede(raiser)

    with pytest.raises(Fenced, match=r"epoch 10\.1 is superseded by epoch 11\.1"):
        await work()
    assert app.execute("select * from effect") == []


async def test_a_session_ended_by_an_administrator_is_not_taken_for_a_takeover(
    app: TestDatabase, owner: Databases
) -> None:
    async def work() -> None:
        async with owner.backend("app") as tx:
            await tx.execute("select pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(psycopg.errors.AdminShutdown):
        await work()
    async with owner.backend("app") as tx:
        await tx.execute("insert into effect values ('a')")


async def test_a_takeover_ends_idle_connections_of_the_old_owner(
    app: TestDatabase, owner: Databases, raiser: FenceRaiser
) -> None:
    async with owner.backend("app") as tx:
        pid = await tx.fetch_one("select pg_backend_pid()")
    raised = await raiser.raise_fence("app", "sweeper", 11, 1, node="beta", timeout=10)
    assert pid is not None
    assert [text.split()[1] for text in raised.ended] == [str(pid[0])]


async def test_connections_call_themselves_after_their_token(owner: Databases) -> None:
    async with owner.backend("app") as tx:
        assert await tx.fetch_one("show application_name") == ("herd:10.1:sweeper",)
        assert await tx.fetch_one("show herd.token") == ("10.1:sweeper",)


async def test_statements_and_pauses_are_limited_below_the_lease(app: TestDatabase, owner: Databases) -> None:
    async with owner.backend("app") as tx:
        assert await tx.fetch_one("show statement_timeout") == ("4s",)
        assert await tx.fetch_one("show idle_in_transaction_session_timeout") == ("4s",)
    other = Databases({"app": app.conninfo}, "sweeper", 10, 1, ttl=10, idle_timeout=0.05)

    async def work() -> None:
        async with other.backend("app") as tx:
            assert await tx.fetch_one("show statement_timeout") == ("8s",)
            pid = await tx.fetch_one("select pg_backend_pid()")
            assert pid is not None
            await eventually(lambda: not app.execute("select 1 from pg_stat_activity where pid = %s", pid[0]))
            await tx.execute("select 1")

    with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
        await work()
    await other.close()


async def test_a_savepoint_rolled_back_inside_keeps_the_fence(app: TestDatabase, owner: Databases) -> None:
    async with owner.backend("app") as tx:
        await tx.execute("savepoint s")
        await tx.execute("insert into effect values ('undone')")
        await tx.execute("rollback to savepoint s")
        await tx.execute("insert into effect values ('kept')")
        assert await tx.fetch_one("show herd.token") == ("10.1:sweeper",)
    assert app.execute("select token from effect") == [("kept",)]


async def test_transactions_do_not_nest(app: TestDatabase, owner: Databases) -> None:
    async with owner.backend("app") as tx:
        with pytest.raises(RuntimeError, match="fenced transactions do not nest"):
            async with owner.backend("app"):
                pass
        await tx.execute("insert into effect values ('outer')")
    async with owner.backend("app") as tx:
        assert await tx.fetch_one("select count(*) from effect") == (1,)


async def test_transactions_of_several_tasks_run_side_by_side(app: TestDatabase, owner: Databases) -> None:
    async def write(token: str) -> None:
        async with owner.backend("app") as tx:
            await tx.execute("insert into effect values (%s)", [token])

    await asyncio.gather(*(write(str(number)) for number in range(12)))
    assert app.execute("select count(*) from effect") == [(12,)]
    assert (
        len(app.execute("select 1 from pg_stat_activity where application_name = 'herd:10.1:sweeper'")) <= 4
    )


@pytest.mark.parametrize("statement", ["commit", "rollback", "insert into effect values ('b'); commit"])
async def test_a_transaction_ended_by_hand_is_an_error(
    app: TestDatabase, owner: Databases, statement: str
) -> None:
    with pytest.raises(RuntimeError, match="only leaving its block ends it"):
        async with owner.backend("app") as tx:
            await tx.execute(statement.encode())


async def test_a_transaction_is_not_usable_after_its_block(owner: Databases) -> None:
    async with owner.backend("app") as tx:
        pass
    with pytest.raises(RuntimeError, match="has ended"):
        await tx.execute("select 1")


async def test_an_error_that_was_swallowed_does_not_commit(app: TestDatabase, owner: Databases) -> None:
    async def work() -> None:
        async with owner.backend("app") as tx:
            await tx.execute("insert into effect values ('a')")
            with pytest.raises(psycopg.errors.DivisionByZero):
                await tx.execute("select 1/0")

    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        await work()
    assert app.execute("select * from effect") == []


async def test_an_error_of_the_commit_itself_is_passed_on(app: TestDatabase, owner: Databases) -> None:
    with pytest.raises(psycopg.errors.UniqueViolation):
        async with owner.backend("app") as tx:
            await tx.execute("insert into effect values ('a'), ('a')")
    assert app.execute("select * from effect") == []
    async with owner.backend("app") as tx:
        await tx.execute("insert into effect values ('a')")


async def test_a_write_conflict_of_the_daemon_itself_is_not_taken_for_a_takeover(
    app: TestDatabase, owner: Databases
) -> None:
    app.execute("insert into effect values ('a'), ('b')")
    async with owner.backend("app") as warm:
        await warm.execute("select 1")

    async def swap(mine: str, other: str, read: asyncio.Event, go: asyncio.Event) -> None:
        async with owner.backend("app", isolation="serializable") as tx:
            await tx.fetch_all("select * from effect where token like %s", [f"{other}%"])
            read.set()
            await go.wait()
            await tx.execute("update effect set token = token || '!' where token = %s", [mine])

    first, second = asyncio.Event(), asyncio.Event()
    results = await asyncio.gather(
        swap("a", "b", first, second), swap("b", "a", second, first), return_exceptions=True
    )
    assert [type(result) for result in results if result is not None] == [psycopg.errors.SerializationFailure]


async def test_a_takeover_under_an_older_snapshot_is_fenced_not_a_conflict_to_repeat(
    app: TestDatabase, raiser: FenceRaiser
) -> None:
    """The old owner's session is not found by the raise, so only the row itself refuses it: 40001."""
    old = Databases({"app": app.conninfo}, "sweeper", 10, 1)

    async def work() -> None:
        async with old.backend("app", isolation="repeatable read") as tx:
            # Gives up the lock that the fence took: what a rollback to a savepoint before it would do.
            await tx.execute("rollback; begin isolation level repeatable read")
            await tx.fetch_one("select count(*) from effect")
            app.execute("select herd.raise_intent('sweeper', 11, 1, 'beta')")
            app.execute("select herd.raise_fence('sweeper', 11, 1, 'beta')")

    with pytest.raises(Fenced, match=r"superseded by epoch 11\.1"):
        await work()
    await old.close()


async def test_a_protected_table_refuses_with_the_same_error(app: TestDatabase, owner: Databases) -> None:
    app.execute("select herd.protect('effect', 'ticker')")
    with pytest.raises(FenceClosed, match=r"only the owner of ticker may write table public\.effect"):
        async with owner.backend("app") as tx:
            await tx.execute("insert into effect values ('a')")


async def test_a_fence_closed_by_a_promotion_does_not_make_its_owner_superseded(
    app: TestDatabase, owner: Databases, raiser: FenceRaiser
) -> None:
    app.execute("update herd.fences set timeline = 7")

    with pytest.raises(FenceClosed, match="It was raised on timeline 7, this server writes on timeline 1"):
        async with owner.backend("app"):
            pass

    await raiser.raise_fence("app", "sweeper", 10, 1, node="alpha", timeout=10)
    async with owner.backend("app"):
        pass


async def test_reading_does_not_hold_up_a_takeover(
    app: TestDatabase, owner: Databases, raiser: FenceRaiser
) -> None:
    async with owner.backend("app", read_only=True) as tx:
        assert await tx.fetch_all("select * from effect") == []
        raised = await raiser.raise_fence("app", "sweeper", 10, 1, node="alpha", timeout=10)
        assert raised.ended == ()
        app.execute("select herd.raise_intent('sweeper', 11, 1, 'beta')")
        app.execute("select herd.raise_fence('sweeper', 11, 1, 'beta')")
        assert await tx.fetch_one("select 1") == (1,)


async def test_reading_transactions_cannot_write(app: TestDatabase, owner: Databases) -> None:
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        async with owner.backend("app", read_only=True) as tx:
            await tx.execute("insert into effect values ('a')")


async def test_a_superseded_owner_may_not_read_either(owner: Databases, raiser: FenceRaiser) -> None:
    await supersede(raiser)
    with pytest.raises(Fenced):
        async with owner.backend("app", read_only=True):
            pass


async def test_an_unknown_database_is_named(owner: Databases) -> None:
    with pytest.raises(LookupError, match="no database 'crm' here, only app"):
        async with owner.backend("crm"):
            pass


async def test_an_unreachable_server_is_reported_at_once_with_its_reason(app: TestDatabase) -> None:
    databases = Databases({"app": f"{app.conninfo} port=1"}, "sweeper", 10, 1)
    with pytest.raises(FenceUnavailable, match="database app cannot be reached: "):
        async with databases.backend("app"):
            pass


async def test_a_missing_schema_is_named_with_its_remedy(postgres: TestDatabase) -> None:
    databases = Databases({"app": postgres.conninfo}, "sweeper", 10, 1)
    with pytest.raises(FenceUnavailable, match="no schema herd") as error:
        async with databases.backend("app"):
            pass
    assert error.value.hint == "pgherd sql install app"


async def test_connections_that_died_meanwhile_are_replaced(app: TestDatabase, owner: Databases) -> None:
    async def open_one(tx_open: asyncio.Event, go: asyncio.Event) -> None:
        async with owner.backend("app"):
            tx_open.set()
            await go.wait()

    go = asyncio.Event()
    opened = [asyncio.Event() for _ in range(3)]
    async with asyncio.TaskGroup() as group:
        for event in opened:
            group.create_task(open_one(event, go))
        for event in opened:
            await event.wait()
        go.set()
    app.execute(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity where application_name like 'herd:%'"
    )

    async with owner.backend("app") as tx:
        await tx.execute("insert into effect values ('a')")
    assert app.execute("select * from effect") == [("a",)]


async def test_a_cancelled_task_leaves_no_open_transaction(app: TestDatabase, owner: Databases) -> None:
    async def wait_in_the_server() -> None:
        async with owner.backend("app") as tx:
            await tx.execute("insert into effect values ('a')")
            await tx.execute("select pg_sleep(60)")

    waiting = asyncio.ensure_future(wait_in_the_server())
    sleeping = "select 1 from pg_stat_activity where wait_event = 'PgSleep'"
    await eventually(lambda: bool(app.execute(sleeping)))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert app.execute("select 1 from pg_stat_activity where state like 'idle in transaction%%' "
                       "and datname = current_database()") == []  # fmt: skip
    assert app.execute("select * from effect") == []


async def test_a_server_that_stops_during_commit_leaves_an_unknown_outcome(pg_cluster: Clusters) -> None:
    """The commit waits for a synchronous standby that is not there, and the client gives up."""
    server = await pg_cluster.primary()
    app = TestDatabase(server, "postgres")
    await install(app.conninfo, "test")
    app.execute("create table effect (token text)")
    raiser = FenceRaiser({"app": app.conninfo})
    await raiser.raise_fence("app", "sweeper", 10, 1, node="alpha", timeout=10)
    await raiser.close()
    owner = Databases({"app": app.conninfo}, "sweeper", 10, 1)

    async def work() -> None:
        async with owner.backend("app", timeout=1.0) as tx:
            await tx.execute("insert into effect values ('a')")
            app.execute("alter system set synchronous_standby_names = 'nobody'")
            app.execute("select pg_reload_conf()")
            await eventually(lambda: app.execute("show synchronous_standby_names") == [("nobody",)])

    with pytest.raises(UnknownOutcome, match="broke during COMMIT") as error:
        await work()

    assert error.value.details == {"database": "app", "name": "sweeper", "epoch": "10", "start": "1"}
    app.execute("alter system reset synchronous_standby_names")
    app.execute("select pg_reload_conf()")
    await eventually(lambda: app.execute("select token from effect") == [("a",)])
    await owner.close()


async def test_a_server_that_hangs_before_commit_has_certainly_not_committed(pg_cluster: Clusters) -> None:
    server = await pg_cluster.primary()
    app = TestDatabase(server, "postgres")
    await install(app.conninfo, "test")
    raiser = FenceRaiser({"app": app.conninfo})
    await raiser.raise_fence("app", "sweeper", 10, 1, node="alpha", timeout=10)
    await raiser.close()
    owner = Databases({"app": app.conninfo}, "sweeper", 10, 1)
    stopped: list[int] = []

    async def work() -> None:
        async with owner.backend("app", timeout=0.5) as tx:
            row = await tx.fetch_one("select pg_backend_pid()")
            assert row is not None
            stopped.append(row[0])
            os.kill(row[0], signal.SIGSTOP)

    with pytest.raises(psycopg.OperationalError):
        await work()
    os.kill(stopped[0], signal.SIGCONT)
    await owner.close()
