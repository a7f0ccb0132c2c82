"""Users, passwords, tokens and certificates."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from registry.errors import StoreDenied, StoreUnavailable
from registry.etcd import EtcdStore
from registry.session import Session
from registry.store import Put
from registry.timing import Timing
from tests.support.certificates import Authority
from tests.support.etcd import Etcd, running
from tests.support.watching import events, keys, sign_of_life, watching

pytestmark = pytest.mark.slow


@pytest.fixture
def guarded() -> Iterator[Etcd]:
    """An etcd where ``herd`` may do anything below ``/herd/`` and nothing else."""
    with running(options=["--bcrypt-cost=4"]) as etcd:
        for command in (
            "user add root:toor",
            "user grant-role root root",
            "role add herd",
            "role grant-permission herd --prefix=true readwrite /herd/",
            "user add herd:secret",
            "user grant-role herd herd",
            "auth enable",
        ):
            etcd.ctl(*command.split())
        yield etcd


@pytest.fixture
async def herd(guarded: Etcd) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(guarded.endpoints, user="herd", password="secret", canary="/herd/")
    yield store
    await store.close()


def forget_tokens(etcd: Etcd) -> None:
    """Restart the server: it keeps its tokens in memory, so each counts as expired from now on."""
    (member,) = etcd.members
    member.kill()
    etcd.restart(member)


async def test_everything_works_as_a_user_of_its_own_prefix(herd: EtcdStore) -> None:
    lease = await herd.grant(60)
    start = (await herd.txn([], [Put("/herd/a", b"", lease.id)])).revision
    async with watching(herd, "/herd/", start) as watch:
        assert keys(await events(watch, 1)) == ["/herd/a"]

    assert (await herd.fingerprint("/herd/")) == (1, start)
    assert await herd.keepalive(lease.id, timeout=1) == 60
    assert [member.error for member in await herd.members()] == [""]
    await herd.revoke(lease.id)
    assert (await herd.snapshot("/herd/")).kvs == ()


async def test_other_prefixes_are_denied(herd: EtcdStore) -> None:
    with pytest.raises(StoreDenied, match="permission denied"):
        await herd.get("/other/a")
    with pytest.raises(StoreDenied, match="permission denied"):
        await herd.txn([], [Put("/other/a", b"")])
    async with watching(herd, "/other/", 1) as watch:
        with pytest.raises(StoreDenied, match="permission denied"):
            await events(watch, 1)


@pytest.mark.parametrize(("user", "password"), [("herd", "wrong"), ("nobody", "secret"), ("", "")])
async def test_a_stranger_is_denied(guarded: Etcd, user: str, password: str) -> None:
    store = EtcdStore(guarded.endpoints, user=user, password=password)
    with pytest.raises(StoreDenied):
        await store.get("/herd/a")
    async with watching(store, "/herd/", 1) as watch:
        with pytest.raises(StoreDenied):
            await events(watch, 1)
    await store.close()


async def test_a_token_that_expired_is_renewed_by_the_next_call(herd: EtcdStore, guarded: Etcd) -> None:
    await herd.txn([], [Put("/herd/a", b"1")])
    forget_tokens(guarded)

    assert (await herd.txn([], [Put("/herd/a", b"2")])).succeeded
    forget_tokens(guarded)
    kv = await herd.get("/herd/a")
    assert kv is not None
    assert kv.value == b"2"


async def test_a_watch_whose_token_expired_logs_in_again(herd: EtcdStore, guarded: Etcd) -> None:
    writer = EtcdStore(guarded.endpoints, user="herd", password="secret", canary="/herd/")
    start = (await writer.txn([], [Put("/herd/a", b"")])).revision
    async with watching(herd, "/herd/", start + 1) as watch:
        await sign_of_life(watch)
        forget_tokens(guarded)
        await writer.txn([], [Put("/herd/b", b"")])

        assert keys(await events(watch, 1)) == ["/herd/b"]
    await writer.close()


async def test_a_session_works_as_a_user(guarded: Etcd) -> None:
    session = await Session.open(
        lambda: EtcdStore(guarded.endpoints, user="herd", password="secret"), Timing(5)
    )
    assert session.trusted()
    await session.close()


async def test_a_user_is_of_no_matter_where_etcd_has_no_users() -> None:
    with running() as etcd:
        store = EtcdStore(etcd.endpoints, user="herd", password="secret")
        assert await store.get("/a") is None
        await store.close()


async def test_both_sides_of_tls_show_a_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with running(tls=authority.issue("etcd")) as etcd:
        store = EtcdStore(etcd.endpoints, tls=authority.issue("alpha"))
        start = (await store.txn([], [Put("/a", b"")])).revision
        async with watching(store, "/", start) as watch:
            assert keys(await events(watch, 1)) == ["/a"]
        await store.close()


async def test_a_stranger_to_the_authority_gets_no_connection(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    with running(tls=authority.issue("etcd")) as etcd:
        store = EtcdStore(etcd.endpoints, tls=other.issue("mallory"))
        with pytest.raises(StoreUnavailable):
            await store.get("/a", timeout=1.0)
        await store.close()


async def test_a_renewed_certificate_is_taken_into_use(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    with running(tls=authority.issue("etcd")) as etcd:
        tls = other.issue("alpha")
        store = EtcdStore(etcd.endpoints, tls=tls)
        with pytest.raises(StoreUnavailable):
            await store.get("/a", timeout=1.0)

        good = authority.issue("alpha", file="renewed")
        for new, old in ((good.cert, tls.cert), (good.key, tls.key), (good.ca, tls.ca)):
            shutil.copy(new, old)

        assert await store.get("/a") is None
        await store.close()


async def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(ValueError, match="does not start with http"):
        EtcdStore(["127.0.0.1:2379"])
    with pytest.raises(ValueError, match="no etcd endpoint"):
        EtcdStore([])
