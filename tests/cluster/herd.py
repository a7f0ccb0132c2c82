"""One test's view of a cluster: specs, calls that are written down, and what is checked in the end."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from registry.client import Client, Whereabouts
from registry.clock import SYSTEM_CLOCK
from registry.errors import DaemonError, HerdError, NoSuchName, Refused
from registry.v1 import cluster_pb2, cluster_pb2_grpc, supervision_pb2, supervision_pb2_grpc
from tests.cluster.checker import Violation, check
from tests.cluster.history import NOBODY, Call, Commit, History, Life, Token
from tests.cluster.nemesis import Nemesis
from tests.cluster.observer import Observer
from tests.support.etcd import Member
from tests.support.hosts import TTL, Cluster, Host, eventually
from tests.support.proxy import Mode

FAILOVER = TTL + 3.0
"""Seconds in which a name answers again after its host died: its lease, a claim, a start."""
RESTART = 3.0
"""Seconds in which a name answers again after its process died."""
_DAEMONS = Path(__file__).with_name("daemons")
_ROOT = _DAEMONS.parents[2]
_PYTHON = sys.executable
_numbers = itertools.count(1)


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


class Herd:
    """A running cluster, used by one test; names made by :meth:`name` are its own."""

    def __init__(self, cluster: Cluster, observer: Observer) -> None:
        self.cluster, self.observer = cluster, observer
        self.hosts = cluster.hosts
        self.nemesis = Nemesis()
        self.calls: list[Call] = []
        self.not_judged: set[str] = set()
        self._clients: dict[str, Client] = {}
        self._open = AsyncExitStack()
        self._test = next(_numbers)

    # Specs.

    def name(self, word: str) -> str:
        """Return a name no other test has."""
        return f"t{self._test}-{word}"

    def ledger(
        self, name: str, *, prefer: Sequence[str] = (), args: dict[str, str] | None = None, **keys: object
    ) -> str:
        """Return the spec of a Ledger."""
        run: dict[str, object] = {
            "behaviour": "tests.cluster.daemons.ledger:Ledger",
            "path": [str(_ROOT)],
            "args": {"observer": str(self.observer.path), **(args or {})},
        }
        return self._spec(name, run, prefer, {**keys, **({"fence": ["app"]} if keys.get("fence") else {})})

    def command(self, name: str, *options: str, prefer: Sequence[str] = (), **keys: object) -> str:
        """Return the spec of a plain command with these options; a deaf one must be killed after 2 s."""
        if "--deaf" in options:
            keys.setdefault("stop", [{"signal": "SIGTERM", "wait": "2s"}])
        script = str(_DAEMONS / "command.py")
        argv = [_PYTHON, "-IS", script, str(self.observer.path), "${host}", *options]
        return self._spec(name, {"command": argv}, prefer, keys)

    def _spec(self, name: str, run: dict[str, object], prefer: Sequence[str], keys: dict[str, object]) -> str:
        placement = dict(keys.pop("placement", {}))  # type: ignore[call-overload]
        if prefer:
            placement["prefer"] = list(prefer)
        stops = keys.pop("stop", [])
        table = {
            "id": name,
            "name": name,
            "run": run,
            **keys,
            **({"placement": placement} if placement else {}),
        }
        lines = [
            "[[child]]",
            *(f"{key} = {_toml(value)}" for key, value in table.items() if value is not None),
        ]
        for stop in stops:  # type: ignore[attr-defined]
            lines += ["[[child.stop]]", *(f"{key} = {_toml(value)}" for key, value in stop.items())]
        return "\n".join(lines) + "\n"

    async def apply(self, *specs: str, via: str = "") -> None:
        """Put specs into the cluster, all in one file."""
        request = supervision_pb2.ApplyRequest(
            toml="schema = 1\n" + "".join(specs), source="test", who="test"
        )
        client = await self.client(via)
        await client.rpc(
            supervision_pb2_grpc.SupervisionStub(client.channel).Apply, request, timeout=20.0, read_only=False
        )

    async def wish(self, what: str, name: str, via: str = "") -> None:
        """Start, Stop, Delete or Restart a name."""
        client = await self.client(via)
        stub = supervision_pb2_grpc.SupervisionStub(client.channel)
        make = supervision_pb2.RestartRequest if what == "Restart" else supervision_pb2.NameRequest
        request = make(name=name, who="test")
        await client.rpc(getattr(stub, what), request, timeout=10.0, read_only=False)

    # Asking.

    async def client(self, host: str = "") -> Client:
        """Return a client of that host's agent, by default of the first whose launcher runs."""
        chosen = host or next(name for name, each in self.hosts.items() if each.running)
        if chosen not in self._clients:
            client = Client(self.hosts[chosen].address)
            await self._open.enter_async_context(client)
            self._clients[chosen] = client
        return self._clients[chosen]

    async def why(self, name: str, via: str = "") -> str:
        """Return what an agent says about a name, as one text."""
        client = await self.client(via)
        answer = await client.rpc(
            cluster_pb2_grpc.ClusterStub(client.channel).Why, cluster_pb2.WhyRequest(name=name)
        )
        return "\n".join([answer.caveat, *(line.what for line in answer.lines)])

    async def says(self, name: str, *words: str, via: str = "", within: float = 10.0) -> None:
        """Wait until an agent says all these words about a name."""
        said = ""
        try:
            async with asyncio.timeout(within):
                while True:
                    said = await self.why(name, via=via)
                    if all(word in said for word in words):
                        return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"not within {within:g} s: {words} in\n{said}") from None

    async def unowned(self, *names: str, via: str = "", within: float = RESTART) -> None:
        """Wait until none of these names has an owner."""
        client = await self.client(via)
        async with asyncio.timeout(within):
            while any(each.epoch for each in await client.names() if each.name in names):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def whereis(self, name: str, via: str = "") -> Whereabouts:
        return await (await self.client(via)).whereis(name)

    async def children(self, host: str) -> list[supervision_pb2.Child]:
        """Return the children of one host, as its agent tells."""
        client = await self.client(host)
        stub = supervision_pb2_grpc.SupervisionStub(client.channel)
        answer = await client.rpc(stub.Children, supervision_pb2.ChildrenRequest(host=host))
        return list(answer.children)

    async def call(
        self, name: str, method: str = "add", *, via: str = "", timeout: float = 2.0, **more: object
    ) -> Call:
        """Make one request, with ``more`` arguments, and write down how it ended."""
        kind = "cast" if method == "note" else "call"
        number = len(self.calls)
        asked = Call(f"{name}#{number}", name, kind, SYSTEM_CLOCK.now())
        self.calls.append(asked)
        try:
            client = await self.client(via)
            ask = client.cast if kind == "cast" else client.ask
            answer = await ask(name, method, {"op": asked.op, **more}, timeout=timeout)
        except DaemonError as error:
            done = replace(asked, outcome="reply", error=str(error))
        except Refused as error:
            done = replace(asked, outcome="refused", error=f"{error.reason}: {error}")
        except HerdError as error:
            done = replace(asked, outcome="unknown", error=f"{error.reason}: {error}")
        else:
            done = replace(asked, outcome="reply", token=Token(answer.epoch, answer.start))
        done = self.calls[number] = replace(done, finished=SYSTEM_CLOCK.now())
        return done

    async def answers(
        self, name: str, *, within: float, above: Token = NOBODY, via: str = "", method: str = "add"
    ) -> Life:
        """Call until a process with a token above that one replies; return its life.

        Fails when that takes longer than ``within`` seconds.
        """
        until = SYSTEM_CLOCK.now() + within
        last: Call | None = None
        while (left := until - SYSTEM_CLOCK.now()) > 0:
            last = await self.call(name, method, via=via, timeout=min(left, 2.0))
            if last.token is not None and last.token > above:
                return next(
                    life for life in self.observer.lives if (life.name, life.token) == (name, last.token)
                )
            if last.token is None:
                await asyncio.sleep(0.02)
        raise AssertionError(
            f"{name} did not answer within {within:g} s: {last}\n{await self.why(name, via=via)}\n"
            + "\n".join(map(str, self.observer.lives))
        )

    async def up(self, *specs: str, names: Sequence[str]) -> list[Life]:
        """Apply specs, and wait until each of these names has a process; return those."""
        await self.apply(*specs)
        return [await self.runs(name) for name in names]

    async def runs(self, name: str, *, above: Token = NOBODY, within: float = 10.0) -> Life:
        """Wait until a process with a token above that one runs under the name."""
        found: list[Life] = []

        def is_there() -> bool:
            found[:] = [life for life in self.observer.alive(name) if life.token > above]
            return bool(found)

        try:
            await eventually(is_there, within, f"{name} runs above {above}")
        except AssertionError as late:
            raise AssertionError(f"{late}\n{await self.why(name)}") from None
        return found[0]

    async def ended(self, life: Life, within: float) -> Life:
        """Wait until a process is dead; return its life as it was."""
        await eventually(
            lambda: life.pid not in {one.pid for one in self.observer.alive()}, within, f"{life} ends"
        )
        return next(one for one in self.observer.lives if (one.name, one.token) == (life.name, life.token))

    @asynccontextmanager
    async def traffic(
        self,
        names: Sequence[str],
        *,
        methods: Sequence[str] = ("add", "note"),
        vias: Sequence[str] = ("",),
        callers: int = 4,
        timeout: float = 2.0,
    ) -> AsyncIterator[None]:
        """Call all the time, from several callers; whatever comes of it is for the checker."""

        async def one(number: int) -> None:
            rolled = random.Random(number)
            while True:
                name, method, via = (rolled.choice(list(some)) for some in (names, methods, vias))
                done = await self.call(name, method, via=via, timeout=timeout)
                await asyncio.sleep(0.05 if done.outcome == "refused" else 0.01)

        tasks = [asyncio.create_task(one(number)) for number in range(callers)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended

    # Hosts.

    async def pids(self, host: Host) -> dict[str, int]:
        """Return the pids of launcher, warden and agent."""
        status = await host.wait_status(lambda status: bool(status.pids), 10.0)
        return dict(status.pids)

    def owner(self, life: Life) -> Host:
        return self.hosts[life.host]

    def others(self, host: Host) -> list[str]:
        return [name for name in self.hosts if name != host.name]

    # The end of a test.

    async def ready(self) -> None:
        """Start what does not run, and wait until all hosts are members."""
        for host in self.hosts.values():
            if not host.running:
                host.start()
        await asyncio.gather(*(host.ready() for host in self.hosts.values()))

    async def restore(self) -> None:
        """Undo every fault; return when all hosts are members again."""
        self.nemesis.resume_all()
        etcd = self.cluster.etcd
        for member in etcd.members:
            member.resume()
        await self.start_members(
            *(each for each in etcd.members if each.process and each.process.poll() is not None)
        )
        await asyncio.to_thread(etcd.wait_healthy)
        for host in self.hosts.values():
            self.cluster.network(host, Mode.PASS)
        if self.cluster.postgres is not None and not self.cluster.postgres.running:
            await self.cluster.postgres.start()
        await self.ready()

    async def heal(self) -> None:
        """Undo every fault, remove every spec, and wait until nothing runs any more."""
        await self.restore()
        # Those of the test may be waiting before they look for a restarted agent again.
        await self.close()
        client = await self.client()
        supervision = supervision_pb2_grpc.SupervisionStub(client.channel)
        answer = await client.rpc(supervision.Specs, supervision_pb2.SpecsRequest())
        for spec in answer.specs:
            try:
                await self.wish("Delete", spec.name)
            except NoSuchName:
                continue
        await eventually(lambda: not self.observer.alive(), 20.0, f"all end: {self.observer.alive()}")
        await self.unowned(*(each.name for each in await client.names()), within=10.0)
        for host in self.hosts.values():
            # A warden waits longer before it starts an agent the more of them have died young.
            if (await host.ready()).generation > 2:
                await host.kill()

    def print_log(self, host: Host, since: int = 0) -> None:
        """Print what a host has said, for whoever reads why a test failed."""
        if host.log.exists():
            text = host.log.read_text(errors="replace")[since:]
            sys.stdout.write(f"-- log of {host.name}\n{text}\n")

    async def leader(self) -> Member:
        """Return the etcd member that leads; all must be up."""
        return await asyncio.to_thread(self.cluster.etcd.leader)

    async def start_members(self, *members: Member) -> None:
        """Start members that were killed; return when they take part."""
        for member in members:
            # Here and not in a thread: it dies with the thread that started it.
            member.start(self.cluster.etcd.initial, self.cluster.etcd.options)
        await asyncio.to_thread(self.cluster.etcd.wait_healthy, *members)

    async def close(self) -> None:
        self._clients.clear()
        await self._open.aclose()

    def history(self) -> History:
        """Return what is known now."""
        lives = tuple(replace(life, pauses=self.nemesis.pauses.of(life.pid)) for life in self.observer.lives)
        return History(lives, tuple(self.calls), self.observer.effects, self._commits())

    def _commits(self) -> tuple[Commit, ...]:
        if self.cluster.postgres is None:
            return ()
        rows = self.cluster.sql(
            "select op, name, epoch, start, extract(epoch from pg_xact_commit_timestamp(xmin)) from ledger"
        )
        return tuple(
            Commit(str(op), str(name), Token(int(str(epoch)), int(str(start))), float(str(at)))
            for op, name, epoch, start, at in rows
            if str(name).startswith(f"t{self._test}-")
        )

    def violations(self) -> list[Violation]:
        """Return every promise that was broken up to now, but for those a test cannot hold us to."""
        return [found for found in check(self.history()) if found.promise not in self.not_judged]
