"""Installing schema herd: who can, what it leaves behind, and how a copied database is recognised."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

import psycopg
import pytest

from node_agent.postgres.fence import FenceRaiser, FenceUnavailable, raise_fence
from node_agent.postgres.install import InstallFailed, install, status
from registry.cli import main
from registry.errors import Fenced
from tests.support.postgres import Clusters, TestDatabase

pytestmark = pytest.mark.slow

Run: TypeAlias = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pgherd(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; return exit code, output and errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([*map(str, arguments)])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def config(postgres: TestDatabase, tmp_path: Path) -> Path:
    """An agent's configuration with the database as "app"."""
    file = tmp_path / "agent.toml"
    conninfo = postgres.conninfo.replace("\\", "\\\\").replace('"', '\\"')
    file.write_text(
        'schema = 1\ncluster = "test"\nhost = "alpha"\nlease.ttl = "5s"\n'
        f'[database.app]\nconninfo = "{conninfo}"\n'
    )
    return file


@pytest.fixture
def copy(postgres: TestDatabase) -> Iterator[TestDatabase]:
    """An empty database beside the first, to restore into."""
    server = TestDatabase(postgres.server, "postgres")
    server.execute(f"create database {postgres.name}_copy")
    yield TestDatabase(postgres.server, f"{postgres.name}_copy")
    server.execute(f"drop database {postgres.name}_copy with (force)")


def dump_into(copy: TestDatabase, source: TestDatabase) -> None:
    run = source.server.run
    plain = source.server.directory / f"{copy.name}.sql"
    plain.write_text(asyncio.run(run("pg_dump", source.name)))
    asyncio.run(run("psql", "-qX", "-v", "ON_ERROR_STOP=1", "-d", copy.name, "-f", str(plain)))


async def test_an_owner_without_superuser_rights_installs_it_and_raises_fences(
    postgres: TestDatabase, role: str
) -> None:
    await install(postgres.conninfo, "other")
    postgres.execute("drop schema herd cascade")
    postgres.execute(f"grant create on database {postgres.name} to {role}")
    owner = postgres.as_role(role)

    done = await install(owner, "test")

    assert (done.created, done.identity, done.notices) == (True, "new", ())
    assert postgres.execute("select nspowner::regrole::text from pg_namespace where nspname = 'herd'") == [
        (role,)
    ]
    await raise_fence(owner, "sweeper", 1, 1, node="alpha", timeout=10)
    with closing(psycopg.connect(owner)) as connection:
        connection.execute("select herd.fence('sweeper', 1, 1)")
        connection.execute("select herd.assert_fence('sweeper', 1, 1)")
        connection.commit()


async def test_installing_again_changes_nothing(postgres: TestDatabase) -> None:
    await install(postgres.conninfo, "test")
    await raise_fence(postgres.conninfo, "sweeper", 5, 1, node="alpha", timeout=10)
    before = postgres.execute("select * from herd.installation")

    done = await install(postgres.conninfo, "test")

    assert (done.created, done.identity) == (False, "same")
    assert postgres.execute("select * from herd.installation") == before
    with pytest.raises(Fenced):
        await raise_fence(postgres.conninfo, "sweeper", 4, 1, node="alpha", timeout=10)


async def test_installations_at_the_same_time_do_not_disturb_each_other(postgres: TestDatabase) -> None:
    done = await asyncio.gather(*(install(postgres.conninfo, "test") for _ in range(4)))
    assert sorted(each.created for each in done) == [False, False, False, True]


async def test_a_role_that_may_not_create_roles_is_told_which_are_missing(pg_cluster: Clusters) -> None:
    server = await pg_cluster.primary()
    database = TestDatabase(server, "postgres")
    database.execute("create role plain login")
    database.execute("grant create on database postgres to plain")
    owner = database.as_role("plain")

    done = await install(owner, "test")

    assert [text.split()[1] for text in done.notices] == ["herd_worker", "herd_admin"]
    assert "create role herd_worker nologin" in done.notices[0]
    await raise_fence(owner, "sweeper", 1, 1, node="alpha", timeout=10)
    database.execute("create role herd_worker")
    database.execute("create role herd_admin")
    assert (await install(owner, "test")).notices == ()
    assert database.execute("select has_schema_privilege('herd_worker', 'herd', 'usage')") == [(True,)]
    await server.stop()


async def test_a_role_that_may_not_create_the_schema_is_told_what_it_needs(
    postgres: TestDatabase, role: str
) -> None:
    with pytest.raises(InstallFailed, match="permission denied for database") as error:
        await install(postgres.as_role(role), "test")
    assert f"grant create on database {postgres.name} to {role}" in error.value.hint


async def test_a_schema_of_somebody_else_is_left_alone(postgres: TestDatabase) -> None:
    postgres.execute("create schema herd")
    postgres.execute("create table herd.sheep (id int)")
    with pytest.raises(InstallFailed, match="not pgherd's"):
        await install(postgres.conninfo, "test")
    assert postgres.execute("select count(*) from herd.sheep") == [(0,)]


