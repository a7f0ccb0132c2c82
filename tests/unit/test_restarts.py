"""Restarting as OTP's supervisor does, with a pause of our own."""

from __future__ import annotations

import itertools
import json
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent.restarts import (
    Again,
    Decision,
    Exit,
    Finished,
    GiveUp,
    Restart,
    RestartWindow,
    classify,
    decide,
    pause,
)

CRASH = Exit.ABNORMAL


@pytest.mark.parametrize(
    ("restart", "exit", "again"),
    [
        (Restart.PERMANENT, Exit.NORMAL, True),
        (Restart.PERMANENT, Exit.ABNORMAL, True),
        (Restart.PERMANENT, Exit.START_FAILED, True),
        (Restart.TRANSIENT, Exit.NORMAL, False),
        (Restart.TRANSIENT, Exit.ABNORMAL, True),
        (Restart.TRANSIENT, Exit.START_FAILED, True),
        (Restart.TEMPORARY, Exit.NORMAL, False),
        (Restart.TEMPORARY, Exit.ABNORMAL, False),
        (Restart.TEMPORARY, Exit.START_FAILED, False),
    ],
)
def test_the_restart_type_and_the_way_it_ended_decide(restart: Restart, exit: Exit, again: bool) -> None:
    decision = decide(restart, exit, RestartWindow(5, 60), 1000, 0.5)
    assert isinstance(decision, Again if again else Finished)


@pytest.mark.parametrize("restart", Restart)
@pytest.mark.parametrize("exit", [Exit.SUPERSEDED, Exit.STOPPED])
def test_a_superseded_or_stopped_child_is_never_restarted(restart: Restart, exit: Exit) -> None:
    assert isinstance(decide(restart, exit, RestartWindow(0, 60), 1000, 0.5), Finished)


def test_why_it_is_not_restarted_is_said() -> None:
    window = RestartWindow(1, 10)
    assert decide(Restart.TRANSIENT, Exit.NORMAL, window, 0, 0) == Finished(
        "ended normally, and it is transient"
    )
    assert decide(Restart.TEMPORARY, CRASH, window, 0, 0) == Finished("ended abnormally, and it is temporary")
    assert decide(Restart.PERMANENT, CRASH, window.record(0), 1, 0) == GiveUp(
        "ended abnormally 2 times within 10 s, 1 restart allowed", window
    )


def test_with_intensity_zero_the_first_crash_is_the_last() -> None:
    assert isinstance(decide(Restart.PERMANENT, CRASH, RestartWindow(0, 60), 1000, 0.5), GiveUp)


def test_a_restart_exactly_one_period_ago_still_counts() -> None:
    window = RestartWindow(1, 60).record(1000)
    assert isinstance(decide(Restart.PERMANENT, CRASH, window, 1060, 0), GiveUp)
    assert isinstance(decide(Restart.PERMANENT, CRASH, window, 1060.001, 0), Again)


def test_the_first_restart_is_immediate_and_the_next_wait_twice_as_long_each_time() -> None:
    window = RestartWindow(100, 3600)
    delays = []
    for number in range(10):
        decision = decide(Restart.PERMANENT, CRASH, window, number, 0.5)
        assert isinstance(decision, Again)
        delays.append(decision.delay)
        window = decision.window
    assert delays == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_after_a_minute_of_health_the_next_restart_is_immediate_again() -> None:
    window = RestartWindow(100, 3600, (1.0, 2.0, 3.0), streak=3)
    nearly = decide(Restart.PERMANENT, CRASH, window, 70, 0.5, healthy_for=59.9)
    healthy = decide(Restart.PERMANENT, CRASH, window, 70, 0.5, healthy_for=60)
    assert isinstance(nearly, Again)
    assert isinstance(healthy, Again)
    assert (nearly.delay, healthy.delay) == (4, 0)
    assert healthy.window.times == (1.0, 2.0, 3.0, 70), "health does not refill the budget, time does"


def test_a_child_that_is_started_after_it_gave_up_has_its_whole_budget() -> None:
    decision = decide(Restart.PERMANENT, CRASH, RestartWindow(1, 60, (5.0,), streak=1), 6, 0.5)
    assert isinstance(decision, GiveUp)
    assert decision.window == RestartWindow(1, 60)


