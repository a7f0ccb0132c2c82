"""The ways a client takes: to the owner's agent, through its own, and never two at once for a name."""

from __future__ import annotations

import asyncio

import pytest

from registry import routes
from registry.client import Client
from registry.errors import HerdError, UnknownOutcome
from registry.link import Reply
from registry.security import channel
from registry.v1 import messages_pb2 as pb
from tests.support.agents import Keeps, a_herd, echo, until


async def test_name_keeps_its_route_while_something_on_it_is_unanswered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routes, "KEEP", 0.0)
    async with a_herd() as herd:
        alpha, beta, gamma = [await herd.agent(host) for host in ("alpha", "beta", "gamma")]
        before, after = Keeps(), Keeps()
        await herd.serve("list", beta, before)
        async with Client(alpha.address) as client:
            first = asyncio.ensure_future(client.call("list", "add", 1))
            await until(lambda: len(before.requests) == 1)
            del beta.children.handlers["list"]
            await herd.serve("list", gamma, after)
            second = asyncio.ensure_future(client.call("list", "add", 2))
            await until(lambda: len(after.requests) == 1)
            # It went to the agent that had the first one, which passed it on.
            assert gamma.peers.heard(beta.node) is not None
            before.answer()
            after.answer()
            assert (await first, await second) == (1, 2)
            # Nothing is on the way: the next one is sent to the new owner's agent.
            gamma.children.handlers["list"] = echo
            heard = gamma.peers.heard(beta.node)
            assert await client.call("list", "add", 3) == 3
            assert await client.call("list", "add", 4) == 4
            assert gamma.peers.heard(beta.node) == heard


async def test_agent_that_never_answers_does_not_keep_a_busy_name_on_its_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A host that was frozen: its connection stands, its name is elsewhere, and the calls never pause."""
    monkeypatch.setattr(routes, "KEEP", 0.0)
    monkeypatch.setattr(routes, "OVERLAP", 0.05)
    async with a_herd() as herd:
        alpha, beta, gamma = [await herd.agent(host) for host in ("alpha", "beta", "gamma")]
        frozen = Keeps()
        await herd.serve("list", beta, frozen)
        async with Client(alpha.address) as client:
            short = asyncio.ensure_future(client.call("list", "add", 1, timeout=0.1))
            long = [asyncio.ensure_future(client.call("list", "add", 2, timeout=20)) for _ in range(3)]
            await until(lambda: len(frozen.requests) == 4)
            await herd.serve("list", gamma)
            with pytest.raises(UnknownOutcome):
                await short
            assert await client.call("list", "add", 3, timeout=2) == 3
            assert not any(each.done() for each in long)
            frozen.answer()
            assert await asyncio.gather(*long) == [2, 2, 2]


async def test_owner_that_the_client_cannot_reach_is_called_through_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        keeps = Keeps()
        await herd.serve("list", beta, keeps)
        async with Client(alpha.address) as client:
            # As behind a firewall: the agents reach each other, the client reaches only its own.
            monkeypatch.setattr(client._routes, "_connect", lambda address: channel("/nowhere/agent.sock"))
            calls = [asyncio.ensure_future(client.call("list", "add", n)) for n in range(100)]
            await until(lambda: len(keeps.requests) == 100)
            assert [int(str(body)) for body in keeps.bodies] == list(range(100))
            assert beta.peers.heard(alpha.node) is not None
            keeps.answer()
            assert await asyncio.gather(*calls) == list(range(100))


async def test_break_of_the_link_makes_unknown_only_what_was_handed_over() -> None:
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        keeps = Keeps()
        await herd.serve("list", beta, keeps)
        async with Client(alpha.address) as client:
            handed = asyncio.ensure_future(client.call("list", "add", 1))
            await until(lambda: len(keeps.requests) == 1)
            await beta.deafen()
            with pytest.raises(UnknownOutcome):
                await handed
            later = asyncio.ensure_future(client.call("list", "add", 2))
            await until(lambda: alpha.router.waiting == 1)
            await beta.listen()
            await until(lambda: len(keeps.requests) == 2)
            keeps.answer()
            assert await later == 2


async def test_no_request_is_executed_twice_while_agents_come_and_go() -> None:
    """Every call ends; what was answered or is unknown ran at most once, what was refused never."""
    async with a_herd() as herd:
        alpha, beta = await herd.agent("alpha"), await herd.agent("beta")
        ran: list[int] = []

        def note(frame: pb.Frame, deadline: float, reply: Reply) -> None:
            ran.append(int(frame.json))
            echo(frame, deadline, reply)

        await herd.serve("list", beta, note)
        outcomes: dict[int, str] = {}
        async with Client(alpha.address) as client:

            async def caller(first: int) -> None:
                for n in range(first, first + 50):
                    try:
                        assert await client.call("list", "add", n) == n
                        outcomes[n] = "reply"
                    except HerdError as error:
                        outcomes[n] = error.outcome.value

            async with asyncio.TaskGroup() as group:
                for number in range(20):
                    group.create_task(caller(number * 50))
                for _ in range(5):
                    enough = min(len(outcomes) + 50, 1000)
                    await until(lambda enough=enough: len(outcomes) >= enough)  # type: ignore[misc]
                    await beta.deafen()
                    await beta.listen()
        assert len(outcomes) == 1000
        assert len(set(ran)) == len(ran)
        assert {n for n, outcome in outcomes.items() if outcome == "reply"} <= set(ran)
        assert {n for n, outcome in outcomes.items() if outcome == "refused"}.isdisjoint(ran)
        assert sum(outcome == "reply" for outcome in outcomes.values()) > 500


async def test_owner_that_is_about_to_stop_makes_the_client_ask_home() -> None:
    async with a_herd() as herd:
        alpha, beta, gamma = [await herd.agent(host) for host in ("alpha", "beta", "gamma")]
        await herd.serve("list", beta)
        async with Client(alpha.address) as client:
            assert await client.call("list", "add", 1) == 1
            del beta.children.handlers["list"]
            waits = asyncio.ensure_future(client.call("list", "add", 2))
            await until(lambda: beta.router.waiting == 1)
            beta.router.close()
            await until(lambda: alpha.router.waiting == 1)
            late = asyncio.ensure_future(client.call("list", "add", 3))
            await herd.serve("list", gamma)
            assert list(await asyncio.gather(waits, late)) == [2, 3]
