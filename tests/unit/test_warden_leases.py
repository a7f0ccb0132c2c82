"""Deadlines only rise, and what is over stays over."""

from __future__ import annotations

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent.warden.leases import Leases
from node_agent.warden.respawn import LONGEST_PAUSE, SETTLED_AFTER, Respawn


def test_a_lease_holds_until_its_deadline_and_not_at_it() -> None:
    leases = Leases()
    assert leases.raise_deadline(7, 10.0, now=1.0)
    assert leases.holds(7, 9.999)
    assert not leases.holds(7, 10.0)


def test_an_unknown_lease_does_not_hold_and_lease_zero_always_does() -> None:
    leases = Leases()
    assert not leases.holds(7, 1.0)
    assert leases.holds(0, 1.0)
    assert not leases.raise_deadline(0, 10.0, now=1.0)
    assert leases.expire(11.0) == []
    assert leases.holds(0, 11.0)


def test_a_deadline_is_never_lowered() -> None:
    leases = Leases()
    leases.raise_deadline(7, 10.0, now=1.0)
    assert leases.raise_deadline(7, 5.0, now=2.0)
    assert leases.holds(7, 9.0)


def test_a_lease_that_has_passed_is_not_raised_even_before_anybody_noticed() -> None:
    leases = Leases()
    leases.raise_deadline(7, 10.0, now=1.0)
    assert not leases.raise_deadline(7, 20.0, now=10.0)
    assert leases.expire(10.0) == [7]
    assert not leases.raise_deadline(7, 30.0, now=10.5)
    assert not leases.holds(7, 11.0)


def test_a_forgotten_lease_never_comes_back() -> None:
    leases = Leases()
    leases.raise_deadline(7, 10.0, now=1.0)
    leases.end(7)
    assert not leases.raise_deadline(7, 20.0, now=2.0)
    assert not leases.holds(7, 2.0)
    assert leases.expire(50.0) == []


def test_a_deadline_in_the_past_founds_no_lease() -> None:
    leases = Leases()
    assert not leases.raise_deadline(7, 1.0, now=1.0)
    assert list(leases) == []


@pytest.mark.parametrize("deadline", [inf, nan, -inf])
def test_a_deadline_that_is_no_moment_founds_no_lease(deadline: float) -> None:
    leases = Leases()
    assert not leases.raise_deadline(7, deadline, now=1.0)


def test_the_earliest_deadline_is_that_of_the_leases_asked_about() -> None:
    leases = Leases()
    leases.raise_deadline(7, 10.0, now=1.0)
    leases.raise_deadline(8, 20.0, now=1.0)
    assert leases.earliest() == 10.0
    assert leases.earliest({8}) == 20.0
    assert leases.earliest({9}) is None


steps = st.lists(
    st.tuples(
        st.sampled_from(["raise", "end", "expire"]), st.integers(1, 3), st.floats(0, 100), st.floats(0, 10)
    )
)


@given(steps)
def test_once_a_lease_did_not_hold_it_never_holds_again(steps: list[tuple[str, int, float, float]]) -> None:
    leases, now, ended = Leases(), 0.0, set[int]()
    known = set[int]()
    for what, lease, deadline, passes in steps:
        now += passes
        if what == "raise" and leases.raise_deadline(lease, deadline, now):
            known.add(lease)
        elif what == "end":
            leases.end(lease)
            ended.add(lease)
        elif what == "expire":
            leases.expire(now)
        ended |= {each for each in known if not leases.holds(each, now)}
        assert not any(leases.holds(each, now) for each in ended)


def test_a_first_early_death_costs_no_time_and_many_cost_a_bounded_pause() -> None:
    respawn = Respawn()
    pauses = [respawn.pause(lived=0.0) for _ in range(40)]
    assert pauses[:4] == [0.0, 0.1, 0.2, 0.4]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE


def test_a_process_that_had_settled_is_replaced_at_once_whatever_came_before() -> None:
    respawn = Respawn()
    for _ in range(5):
        respawn.pause(lived=0.0)
    assert respawn.pause(lived=SETTLED_AFTER) == 0.0
    assert respawn.pause(lived=0.0) == 0.0
