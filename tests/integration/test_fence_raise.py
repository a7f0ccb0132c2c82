"""Raising a fence: which sessions it ends, how long it may take, and what it says when it cannot be done."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing

import psycopg
import pytest

from node_agent.postgres.fence import FenceRaiser, FenceUnavailable, application_name, raise_fence
from node_agent.postgres.install import install
from registry.errors import Fenced
from tests.support.postgres import Clusters, TestDatabase, eventually, promote

pytestmark = pytest.mark.slow


@pytest.fixture
async def app(postgres: TestDatabase) -> TestDatabase:
    """A database with schema herd."""
    await install(postgres.conninfo, "test")
    return postgres


@pytest.fixture
async def raiser(app: TestDatabase) -> AsyncIterator[FenceRaiser]:
    raiser = FenceRaiser({"app": app.conninfo})
    yield raiser
    await raiser.close()


@pytest.fixture
def sessions() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def raise_to(
    raiser: FenceRaiser, name: str, epoch: int, start: int = 1, timeout: float = 10.0
) -> tuple[str, ...]:
    return (await raiser.raise_fence("app", name, epoch, start, node="alpha", timeout=timeout)).ended


def calling_itself(app: TestDatabase, name: str) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(f"{app.conninfo} application_name='{name}'", autocommit=True)


def alive(connection: psycopg.Connection[tuple[object, ...]]) -> bool:
    try:
        connection.execute("select 1")
    except psycopg.OperationalError:
        return False
    return True


async def test_sessions_of_plain_commands_end_with_their_token(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack
) -> None:
    await raise_to(raiser, "ticker", 10, 2)
    kept = {
        tag: sessions.enter_context(closing(calling_itself(app, tag)))
        for tag in ("herd:11.3:ticker", "herd:9.1:ticker2", "herd:9.1:tick", "herd:x.1:ticker", "ticker")
    }
    gone = {
        tag: sessions.enter_context(closing(calling_itself(app, tag)))
        for tag in ("herd:10.2:ticker", "herd:11.2:ticker", "herd:9.99:ticker")
    }

    ended = await raise_to(raiser, "ticker", 11, 3)

    assert sorted(text.split("(")[1].split(",")[0] for text in ended) == sorted(gone)
    assert [tag for tag, session in kept.items() if not alive(session)] == []
    assert [tag for tag, session in gone.items() if alive(session)] == []


async def test_a_name_cut_by_postgresql_is_not_taken_for_another_one(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack
) -> None:
    long = "a-name-so-long-that-postgresql-cuts-it-off-somewhere-here"
    first, second = f"{long}-first", f"{long}-second"
    assert application_name(first, 10, 1) == application_name(second, 10, 1)
    await raise_to(raiser, first, 10, 1)
    await raise_to(raiser, second, 12, 1)
    session = sessions.enter_context(closing(calling_itself(app, application_name(first, 10, 1))))

    await raise_to(raiser, second, 13, 1)
    assert alive(session)

    await raise_to(raiser, first, 14, 1)
    assert not alive(session)


async def test_registered_sessions_end_with_their_token_and_are_forgotten(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack
) -> None:
    await raise_to(raiser, "sweeper", 10)
    idle = sessions.enter_context(closing(app.connect()))
    idle.execute("select herd.register_session('sweeper', 10, 1)")
    other = sessions.enter_context(closing(app.connect()))
    other.execute("select herd.register_session('other', 1, 1)")

    assert len(await raise_to(raiser, "sweeper", 11)) == 1
    assert alive(other)
    assert not alive(idle)

    await raise_to(raiser, "sweeper", 12)
    assert app.execute("select name from herd.sessions") == [("other",)]


async def test_a_superseded_token_cannot_register_a_session(app: TestDatabase, raiser: FenceRaiser) -> None:
    await raise_to(raiser, "sweeper", 11)
    with pytest.raises(psycopg.Error, match=r"superseded by epoch 11\.1"):
        app.execute("select herd.register_session('sweeper', 10, 1)")


async def test_a_session_with_a_reused_pid_is_left_alone(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack
) -> None:
    innocent = sessions.enter_context(closing(app.connect()))
    app.execute(
        "insert into herd.sessions values (%s, now() - interval '1 day', 'sweeper', 9, 1)",
        innocent.info.backend_pid,
    )
    assert await raise_to(raiser, "sweeper", 10) == ()
    assert alive(innocent)


async def test_a_raise_on_a_kept_connection_takes_milliseconds(raiser: FenceRaiser) -> None:
    await raise_to(raiser, "sweeper", 10)
    took = [
        (await raiser.raise_fence("app", "sweeper", 10, start, node="a", timeout=5)).milliseconds
        for start in range(2, 12)
    ]
    assert min(took) < 20


async def test_a_kept_connection_that_died_is_replaced(app: TestDatabase, raiser: FenceRaiser) -> None:
    await raise_to(raiser, "sweeper", 10)
    app.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pgherd fence'"
    )
    await raise_to(raiser, "sweeper", 11)


async def test_another_raise_of_the_name_is_waited_for_not_ended(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack
) -> None:
    await raise_to(raiser, "sweeper", 10)
    other = sessions.enter_context(closing(calling_itself(app, "pgherd fence")))
    other.execute("begin")
    other.execute("select from herd.fences where name = 'sweeper' for update")

    with pytest.raises(FenceUnavailable):
        await raise_to(raiser, "sweeper", 11, timeout=0.5)

    other.execute("commit")
    assert await raise_to(raiser, "sweeper", 11) == ()


async def test_a_prepared_transaction_that_holds_the_fence_is_named(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack
) -> None:
    await raise_to(raiser, "sweeper", 10)
    foreign = sessions.enter_context(closing(app.connect()))
    foreign.execute("begin")
    foreign.execute("select from herd.fences for share")
    foreign.execute(f"prepare transaction '{app.name}'".encode())

    with pytest.raises(
        FenceUnavailable, match=f"prepared transaction '{app.name}' of role postgres"
    ) as error:
        await raise_to(raiser, "sweeper", 11, timeout=1.0)
    assert error.value.hint == f"as postgres: ROLLBACK PREPARED '{app.name}'"

    foreign.execute(f"rollback prepared '{app.name}'".encode())
    await raise_to(raiser, "sweeper", 11)


async def test_a_session_that_may_not_be_ended_is_named_with_the_grant_that_is_missing(
    app: TestDatabase, role: str, sessions: ExitStack
) -> None:
    app.execute(f"grant herd_admin to {role}")
    raiser = FenceRaiser({"app": app.as_role(role)})
    try:
        await raise_to(raiser, "sweeper", 10)
        holder = sessions.enter_context(closing(app.connect()))
        holder.execute("begin")
        holder.execute("select herd.fence('sweeper', 10, 1)")

        with pytest.raises(FenceUnavailable, match=f"may not be ended by {role}") as error:
            await raise_to(raiser, "sweeper", 11, timeout=0.5)
        assert error.value.hint == f"grant pg_signal_backend, pg_read_all_stats to {role}"
    finally:
        await raiser.close()


async def test_a_role_without_herd_admin_is_told_what_it_needs(app: TestDatabase, role: str) -> None:
    with pytest.raises(FenceUnavailable, match="permission denied for schema herd") as error:
        await raise_fence(app.as_role(role), "sweeper", 1, 1, node="a", timeout=5)
    assert "grant herd_worker" in error.value.hint


async def test_a_missing_schema_is_named_with_the_command_that_installs_it(postgres: TestDatabase) -> None:
    raiser = FenceRaiser({"app": postgres.conninfo})
    try:
        for _ in range(2):
            with pytest.raises(FenceUnavailable, match="database app has no schema herd") as error:
                await raise_to(raiser, "sweeper", 1)
            assert error.value.hint == "pgherd sql install app"
        await install(postgres.conninfo, "test")
        await raise_to(raiser, "sweeper", 1)
    finally:
        await raiser.close()


async def test_another_version_of_the_schema_is_refused(app: TestDatabase) -> None:
    app.execute("create or replace function herd.version() returns integer language sql immutable return 7")
    with pytest.raises(FenceUnavailable, match="version 7 of schema herd, this pgherd needs 1"):
        await raise_fence(app.conninfo, "sweeper", 1, 1, node="a", timeout=5)


async def test_a_database_of_another_cluster_is_refused(app: TestDatabase) -> None:
    with pytest.raises(FenceUnavailable, match='belongs to cluster "test", not to "staging"'):
        await raise_fence(app.conninfo, "sweeper", 1, 1, node="a", timeout=5, cluster="staging")


async def test_a_database_that_is_not_configured_is_refused(raiser: FenceRaiser) -> None:
    with pytest.raises(FenceUnavailable, match="database crm is not configured") as error:
        await raiser.raise_fence("crm", "sweeper", 1, 1, node="a", timeout=5)
    assert "[database.crm]" in error.value.hint


async def test_an_unreachable_server_is_reported_with_its_reason(app: TestDatabase) -> None:
    nobody = FenceRaiser({"app": f"{app.conninfo} port=1"})
    with pytest.raises(FenceUnavailable, match=r"database app cannot be reached: .*connection"):
        await raise_to(nobody, "sweeper", 1)
    missing = FenceRaiser({"app": app.server.conninfo("nowhere")})
    with pytest.raises(FenceUnavailable, match=r"cannot be reached: .*does not exist"):
        await raise_to(missing, "sweeper", 1)


async def test_a_stopped_server_cannot_hold_a_raise_beyond_its_deadline(pg_cluster: Clusters) -> None:
    server = await pg_cluster.primary()
    await install(server.conninfo(), "test")
    raiser = FenceRaiser({"app": server.conninfo()})
    await raise_to(raiser, "sweeper", 10)
    with closing(psycopg.connect(server.conninfo(), autocommit=True)) as connection:
        found = connection.execute("select pid from pg_stat_activity where application_name = 'pgherd fence'")
        stopped = [int(str(pid)) for (pid,) in found]
    server.send(signal.SIGSTOP)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()

    with pytest.raises(FenceUnavailable):
        await raise_to(raiser, "sweeper", 11, timeout=0.5)

    assert time.monotonic() - began < 3
    server.send(signal.SIGCONT)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    await raise_to(raiser, "sweeper", 11)
    await raiser.close()


async def test_a_commit_that_waits_for_a_synchronous_standby_says_so(pg_cluster: Clusters) -> None:
    server = await pg_cluster.primary()
    await install(server.conninfo(), "test")
    with closing(psycopg.connect(server.conninfo(), autocommit=True)) as connection:
        connection.execute("alter system set synchronous_standby_names = 'nobody'")
        connection.execute("select pg_reload_conf()")
        await eventually(
            lambda: connection.execute("show synchronous_standby_names").fetchone() == ("nobody",)
        )
        raiser = FenceRaiser({"app": server.conninfo()})

        with pytest.raises(FenceUnavailable, match="waits for a synchronous standby"):
            await raise_to(raiser, "sweeper", 10, timeout=1.0)

        connection.execute("alter system reset synchronous_standby_names")
        connection.execute("select pg_reload_conf()")
    await raise_to(raiser, "sweeper", 10)
    await raiser.close()


async def test_a_promotion_closes_every_fence_until_it_is_raised_there(
    pg_cluster: Clusters, sessions: ExitStack
) -> None:
    primary = await pg_cluster.primary()
    await install(primary.conninfo(), "test")
    await raise_fence(primary.conninfo(), "sweeper", 10, 1, node="alpha", timeout=10)
    standby = await pg_cluster.standby(primary)
    old = sessions.enter_context(closing(psycopg.connect(standby.conninfo(), autocommit=True)))
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction, match="this server is a standby"):
        old.execute("select herd.fence('sweeper', 10, 1)")
    with pytest.raises(FenceUnavailable, match="standby") as error:
        await raise_fence(standby.conninfo(), "sweeper", 10, 1, node="alpha", timeout=10)
    assert "target_session_attrs=read-write" in error.value.hint
    await primary.kill()

    await promote(standby)

    with pytest.raises(psycopg.Error, match=r"the fence of epoch 10\.1 is closed") as refused:
        old.execute("select herd.fence('sweeper', 10, 1)")
    assert refused.value.sqlstate == "PH001"
    assert (
        refused.value.diag.message_detail == "It was raised on timeline 1, this server writes on timeline 2."
    )

    asked: list[bool] = []

    async def confirm() -> bool:
        asked.append(len(asked) > 0)
        return asked[-1]

    raiser = FenceRaiser({"app": standby.conninfo()})
    token = ("app", "sweeper", 10, 1)
    with pytest.raises(FenceUnavailable, match="etcd does not confirm that epoch 10 still owns sweeper"):
        await raiser.raise_fence(*token, node="alpha", timeout=10, confirm=confirm)
    await raiser.raise_fence(*token, node="alpha", timeout=10, confirm=confirm)
    await raiser.raise_fence(*token, node="alpha", timeout=10, confirm=confirm)
    await raiser.close()
    assert asked == [False, True], "asked only while the fence stands on another timeline"
    old.execute("begin; select herd.fence('sweeper', 10, 1); commit")


async def test_an_owner_that_was_not_superseded_on_the_old_primary_is_refused_by_the_new_one(
    pg_cluster: Clusters, sessions: ExitStack
) -> None:
    """The raise to 11 did not reach the standby: the failover forgets it, and must not revive 10."""
    primary = await pg_cluster.primary()
    await install(primary.conninfo(), "test")
    await raise_fence(primary.conninfo(), "sweeper", 10, 1, node="alpha", timeout=10)
    standby = await pg_cluster.standby(primary)
    old = sessions.enter_context(closing(psycopg.connect(standby.conninfo(), autocommit=True)))
    old.execute("alter system set primary_conninfo = ''")
    old.execute("select pg_reload_conf()")
    await eventually(lambda: old.execute("select from pg_stat_wal_receiver").rowcount == 0)
    await raise_fence(primary.conninfo(), "sweeper", 11, 1, node="beta", timeout=10)
    await primary.kill()
    await promote(standby)

    with pytest.raises(psycopg.Error, match="is closed"):
        old.execute("select herd.fence('sweeper', 10, 1)")
    await raise_fence(standby.conninfo(), "sweeper", 11, 1, node="beta", timeout=10)
    with pytest.raises(psycopg.Error, match=r"superseded by epoch 11\.1"):
        old.execute("select herd.fence('sweeper', 10, 1)")


async def test_a_lower_token_cannot_be_raised(raiser: FenceRaiser) -> None:
    await raise_to(raiser, "sweeper", 11)
    with pytest.raises(Fenced) as error:
        await raise_to(raiser, "sweeper", 10, 9)
    assert error.value.details["superseded_by"] == "11.1"