async def test_a_schema_of_another_version_is_left_alone(postgres: TestDatabase) -> None:
    await install(postgres.conninfo, "test")
    postgres.execute(
        "create or replace function herd.version() returns integer language sql immutable return 2"
    )
    with pytest.raises(InstallFailed, match="version 2, this pgherd works with 1"):
        await install(postgres.conninfo, "test")
    assert (await status(postgres.conninfo)).problems == ("version 2, not 1",)


async def test_a_publication_of_all_tables_is_pointed_out(postgres: TestDatabase) -> None:
    postgres.execute("create publication everything for all tables")
    done = await install(postgres.conninfo, "test")
    assert [text for text in done.notices if "everything" in text]


async def test_every_function_has_a_comment_and_none_is_for_everybody(postgres: TestDatabase) -> None:
    await install(postgres.conninfo, "test")
    functions = "select p.proname from pg_proc p where p.pronamespace = 'herd'::regnamespace"
    assert postgres.execute(f"{functions} and obj_description(p.oid) is null") == []
    assert postgres.execute(f"{functions} and has_function_privilege('public', p.oid, 'execute')") == []
    open_path = "not 'search_path=pg_catalog, pg_temp' = any (coalesce(p.proconfig, '{}'))"
    assert postgres.execute(f"{functions} and p.prosecdef and {open_path}") == []


async def test_the_schema_holds_no_type_that_pg_upgrade_refuses(postgres: TestDatabase) -> None:
    await install(postgres.conninfo, "test")
    found = postgres.execute(
        "select a.attname from pg_attribute a join pg_class c on c.oid = a.attrelid "
        "where c.relnamespace = 'herd'::regnamespace and a.atttypid::regtype::text ~ '^reg'"
    )
    assert found == []


@pytest.mark.parametrize("cluster", ["test", "staging"])
def test_a_restored_dump_is_refused_until_it_is_installed_there(
    postgres: TestDatabase, copy: TestDatabase, cluster: str
) -> None:
    asyncio.run(install(postgres.conninfo, "test"))
    asyncio.run(raise_fence(postgres.conninfo, "sweeper", 10, 1, node="alpha", timeout=10))
    dump_into(copy, postgres)

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="is a copy") as refused:
        copy.execute("select herd.fence('sweeper', 10, 1)")
    assert refused.value.diag.message_hint is not None
    assert f"pgherd sql install {copy.name}" in refused.value.diag.message_hint
    with pytest.raises(FenceUnavailable, match="is a copy"):
        asyncio.run(raise_fence(copy.conninfo, "sweeper", 11, 1, node="alpha", timeout=10))
    assert "is a copy" in asyncio.run(status(copy.conninfo)).problems[0]

    assert asyncio.run(install(copy.conninfo, cluster)).identity == "copy"

    lower = raise_fence(copy.conninfo, "sweeper", 9, 1, node="alpha", timeout=10)
    if cluster == "test":
        with pytest.raises(Fenced, match=r"superseded by epoch 10\.1"):
            asyncio.run(lower)
    else:
        asyncio.run(lower)
    assert asyncio.run(status(postgres.conninfo)).problems == ()


async def test_status_shows_fences_and_closed_ones(pg_cluster: Clusters) -> None:
    primary = await pg_cluster.primary()
    await install(primary.conninfo(), "test")
    await raise_fence(primary.conninfo(), "sweeper", 10, 2, node="alpha", timeout=10)
    standby = await pg_cluster.standby(primary)

    here, there = await status(primary.conninfo()), await status(standby.conninfo())

    assert (here.standby, there.standby) == (False, True)
    assert (here.cluster, here.incarnation, here.problems) == ("test", 0, ())
    (fence,) = here.fences
    assert (fence.name, fence.epoch, fence.start, fence.node, fence.open) == ("sweeper", 10, 2, "alpha", True)
    assert there.fences == here.fences