@given(st.integers(2, 10**6), st.floats(0, 1, exclude_max=True))
def test_the_pause_is_jittered_by_a_fifth_and_bounded(streak: int, random: float) -> None:
    middle = min(2.0 ** min(streak - 2, 6), 60)
    assert middle * 0.8 <= pause(streak, random) <= middle * 1.2


def naive_otp(
    restart: Restart, intensity: int, period: int, ends: list[tuple[int, Exit]]
) -> list[type[Decision]]:
    """OTP's supervisor read from its manual, one child: what happens at each end, until it is over."""
    restarted_at: list[int] = []
    history: list[type[Decision]] = []
    for now, exit in ends:
        normal = exit is Exit.NORMAL
        if exit in (Exit.STOPPED, Exit.SUPERSEDED) or restart is Restart.TEMPORARY:
            return [*history, Finished]
        if restart is Restart.TRANSIENT and normal:
            return [*history, Finished]
        restarted_at.append(now)
        if sum(1 for then in restarted_at if now - then <= period) > intensity:
            return [*history, GiveUp]
        history.append(Again)
    return history


@given(
    st.sampled_from(Restart),
    st.integers(0, 4),
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from([Exit.NORMAL, *[CRASH] * 5, *Exit])), max_size=30),
    st.floats(0, 1, exclude_max=True),
    st.booleans(),
)
def test_it_decides_as_otp_does(
    restart: Restart,
    intensity: int,
    period: int,
    steps: list[tuple[int, Exit]],
    random: float,
    agent_restarts: bool,
) -> None:
    times = itertools.accumulate(wait for wait, _ in steps)
    ends = list(zip(times, (exit for _, exit in steps), strict=True))
    window = RestartWindow(intensity, period)
    history: list[type[Decision]] = []
    for now, exit in ends:
        decision = decide(restart, exit, window, now, random)
        history.append(type(decision))
        if not isinstance(decision, Again):
            break
        window = decision.window
        if agent_restarts:
            window = RestartWindow.from_json(intensity, period, json.loads(json.dumps(window.to_json())))
        assert window == decision.window
    assert history == naive_otp(restart, intensity, period, ends)


def test_the_window_survives_with_the_limits_of_a_new_spec() -> None:
    kept = RestartWindow(5, 60, (1.0, 2.5), streak=4).to_json()
    assert RestartWindow.from_json(9, 30, kept) == RestartWindow(9, 30, (1.0, 2.5), streak=4)
    assert RestartWindow.from_json(9, 30, []) == RestartWindow(9, 30)


@given(st.integers(0, 5), st.lists(st.integers(0, 10**6), max_size=50))
def test_the_window_never_grows_beyond_its_budget(intensity: int, gaps: list[int]) -> None:
    window, now = RestartWindow(intensity, 60), 0
    for gap in gaps:
        now += gap
        decision = decide(Restart.PERMANENT, CRASH, window, now, 0.5)
        assert not isinstance(decision, Finished)
        window = decision.window
        assert len(window.times) <= intensity


@pytest.mark.parametrize(
    ("code", "killed_by", "exit"),
    [
        (0, None, Exit.NORMAL),
        (1, None, Exit.ABNORMAL),
        (3, None, Exit.NORMAL),
        (75, None, Exit.SUPERSEDED),
        (None, signal.SIGINT, Exit.NORMAL),
        (None, signal.SIGKILL, Exit.ABNORMAL),
        (None, signal.SIGRTMIN + 5, Exit.ABNORMAL),
        (0, 0, Exit.NORMAL),
    ],
)
def test_an_exit_is_judged_by_what_the_spec_calls_success(
    code: int | None, killed_by: int | None, exit: Exit
) -> None:
    assert classify(code, killed_by, {0, 3, "SIGINT"}, asked_to_stop=False) is exit


@pytest.mark.parametrize(("code", "killed_by"), [(0, None), (1, None), (75, None), (None, signal.SIGKILL)])
def test_what_was_asked_to_stop_has_stopped(code: int | None, killed_by: int | None) -> None:
    assert classify(code, killed_by, {0}, asked_to_stop=True) is Exit.STOPPED


def test_a_program_that_knows_nothing_of_owners_can_exit_with_any_code() -> None:
    assert classify(75, None, {0}, asked_to_stop=False, superseded_code=None) is Exit.ABNORMAL
    assert classify(75, None, {75}, asked_to_stop=False, superseded_code=None) is Exit.NORMAL
