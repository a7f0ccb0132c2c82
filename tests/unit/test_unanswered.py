"""The agent's list of requests that a worker has not answered."""

from __future__ import annotations

from node_agent.unanswered import Request, Unanswered


def request(*, is_cast: bool = False, deadline: float = 5.0) -> Request:
    return Request("probe", deadline, lambda _: None, is_cast)


def test_an_answer_finds_its_request_once() -> None:
    unanswered = Unanswered(first_id=1000)
    first = request()
    number = unanswered.add(first)
    assert number > 1000
    assert unanswered.pop(number) is first
    assert unanswered.pop(number) is None


def test_casts_are_accepted_by_their_place_among_all_frames_written() -> None:
    unanswered = Unanswered(0)
    cast, call, later, unwritten = (
        unanswered.add(request(is_cast=True)),
        unanswered.add(request()),
        unanswered.add(request(is_cast=True)),
        unanswered.add(request(is_cast=True)),
    )
    for number in (cast, call, later):
        unanswered.written(number)
    assert [number for number, _ in unanswered.accepted(2)] == [cast]
    assert [number for number, _ in unanswered.accepted(3)] == [later]
    assert [number for number, _ in unanswered.accepted(99)] == []
    assert {number for number, _ in unanswered.drain()} == {call, unwritten}


def test_other_frames_count_too() -> None:
    unanswered = Unanswered(0)
    cast = unanswered.add(request(is_cast=True))
    unanswered.written(424242)
    unanswered.written(cast)
    assert list(unanswered.accepted(1)) == []
    assert [number for number, _ in unanswered.accepted(2)] == [cast]


def test_what_is_late_is_removed() -> None:
    unanswered = Unanswered(0)
    assert unanswered.next_deadline() is None
    early, late = unanswered.add(request(deadline=1.0)), unanswered.add(request(deadline=2.0, is_cast=True))
    assert unanswered.next_deadline() == 1.0
    assert [number for number, _ in unanswered.expired(1.0)] == [early]
    assert unanswered.next_deadline() == 2.0
    unanswered.written(late)
    assert [number for number, _ in unanswered.expired(3.0)] == [late]
    assert list(unanswered.accepted(5)) == []
    assert len(unanswered) == 0


def test_what_is_left_at_the_end_knows_whether_it_was_written() -> None:
    unanswered = Unanswered(0)
    written, kept = unanswered.add(request()), unanswered.add(request())
    unanswered.written(written)
    assert {number: bool(left.place) for number, left in unanswered.drain()} == {written: True, kept: False}
