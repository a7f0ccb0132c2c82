"""The checker itself: it accepts what is right, and finds what is wrong."""

from __future__ import annotations

import pytest

from tests.cluster.checker import check, running
from tests.cluster.history import Call, Commit, Effect, History, Life, Token

A1, A2, B1 = Token(7, 1), Token(7, 2), Token(9, 1)


def life(token: Token, began: float, ended: float | None, host: str = "alpha", **more: object) -> Life:
    return Life("n", token, host, 100 + token.epoch, began, ended, **more)  # type: ignore[arg-type]


def promises(history: History) -> list[str]:
    return [violation.promise for violation in check(history)]


def test_a_restart_and_a_move_are_fine() -> None:
    lives = (life(A1, 1, 2), life(A2, 2, 3), life(B1, 3.5, None, "beta"))
    assert check(History(lives=lives)) == []


@pytest.mark.parametrize(
    "lives",
    [
        pytest.param((life(A1, 1, 3), life(B1, 2.999, None, "beta")), id="overlap of two owners"),
        pytest.param((life(A1, 1, 3), life(A2, 2, None)), id="overlap of two starts"),
        pytest.param((life(A1, 1, None), life(B1, 2, 3, "beta")), id="the old one still runs"),
        pytest.param((life(B1, 1, 2, "beta"), life(A1, 3, 4)), id="the epoch goes back"),
        pytest.param((life(A2, 1, 2), life(A1, 3, 4)), id="the start goes back"),
        pytest.param((life(A1, 1, 2), life(A1, 3, 4)), id="a token twice"),
        pytest.param((life(A1, 1, 2), life(A2, 3, 4, "beta")), id="an epoch on two hosts"),
        pytest.param(
            (life(A1, 1, 9, pauses=((2, 6),)), life(B1, 5, None, "beta")), id="it resumes beside the next"
        ),
    ],
)
def test_two_owners_are_found(lives: tuple[Life, ...]) -> None:
    assert set(promises(History(lives=lives))) == {"P1"}


def test_a_stopped_process_does_not_run() -> None:
    frozen = life(A1, 1, 20, pauses=((2, 20),))
    assert check(History(lives=(frozen, life(B1, 8, None, "beta")))) == []
    assert running(frozen) == [(1, 2)]
    assert running(life(A1, 1, 5, pauses=((2, 3),))) == [(1, 2), (3, 5)]
    assert running(life(A1, 1, None, pauses=((2, None),))) == [(1, 2)]


def test_other_names_do_not_matter() -> None:
    other = Life("m", Token(8, 1), "beta", 5, 1, None)
    assert check(History(lives=(life(A1, 1, None), other))) == []


def test_a_late_commit_of_a_former_owner_is_found() -> None:
    good = (Commit("a", "n", A1, 1), Commit("b", "n", A2, 2), Commit("c", "n", B1, 3))
    assert check(History(commits=good)) == []
    assert promises(History(commits=(*good, Commit("d", "n", A2, 4)))) == ["P2"]


def outcome(kind: str, what: str, effects: int) -> History:
    call = Call("x", "n", kind, 1, 2, what, A1 if what == "reply" else None)
    return History(
        lives=(life(A1, 0, None),),
        calls=(call,),
        effects=tuple(Effect("x", "n", A1, 1.5) for _ in range(effects)),
    )


@pytest.mark.parametrize(
    ("kind", "what", "effects", "fine"),
    [
        ("call", "reply", 1, True),
        ("call", "reply", 0, False),
        ("call", "reply", 2, False),
        ("call", "refused", 0, True),
        ("call", "refused", 1, False),
        ("call", "unknown", 0, True),
        ("call", "unknown", 1, True),
        ("call", "unknown", 2, False),
        ("cast", "reply", 0, True),
        ("cast", "reply", 2, False),
        ("cast", "refused", 1, False),
    ],
)
def test_the_outcome_says_how_often_it_was_executed(kind: str, what: str, effects: int, fine: bool) -> None:
    assert promises(outcome(kind, what, effects)) == ([] if fine else ["P5"])


def test_an_effect_of_somebody_who_does_not_run_is_found() -> None:
    call = Call("x", "n", "call", 1, 9, "unknown")
    dead = History(lives=(life(A1, 0, 2),), calls=(call,), effects=(Effect("x", "n", A1, 3),))
    assert promises(dead) == ["P1"]


def test_an_answer_by_another_process_than_the_one_that_executed_is_found() -> None:
    call = Call("x", "n", "call", 1, 2, "reply", A2)
    history = History(lives=(life(A1, 0, None),), calls=(call,), effects=(Effect("x", "n", A1, 1.5),))
    assert promises(history) == ["P5"]


def test_an_effect_nobody_asked_for_is_found() -> None:
    history = History(lives=(life(A1, 0, None),), effects=(Effect("x", "n", A1, 1.5),))
    assert promises(history) == ["P5"]


def test_answers_do_not_go_back_in_time() -> None:
    lives = (life(A1, 0, 5), life(B1, 5, None, "beta"))
    effects = (Effect("x", "n", B1, 6), Effect("y", "n", A1, 4))
    first = Call("x", "n", "call", 5.5, 6.5, "reply", B1)
    together = Call("y", "n", "call", 3, 7, "reply", A1)
    after = Call("y", "n", "call", 6.6, 7, "reply", A1)
    assert check(History(lives=lives, effects=effects, calls=(first, together))) == []
    assert promises(History(lives=lives, effects=effects, calls=(first, after))) == ["P1"]
