"""Where requests go, wait and end; one agent, no network."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from registry import router as router_module
from registry import wire
from registry.clock import SYSTEM_CLOCK
from registry.errors import Denied, Fenced, HerdError, NoOwner, Overloaded, UnknownOutcome, WrongEpoch
from registry.ownership import WorkerState
from registry.router import LAST_TRY, WAITING_MESSAGES
from registry.v1 import messages_pb2 as pb
from tests.support.agents import Agent, Herd, Keeps, a_herd, echo, refuses, until


@pytest.fixture
async def herd() -> AsyncIterator[Herd]:
    async with a_herd() as herd:
        yield herd


@pytest.fixture
async def agent(herd: Herd) -> Agent:
    return await herd.agent("alpha")


class Sent:
    """A request given to a router, and its reply."""

    def __init__(
        self,
        agent: Agent,
        name: str,
        body: str = "{}",
        *,
        timeout: float = 5.0,
        epoch: int = 0,
        from_peer: bool = False,
    ) -> None:
        self.replies: list[pb.Frame] = []
        frame = wire.request(pb.KIND_CALL, name, "method", body, epoch=epoch)
        agent.router.route(frame, SYSTEM_CLOCK.now() + timeout, self.replies.append, from_peer=from_peer)

    @property
    def reason(self) -> str:
        """Which error it was answered with."""
        [reply] = self.replies
        return wire.error_from_pb(reply.error).reason

    @property
    def message(self) -> str:
        [reply] = self.replies
        return reply.error.message

    async def answered(self) -> pb.Frame:
        await until(lambda: bool(self.replies))
        [reply] = self.replies
        return reply


async def test_request_for_a_child_of_this_host_is_delivered_at_once(agent: Agent) -> None:
    agent.children.handlers["pgqd"] = echo
    assert Sent(agent, "pgqd", "3").replies[0].json == "3"


async def test_declared_name_without_owner_waits_until_it_is_served_here(herd: Herd, agent: Agent) -> None:
    herd.declare("sweeper")
    await herd.settled()
    sent = Sent(agent, "sweeper", "1")
    assert not sent.replies
    await herd.serve("sweeper", agent)
    assert (await sent.answered()).json == "1"
    assert agent.router.waiting == 0


@pytest.mark.parametrize("error", [NoOwner("starting"), WrongEpoch("moved"), Fenced("no lease")])
async def test_refusal_of_the_child_is_tried_again_when_it_wakes(
    herd: Herd, agent: Agent, error: HerdError
) -> None:
    await herd.serve("sweeper", agent, refuses(error))
    sent = Sent(agent, "sweeper", "1")
    assert not sent.replies
    agent.children.handlers["sweeper"] = echo
    agent.router.wake("sweeper")
    assert sent.replies[0].json == "1"


async def test_refused_request_is_tried_again_without_any_sign(herd: Herd, agent: Agent) -> None:
    await herd.serve("sweeper", agent, refuses(NoOwner("starting")))
    sent = Sent(agent, "sweeper", "1")
    agent.children.handlers["sweeper"] = echo
    assert (await sent.answered()).json == "1"


async def test_refused_request_is_not_tried_again_in_its_last_moment(herd: Herd, agent: Agent) -> None:
    """The answer could come too late, and what is known not to be executed would become uncertain."""
    await herd.serve("sweeper", agent, refuses(Fenced("no lease")))
    sent = Sent(agent, "sweeper", timeout=LAST_TRY * 0.9)
    agent.children.handlers["sweeper"] = echo
    agent.router.wake("sweeper")
    assert sent.reason == "FENCED"


@pytest.mark.parametrize("error", [Overloaded("full"), UnknownOutcome("crashed")])
async def test_other_errors_are_final(herd: Herd, agent: Agent, error: HerdError) -> None:
    await herd.serve("sweeper", agent, refuses(error))
    assert Sent(agent, "sweeper").reason == error.reason


async def test_unknown_outcome_with_a_refused_reason_is_final(herd: Herd, agent: Agent) -> None:
    """FENCED said of a request that ran must not run it again."""

    def superseded(frame: pb.Frame, deadline: float, reply: object) -> None:
        answer = wire.error_reply(frame, Fenced("superseded while it ran"))
        answer.error.outcome = pb.OUTCOME_UNKNOWN
        assert callable(reply)
        reply(answer)

    await herd.serve("sweeper", agent, superseded)
    assert Sent(agent, "sweeper").reason == "FENCED"


async def test_request_for_one_epoch_is_refused_at_once(herd: Herd, agent: Agent) -> None:
    await herd.serve("sweeper", agent, refuses(WrongEpoch("not this one")))
    assert Sent(agent, "sweeper", epoch=4).reason == "WRONG_EPOCH"


async def test_refusal_of_a_child_that_is_no_name_is_final(agent: Agent) -> None:
    agent.children.handlers["pgqd"] = refuses(NoOwner("it has ended"))
    assert Sent(agent, "pgqd").message == "it has ended"


async def test_last_refusal_is_told_when_time_is_up(herd: Herd, agent: Agent) -> None:
    await herd.serve("sweeper", agent, refuses(Fenced("this host's lease is not certain")))
    sent = Sent(agent, "sweeper", timeout=0.05)
    assert not sent.replies
    await sent.answered()
    assert sent.reason == "FENCED"


async def test_request_waits_no_longer_than_its_deadline(herd: Herd, agent: Agent) -> None:
    herd.declare("sweeper")
    await herd.settled()
    short, long = Sent(agent, "sweeper", timeout=0.05), Sent(agent, "sweeper")
    await short.answered()
    assert short.reason == "NO_OWNER"
    assert not long.replies


async def test_request_waits_no_longer_than_the_limit(
    herd: Herd, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "WAITING_SECONDS", 0.05)
    await herd.serve("sweeper", agent, refuses(NoOwner("starting")))
    sent = Sent(agent, "sweeper", timeout=60)
    await sent.answered()
    assert sent.reason == "NO_OWNER"


async def test_no_more_than_a_thousand_wait_for_a_name(herd: Herd, agent: Agent) -> None:
    herd.declare("sweeper")
    herd.declare("other")
    await herd.settled()
    waiting = [Sent(agent, "sweeper") for _ in range(WAITING_MESSAGES)]
    assert Sent(agent, "sweeper").reason == "NO_OWNER"
    assert not Sent(agent, "other").replies
    assert not any(sent.replies for sent in waiting)


async def test_waiting_requests_are_bounded_in_bytes(
    herd: Herd, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "WAITING_BYTES", 1000)
    herd.declare("sweeper")
    await herd.settled()
    assert not Sent(agent, "sweeper", "1" * 600).replies
    assert Sent(agent, "sweeper", "1" * 600).reason == "OVERLOADED"
    await herd.serve("sweeper", agent, refuses(NoOwner("starting")))
    agent.children.handlers["sweeper"] = echo
    agent.router.wake("sweeper")
    agent.children.handlers["sweeper"] = refuses(NoOwner("starting"))
    assert not Sent(agent, "sweeper", "1" * 600).replies


async def test_requests_are_served_in_the_order_they_came(herd: Herd, agent: Agent) -> None:
    keeps = Keeps()
    herd.declare("sweeper")
    await herd.settled()
    early = [Sent(agent, "sweeper", str(n)) for n in range(5)]
    await herd.serve("sweeper", agent, keeps)
    late = [Sent(agent, "sweeper", str(n)) for n in range(5, 8)]
    await until(lambda: len(keeps.requests) == 8)
    assert keeps.bodies == [str(n) for n in range(8)]
    keeps.answer()
    assert [(await sent.answered()).json for sent in early + late] == [str(n) for n in range(8)]


async def test_those_that_come_back_take_their_old_place(herd: Herd, agent: Agent) -> None:
    keeps = Keeps()
    await herd.serve("sweeper", agent, keeps)
    first = [Sent(agent, "sweeper", str(n)) for n in range(3)]
    kept, keeps.requests = keeps.requests, []
    for frame, _, reply in (kept[2], kept[0], kept[1]):
        reply(wire.error_reply(frame, NoOwner("crashed before it started")))
    last = Sent(agent, "sweeper", "3")
    agent.router.wake("sweeper")
    assert keeps.bodies == ["0", "1", "2", "3"]
    keeps.answer()
    assert all(sent.replies for sent in (*first, last))


async def test_later_requests_wait_while_the_owner_before_has_unanswered_ones(herd: Herd) -> None:
    alpha, beta, gamma = [await herd.agent(host) for host in ("alpha", "beta", "gamma")]
    before, after = Keeps(), Keeps()
    await herd.serve("sweeper", beta, before)
    first = Sent(alpha, "sweeper", "1")
    await until(lambda: len(before.requests) == 1)
    await herd.serve("sweeper", gamma, after)
    second = Sent(alpha, "sweeper", "2")
    assert alpha.router.waiting == 1
    [(frame, _, reply)] = before.requests
    reply(wire.error_reply(frame, WrongEpoch("moved")))
    await until(lambda: len(after.requests) == 2)
    assert after.bodies == ["1", "2"]
    after.answer()
    assert (await first.answered()).json == "1"
    assert (await second.answered()).json == "2"


@pytest.mark.slow
async def test_an_owner_that_does_not_answer_holds_later_requests_only_for_a_moment(herd: Herd) -> None:
    alpha, beta, gamma = [await herd.agent(host) for host in ("alpha", "beta", "gamma")]
    await herd.serve("sweeper", beta, Keeps())
    first = Sent(alpha, "sweeper", "1")
    await until(lambda: alpha.peers.heard(beta.node) is not None)
    await herd.serve("sweeper", gamma)
    second = Sent(alpha, "sweeper", "2")
    assert (await second.answered()).json == "2"
    assert not first.replies


async def test_name_that_is_stopped_while_requests_wait_is_refused(herd: Herd, agent: Agent) -> None:
    herd.declare("sweeper")
    await herd.settled()
    sent = Sent(agent, "sweeper")
    herd.undeclare("sweeper")
    await sent.answered()
    assert sent.reason == "NO_SUCH_NAME"


async def test_request_of_a_peer_is_delivered_or_refused_and_never_waits(herd: Herd, agent: Agent) -> None:
    await herd.serve("sweeper", agent, refuses(NoOwner("starting")))
    herd.declare("other")
    await herd.settled()
    assert Sent(agent, "sweeper", from_peer=True).reason == "NO_OWNER"
    assert Sent(agent, "other", from_peer=True).reason == "WRONG_EPOCH"
    assert agent.router.waiting == 0


async def test_owner_that_is_this_node_but_not_running_yet_is_waited_for(herd: Herd, agent: Agent) -> None:
    herd.declare("sweeper")
    herd.own("sweeper", agent, WorkerState.STARTING)
    await herd.settled()
    sent = Sent(agent, "sweeper", "1")
    assert not sent.replies
    agent.children.handlers["sweeper"] = echo
    agent.router.wake("sweeper")
    assert sent.replies[0].json == "1"


async def test_former_node_of_this_host_is_not_asked(herd: Herd, agent: Agent) -> None:
    """The session is lost, the worker stopped, and the directory cannot hear of it."""
    await herd.serve("sweeper", agent)
    agent.children.handlers.clear()
    former, agent.node = agent.node, ""
    sent = Sent(agent, "sweeper", timeout=0.15)
    await sent.answered()
    assert sent.reason == "NO_OWNER"
    assert agent.peers.channel(former) is None


async def test_only_who_names_an_epoch_hears_that_it_is_the_wrong_one(herd: Herd, agent: Agent) -> None:
    beta = await herd.agent("beta")
    epoch = await herd.serve("sweeper", beta)
    beta.children.handlers.clear()
    any_epoch, this_epoch = Sent(agent, "sweeper", timeout=0.15), Sent(agent, "sweeper", epoch=epoch)
    await any_epoch.answered()
    await this_epoch.answered()
    assert any_epoch.reason == "NO_OWNER"
    assert this_epoch.reason == "WRONG_EPOCH"


async def test_what_an_agent_without_a_session_passes_on_is_not_passed_on_again(
    herd: Herd, agent: Agent
) -> None:
    beta = await herd.agent("beta")
    await herd.serve("sweeper", beta)
    beta.children.handlers.clear()
    agent.node = ""
    sent = Sent(agent, "sweeper")
    await until(lambda: agent.router.waiting == 1)
    assert beta.router.waiting == 0
    assert not sent.replies


@pytest.mark.slow
async def test_without_etcd_a_name_its_owner_does_not_run_is_refused_with_the_reason(
    herd: Herd, agent: Agent
) -> None:
    beta = await herd.agent("beta")
    await herd.serve("sweeper", beta)
    beta.children.handlers.clear()
    beta.node = ""
    herd.store.go_away()
    await until(lambda: not (agent.directory.in_sync or beta.directory.in_sync), 10)
    for asked in (agent, beta):
        sent = Sent(asked, "sweeper", timeout=0.3)
        await sent.answered()
        assert sent.reason == "NO_OWNER"
        assert "beta had sweeper" in sent.message
        assert "not in sync for" in sent.message


async def test_closing_refuses_what_waits(herd: Herd, agent: Agent) -> None:
    herd.declare("sweeper")
    await herd.settled()
    sent = Sent(agent, "sweeper")
    agent.router.close()
    assert sent.reason == "UNREACHABLE"
    assert Sent(agent, "sweeper").replies


async def test_a_thousand_waiting_requests_cost_little_to_wake(herd: Herd, agent: Agent) -> None:
    """Refusals come one by one; each must not go through all that wait."""
    await herd.serve("sweeper", agent, keeps := Keeps())
    sent = [Sent(agent, "sweeper") for _ in range(WAITING_MESSAGES)]
    for frame, _, reply in keeps.requests:
        reply(wire.error_reply(frame, NoOwner("crashed")))
    assert agent.router.waiting == WAITING_MESSAGES
    agent.children.handlers["sweeper"] = echo
    agent.router.wake("sweeper")
    assert all(one.replies for one in sent)


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [(Denied("no TLS certificate"), "DENIED"), (FileNotFoundError("ca.crt"), "UNREACHABLE")],
)
async def test_an_agent_to_whom_no_channel_can_be_made_is_one_that_cannot_be_reached(
    herd: Herd, monkeypatch: pytest.MonkeyPatch, obstacle: Exception, reason: str
) -> None:
    """Else what waits behind such a request would never be answered."""
    alpha, beta = [await herd.agent(host) for host in ("alpha", "beta")]
    await herd.serve("sweeper", beta)

    def connect(address: str) -> grpc.aio.Channel:
        raise obstacle

    monkeypatch.setattr(alpha.peers, "_connect", connect)
    first, second = [Sent(alpha, "sweeper", timeout=0.3) for _ in range(2)]
    await first.answered()
    await second.answered()
    assert first.reason == reason
    assert second.reason == reason
