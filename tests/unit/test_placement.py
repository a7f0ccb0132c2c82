"""Who should own a name: the same answer everywhere, and no more moves than necessary."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.placement import Candidate, Constraints, Verdict, explain, rank

HOSTS = ["alpha", "beta", "gamma", "delta", "epsilon"]


def host(
    name: str, *, zone: str = "eu", databases: str = "app", draining: bool = False, names: int = 0
) -> Candidate:
    return Candidate(name, f"{name}-00000001", {"zone": zone}, frozenset(databases.split()), draining, names)


candidates = st.lists(
    st.builds(
        host,
        st.sampled_from(HOSTS),
        zone=st.sampled_from(["eu", "us"]),
        databases=st.sampled_from(["", "app", "app log"]),
        draining=st.booleans(),
        names=st.integers(0, 9),
    ),
    unique_by=lambda candidate: candidate.host,
)
constraints = st.builds(
    Constraints,
    require=st.sampled_from([{}, {"zone": "eu"}, {"zone": "eu", "disk": "ssd"}]),
    prefer=st.lists(st.lists(st.sampled_from(HOSTS), min_size=1, max_size=2).map(tuple), max_size=3).map(
        tuple
    ),
    databases=st.sampled_from([frozenset[str](), frozenset({"app"}), frozenset({"app", "log"})]),
)
penalties = st.dictionaries(st.sampled_from(HOSTS), st.integers(0, 3))
names = st.text("abc/", min_size=1, max_size=8)


@given(names, constraints, candidates, penalties, st.randoms(use_true_random=False))
def test_every_host_computes_the_same_order(
    name: str, wish: Constraints, known: list[Candidate], penalty: dict[str, int], shuffle: random.Random
) -> None:
    other = [replace(candidate, names=candidate.names + 1) for candidate in known]
    shuffle.shuffle(other)
    assert rank(name, wish, known, penalty) == rank(name, wish, other, penalty)


@given(names, constraints, candidates, penalties, st.sampled_from(HOSTS))
def test_a_host_that_leaves_moves_only_what_it_had(
    name: str, wish: Constraints, known: list[Candidate], penalty: dict[str, int], leaving: str
) -> None:
    before = rank(name, wish, known, penalty)
    after = rank(name, wish, [each for each in known if each.host != leaving], penalty)
    assert after == tuple(each for each in before if each != leaving)


@given(names, constraints, candidates, penalties)
def test_only_hosts_that_fulfil_the_spec_are_ranked(
    name: str, wish: Constraints, known: list[Candidate], penalty: dict[str, int]
) -> None:
    able = {
        each.host
        for each in known
        if not each.draining
        and wish.databases <= each.databases
        and wish.require.items() <= each.labels.items()
    }
    ranked = rank(name, wish, known, penalty)
    assert set(ranked) == able
    assert len(ranked) == len(able)


@given(names, constraints, candidates, penalties)
def test_penalties_come_before_preference(
    name: str, wish: Constraints, known: list[Candidate], penalty: dict[str, int]
) -> None:
    ranked = rank(name, wish, known, penalty)
    order = [(penalty.get(each, 0), wish.tier(each)) for each in ranked]
    assert order == sorted(order)


@pytest.mark.slow
@given(names, constraints, candidates, penalties)
def test_every_host_gets_a_verdict_and_the_excluded_a_reason(
    name: str, wish: Constraints, known: list[Candidate], penalty: dict[str, int]
) -> None:
    verdicts = explain(name, wish, known, penalty)
    ranked = rank(name, wish, known, penalty)
    assert [each.host for each in verdicts if each.rank is not None] == list(ranked)
    assert {each.host for each in verdicts} == {each.host for each in known}
    assert all(each.why for each in verdicts)


def test_names_spread_evenly_over_equal_hosts() -> None:
    known = [host(name) for name in HOSTS]
    owners = Counter(rank(f"name-{number}", Constraints(), known, {})[0] for number in range(2000))
    assert all(300 < owners[name] < 500 for name in HOSTS)


def test_a_host_that_gave_up_is_asked_again_when_all_did() -> None:
    known = [host("alpha"), host("beta")]
    wish = Constraints(prefer=(("alpha",),))
    assert rank("ticker", wish, known, {}) == ("alpha", "beta")
    assert rank("ticker", wish, known, {"alpha": 1}) == ("beta", "alpha")
    assert rank("ticker", wish, known, {"alpha": 1, "beta": 1}) == ("alpha", "beta")
    assert rank("ticker", wish, known, {"alpha": 1, "beta": 2}) == ("alpha", "beta")


def test_the_order_of_a_name_is_the_same_in_every_version() -> None:
    assert rank("ticker", Constraints(), [host(name) for name in HOSTS], {}) == (
        "beta",
        "gamma",
        "delta",
        "alpha",
        "epsilon",
    )


def test_two_lives_of_one_host_are_one_host() -> None:
    former = Candidate("alpha", "alpha-00000000", {}, frozenset(), names=3)
    assert rank("ticker", Constraints(), [former, replace(former, node="alpha-00000001")], {}) == ("alpha",)


def test_an_operator_is_told_where_each_host_stands() -> None:
    wish = Constraints(
        require={"zone": "eu", "disk": "ssd"}, prefer=(("alpha", "beta"),), databases=frozenset({"app"})
    )
    ssd = {"zone": "eu", "disk": "ssd"}
    app = frozenset({"app"})
    known = [
        Candidate("delta", "delta-1", {"zone": "us"}, frozenset()),
        Candidate("gamma", "gamma-1", ssd, app, names=1),
        Candidate("beta", "beta-1", ssd, app, names=4),
        Candidate("alpha", "alpha-1", ssd, app, draining=True),
        Candidate("zeta", "zeta-1", ssd, app),
    ]
    assert explain("ticker", wish, known, {"gamma": 1, "zeta": 2}) == (
        Verdict("beta", 0, "prefer tier 1, owns 4 names"),
        Verdict("gamma", 1, "gave up on it once, not in prefer, owns 1 name"),
        Verdict("zeta", 2, "gave up on it 2 times, not in prefer, owns 0 names"),
        Verdict("alpha", None, "it is being drained"),
        Verdict(
            "delta",
            None,
            'it has no label disk, the spec requires "ssd"; label zone is "us", the spec requires "eu"; '
            "its agent.toml has no [database.app]",
        ),
    )