async def test_only_the_owner_writes_a_protected_table(postgres: TestDatabase) -> None:
    await install(postgres.conninfo, "test")
    raiser = FenceRaiser({"app": postgres.conninfo})
    await raiser.raise_fence("app", "sweeper", 10, 1, node="alpha", timeout=10)
    postgres.execute("create table ledger (n int) partition by range (n)")
    postgres.execute("create table ledger_1 partition of ledger for values from (0) to (10)")
    postgres.execute("select herd.protect('ledger', 'sweeper')")
    writes = (
        "insert into ledger values (1)",
        "update ledger set n = 2",
        "delete from ledger",
        "truncate ledger",
        "insert into ledger_1 values (1)",
    )

    def attempt(before: str, write: str) -> str | None:
        with closing(postgres.connect()) as connection:
            connection.execute("begin")
            try:
                if before:
                    connection.execute(before.encode())
                connection.execute(write.encode())
                connection.execute("commit")
            except psycopg.Error as error:
                return error.sqlstate
        return None

    owner = "select herd.fence('sweeper', 10, 1)"
    assert [attempt("", write) for write in writes] == ["PH001"] * 5
    assert [attempt(owner, write) for write in writes] == [None] * 5
    assert [attempt("set herd.token = '10.1:ticker'", write) for write in writes] == ["PH001"] * 5
    assert [attempt("set herd.token = '99.1:sweeper'", write) for write in writes] == ["PH001"] * 5
    assert [attempt("set herd.token = 'x'", write) for write in writes] == ["PH001"] * 5
    await raiser.raise_fence("app", "sweeper", 11, 1, node="beta", timeout=10)
    assert [attempt("set herd.token = '10.1:sweeper'", write) for write in writes] == ["PH001"] * 5
    await raiser.close()

    postgres.execute("select herd.unprotect('ledger')")
    assert [attempt("", write) for write in writes] == [None] * 5


async def test_an_unmodified_daemon_writes_a_protected_table_with_its_token_in_pgoptions(
    postgres: TestDatabase,
) -> None:
    await install(postgres.conninfo, "test")
    postgres.execute("create table ledger (n int)")
    postgres.execute("select herd.protect('ledger', 'pgqd')")
    raiser = FenceRaiser({"app": postgres.conninfo})
    await raiser.raise_fence("app", "pgqd", 10, 1, node="alpha", timeout=10)
    with closing(psycopg.connect(f"{postgres.conninfo} options='-c herd.token=10.1:pgqd'")) as daemon:
        daemon.execute("insert into ledger values (1)")
        daemon.commit()
        daemon.execute("insert into ledger values (2)")
        await raiser.raise_fence("app", "pgqd", 11, 1, node="beta", timeout=10)
        with pytest.raises(psycopg.OperationalError):
            daemon.commit()
    with (
        closing(psycopg.connect(f"{postgres.conninfo} options='-c herd.token=10.1:pgqd'")) as daemon,
        pytest.raises(psycopg.Error, match=r"superseded by epoch 11\.1"),
    ):
        daemon.execute("insert into ledger values (3)")
    assert postgres.execute("select n from ledger") == [(1,)]
    await raiser.close()


def test_the_command_installs_and_shows(pgherd: Run, config: Path, postgres: TestDatabase) -> None:
    code, out, _ = pgherd("sql", "status", "app", "-c", config)
    assert code == 1
    assert "no schema herd" in out
    assert "try: pgherd sql install app" in out

    assert pgherd("sql", "install", "app", "-c", config)[:2] == (
        0,
        "app: schema herd version 1 installed, cluster test\n",
    )
    assert "installed already" in pgherd("sql", "install", "app", "-c", config)[1]
    asyncio.run(raise_fence(postgres.conninfo, "sweeper", 31, 2, node="alpha", timeout=10))

    code, out, _ = pgherd("sql", "status", "-c", config)
    assert code == 0
    assert "sweeper  31.2   alpha" in out

    code, out, _ = pgherd("--json", "sql", "status", "app", "-c", config)
    assert code == 0
    (found,) = json.loads(out)
    assert (found["name"], found["version"], found["cluster"], found["problems"]) == ("app", 1, "test", [])
    (fence,) = found["fences"]
    assert (fence["name"], fence["epoch"], fence["start"], fence["open"]) == ("sweeper", 31, 2, True)


def test_the_command_takes_the_environment_of_libpq(
    pgherd: Run, postgres: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {**postgres.server.environment, "PGDATABASE": postgres.name}.items():
        monkeypatch.setenv(key, value)
    assert pgherd("sql", "install", "--from-env")[0] == 2
    code, out, _ = pgherd("sql", "install", "--from-env", "--cluster", "test")
    assert (code, out) == (0, f"{postgres.name}: schema herd version 1 installed, cluster test\n")
    assert pgherd("sql", "status", "--from-env")[0] == 0
    monkeypatch.setenv("PGPORT", "1")
    code, _, errors = pgherd("sql", "status", "--from-env")
    assert code == 4
    assert "UNREACHABLE" in errors


@pytest.mark.parametrize(
    "argument", ["host=db password=secret", "postgresql://app:secret@db/app", "host=db dbname=app"]
)
def test_the_command_refuses_connection_strings_and_does_not_repeat_them(
    pgherd: Run, config: Path, argument: str
) -> None:
    for command in ("install", "status"):
        code, out, errors = pgherd("sql", command, argument, "-c", config)
        assert code == 2
        assert "secret" not in out + errors
        assert ("with a password" in errors) == ("secret" in argument)


def test_the_command_knows_only_configured_databases(pgherd: Run, config: Path) -> None:
    code, _, errors = pgherd("sql", "install", "crm", "-c", config)
    assert code == 2
    assert "has no [database.crm]" in errors
    assert "configured: app" in errors
