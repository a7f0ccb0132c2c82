"""Who may commit: the orderings of an old owner's transaction and the raise of its successor."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing

import psycopg
import pytest
from psycopg import errors

from node_agent.postgres.fence import FenceRaiser
from node_agent.postgres.install import install
from registry.errors import Fenced
from tests.support.postgres import TestDatabase, eventually

pytestmark = pytest.mark.slow

ISOLATIONS = ("read committed", "repeatable read")


@pytest.fixture
async def app(postgres: TestDatabase) -> TestDatabase:
    """A database with schema herd and a table to write to."""
    await install(postgres.conninfo, "test")
    postgres.execute("create table effect (token text)")
    return postgres


@pytest.fixture
async def raiser(app: TestDatabase) -> AsyncIterator[FenceRaiser]:
    raiser = FenceRaiser({"app": app.conninfo}, cluster="test")
    yield raiser
    await raiser.close()


@pytest.fixture
def sessions() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def raise_to(raiser: FenceRaiser, epoch: int, start: int = 1, timeout: float = 10.0) -> tuple[str, ...]:
    return (await raiser.raise_fence("app", "sweeper", epoch, start, node="alpha", timeout=timeout)).ended


def begin(
    connection: psycopg.Connection[tuple[object, ...]],
    epoch: int,
    start: int = 1,
    isolation: str = "read committed",
) -> None:
    """Open a fenced transaction by hand, as a program without our library would."""
    connection.execute(f"begin isolation level {isolation}".encode())
    connection.execute("select herd.fence('sweeper', %s, %s)", (epoch, start))


def write(connection: psycopg.Connection[tuple[object, ...]], token: str) -> None:
    connection.execute("insert into effect values (%s)", [token])


@pytest.mark.parametrize("isolation", ISOLATIONS)
async def test_an_open_transaction_of_the_old_owner_cannot_commit_after_the_raise(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack, isolation: str
) -> None:
    await raise_to(raiser, 10)
    old = sessions.enter_context(closing(app.connect()))
    begin(old, 10, isolation=isolation)
    write(old, "10.1")
    pid = old.info.backend_pid

    ended = await raise_to(raiser, 11)

    assert [text.split()[1] for text in ended] == [str(pid)]
    with pytest.raises(psycopg.OperationalError):
        old.execute("commit")
    assert app.execute("select * from effect") == []


@pytest.mark.parametrize("isolation", ISOLATIONS)
async def test_a_transaction_begun_after_the_raise_is_refused(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack, isolation: str
) -> None:
    await raise_to(raiser, 10)
    await raise_to(raiser, 11)
    old = sessions.enter_context(closing(app.connect()))

    with pytest.raises(psycopg.Error, match=r"sweeper: epoch 10\.1 is superseded by epoch 11\.1") as refused:
        begin(old, 10, isolation=isolation)

    assert refused.value.sqlstate == "PH001"
    assert (
        refused.value.diag.message_detail
        == "Nothing of this transaction is committed; the owner is on node alpha."
    )
    assert refused.value.diag.message_hint


@pytest.mark.parametrize(
    ("isolation", "sqlstate"), [("read committed", "PH001"), ("repeatable read", "40001")]
)
async def test_a_snapshot_from_before_the_raise_does_not_pass_the_fence(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack, isolation: str, sqlstate: str
) -> None:
    await raise_to(raiser, 10)
    old = sessions.enter_context(closing(app.connect()))
    old.execute(f"begin isolation level {isolation}".encode())
    old.execute("select count(*) from effect")

    await raise_to(raiser, 11)

    with pytest.raises(psycopg.Error) as refused:
        old.execute("select herd.fence('sweeper', 10, 1)")
    assert refused.value.sqlstate == sqlstate


@pytest.mark.parametrize(
    ("isolation", "sqlstate"), [("read committed", "PH001"), ("repeatable read", "40001")]
)
async def test_a_transaction_that_arrives_during_the_raise_does_not_pass_the_fence(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack, isolation: str, sqlstate: str
) -> None:
    await raise_to(raiser, 10)
    old, new = (sessions.enter_context(closing(app.connect())) for _ in range(2))
    old.execute(f"begin isolation level {isolation}".encode())
    old.execute("select count(*) from effect")
    new.execute("select herd.raise_intent('sweeper', 11, 1, 'beta')")
    new.execute("begin")
    new.execute("select herd.raise_fence('sweeper', 11, 1, 'beta')")
    refusals: list[str | None] = []

    def arrive() -> None:
        try:
            old.execute("select herd.fence('sweeper', 10, 1)")
        except psycopg.Error as error:
            refusals.append(error.sqlstate)

    arriving = threading.Thread(target=arrive)
    arriving.start()
    waits = "select 1 from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
    await eventually(lambda: bool(refusals or app.execute(waits, old.info.backend_pid)))
    new.execute("commit")
    arriving.join()

    assert refusals == [sqlstate]


async def test_a_waiting_raise_refuses_new_transactions_of_the_old_owner_at_once(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack
) -> None:
    await raise_to(raiser, 10)
    holder, newcomer, new = (sessions.enter_context(closing(app.connect())) for _ in range(3))
    begin(holder, 10)
    new.execute("select herd.raise_intent('sweeper', 11, 1, 'beta')")

    with pytest.raises(psycopg.Error, match=r"superseded by epoch 11\.1"):
        begin(newcomer, 10)

    write(holder, "10.1")
    holder.execute("commit")
    assert app.execute("select token from effect") == [("10.1",)], (
        "before the raise is complete it may commit"
    )


async def test_the_next_process_of_the_same_owner_supersedes_the_one_before(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack
) -> None:
    await raise_to(raiser, 10, 1)
    dead = sessions.enter_context(closing(app.connect()))
    begin(dead, 10, 1)

    await raise_to(raiser, 10, 2)

    with pytest.raises(psycopg.OperationalError):
        dead.execute("commit")
    with pytest.raises(Fenced, match=r"epoch 10\.1 is superseded by epoch 10\.2"):
        await raise_to(raiser, 10, 1)


async def test_continuous_overlapping_transactions_cannot_hold_up_a_raise(
    app: TestDatabase, raiser: FenceRaiser
) -> None:
    await raise_to(raiser, 10)
    begun, stop = threading.Barrier(5), threading.Event()

    def old_owner() -> None:
        waited = False
        while not stop.is_set():
            with closing(app.connect()) as connection:
                try:
                    begin(connection, 10)
                    if not waited:
                        begun.wait()
                        waited = True
                    connection.execute("select pg_sleep(0.05)")
                    write(connection, "10.1")
                    connection.execute("commit")
                except psycopg.Error:
                    continue

    owners = [threading.Thread(target=old_owner) for _ in range(4)]
    for owner in owners:
        owner.start()
    try:
        begun.wait()
        raised = await raiser.raise_fence("app", "sweeper", 11, 1, node="beta", timeout=10)
        before = app.execute("select count(*) from effect")
        with closing(app.connect()) as new:
            for _ in range(20):
                begin(new, 11)
                new.execute("commit")
    finally:
        stop.set()
        for owner in owners:
            owner.join()

    assert raised.milliseconds < 5000
    assert app.execute("select count(*) from effect") == before


async def test_a_transaction_of_the_present_owner_survives_a_repeated_raise(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack
) -> None:
    await raise_to(raiser, 10)
    owner = sessions.enter_context(closing(app.connect()))
    begin(owner, 10)
    write(owner, "10.1")

    assert await raise_to(raiser, 10) == ()

    owner.execute("select herd.assert_fence('sweeper', 10, 1)")
    owner.execute("commit")
    assert app.execute("select token from effect") == [("10.1",)]


async def test_names_are_fenced_apart(app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack) -> None:
    await raise_to(raiser, 10)
    owner = sessions.enter_context(closing(app.connect()))
    begin(owner, 10)

    await raiser.raise_fence("app", "ticker", 11, 1, node="alpha", timeout=10)

    owner.execute("commit")


async def test_a_savepoint_rolled_back_over_the_fence_is_caught_before_commit(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack
) -> None:
    await raise_to(raiser, 10)
    old, new = (sessions.enter_context(closing(app.connect())) for _ in range(2))
    old.execute("begin; savepoint s")
    old.execute("select herd.fence('sweeper', 10, 1)")
    old.execute("rollback to savepoint s")
    assert old.execute("select current_setting('herd.token', true)").fetchone() in [("",), (None,)]
    write(old, "10.1")
    new.execute("select herd.raise_intent('sweeper', 11, 1, 'beta')")
    new.execute("select herd.raise_fence('sweeper', 11, 1, 'beta')")

    with pytest.raises(psycopg.Error, match=r"superseded by epoch 11\.1"):
        old.execute("select herd.assert_fence('sweeper', 10, 1)")


async def test_a_fenced_transaction_cannot_be_prepared(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack
) -> None:
    await raise_to(raiser, 10)
    owner = sessions.enter_context(closing(app.connect()))
    for _ in range(2):
        begin(owner, 10)
        with pytest.raises(errors.FeatureNotSupported):
            owner.execute("prepare transaction 'zombie'")
        owner.execute("rollback")
    owner.execute("begin")
    write(owner, "not fenced")
    owner.execute(f"prepare transaction '{app.name}'".encode())
    owner.execute(f"rollback prepared '{app.name}'".encode())


async def test_one_transaction_works_for_one_name(
    app: TestDatabase, raiser: FenceRaiser, sessions: ExitStack
) -> None:
    for name in ("sweeper", "ticker"):
        await raiser.raise_fence("app", name, 10, 1, node="alpha", timeout=10)
    owner = sessions.enter_context(closing(app.connect()))
    begin(owner, 10)
    begin_again = "select herd.fence('sweeper', 10, 1)"
    owner.execute(begin_again)

    with pytest.raises(errors.InvalidParameterValue, match=r"already fenced as 10\.1:sweeper"):
        owner.execute("select herd.fence('ticker', 10, 1)")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("'nobody', 1, 1", 'no fence was ever raised in database "{database}"'),
        ("'sweeper', 12, 1", r"epoch 12\.1 is not raised, the fence is at epoch 10\.1"),
        ("'sweeper', null, null", "the fence is at epoch"),
        ("null, 10, 1", "no fence was ever raised"),
    ],
)
async def test_only_the_raised_token_passes(
    app: TestDatabase, raiser: FenceRaiser, arguments: str, why: str
) -> None:
    await raise_to(raiser, 10)
    with pytest.raises(psycopg.Error, match=why.format(database=app.name)) as refused:
        app.execute(f"select herd.fence({arguments})")
    assert refused.value.sqlstate == "PH001"


async def test_a_worker_may_pass_its_fence_but_not_raise_it_nor_read_others(
    app: TestDatabase, raiser: FenceRaiser, role: str, sessions: ExitStack
) -> None:
    await raise_to(raiser, 10)
    app.execute(f"grant herd_worker to {role}")
    worker = sessions.enter_context(closing(app.connect(role)))
    begin(worker, 10)
    worker.execute("select herd.assert_fence('sweeper', 10, 1); commit")
    for forbidden in (
        "select herd.raise_intent('sweeper', 11, 1, 'me')",
        "select herd.raise_fence('sweeper', 10, 1, 'me')",
        "update herd.fences set epoch = 99",
        "insert into herd.sessions values (1, now(), 'sweeper', 1, 1)",
        "select herd.identify('mine')",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            worker.execute(forbidden.encode())


async def test_a_stranger_has_no_right_in_the_schema(
    app: TestDatabase, role: str, sessions: ExitStack
) -> None:
    stranger = sessions.enter_context(closing(app.connect(role)))
    with pytest.raises(errors.InsufficientPrivilege):
        stranger.execute("select herd.version()")


async def test_an_acknowledged_raise_is_durable_whatever_the_defaults(
    app: TestDatabase, sessions: ExitStack
) -> None:
    connection = sessions.enter_context(closing(app.connect()))
    for default, used in (("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")):
        connection.execute(f"set synchronous_commit = {default}".encode())
        for statement in ("raise_intent('x', 5, 1, 'n')", "raise_fence('x', 5, 1, 'n')"):
            connection.execute("begin")
            connection.execute(f"select herd.{statement}".encode())
            assert connection.execute("show synchronous_commit").fetchone() == (used,)
            connection.execute("commit")


async def test_a_raise_needs_its_intent_committed_first(app: TestDatabase) -> None:
    with pytest.raises(
        errors.ObjectNotInPrerequisiteState, match=r"intent to raise epoch 3\.1 is not committed"
    ):
        app.execute("select herd.raise_fence('sweeper', 3, 1, 'alpha')")


async def test_an_epoch_of_an_older_incarnation_is_superseded(app: TestDatabase, raiser: FenceRaiser) -> None:
    await raise_to(raiser, (2 << 48) | 7)
    for name in ("sweeper", "another"):
        with pytest.raises(Fenced, match="is superseded by epoch"):
            await raiser.raise_fence("app", name, (1 << 48) | 900, 1, node="alpha", timeout=10)
