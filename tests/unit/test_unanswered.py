"""The agent's list of requests that a worker has not answered."""

from __future__ import annotations

from node_agent.unanswered import Request, Unanswered


def request(*, is_cast: bool = False, deadline: float = 5.0) -> Request:
    return Request("probe", deadline, lambda _: None, is_cast)


def add(unanswered: Unanswered, added: Request) -> int:
    number = unanswered.next_id
    unanswered.add(added)
    return number


def test_an_answer_finds_its_request_once() -> None:
    unanswered = Unanswered(first_id=1000)
    first = request()
    number = add(unanswered, first)
    assert number > 1000
    assert unanswered.pop(number) is first
    assert unanswered.pop(number) is None


def test_casts_are_accepted_by_their_place_among_all_frames_written() -> None:
    unanswered = Unanswered(0)
    cast, call, later = (
        add(unanswered, request(is_cast=True)),
        add(unanswered, request()),
        add(unanswered, request(is_cast=True)),
    )
    unanswered.written()
    unwritten = add(unanswered, request(is_cast=True))
    assert [number for number, _ in unanswered.accepted(2)] == [cast]
    assert [number for number, _ in unanswered.accepted(3)] == [later]
    assert [number for number, _ in unanswered.accepted(99)] == []
    assert {number for number, _ in unanswered.drain()} == {call, unwritten}


def test_other_frames_count_too() -> None:
    unanswered = Unanswered(0)
    unanswered.add_other()
    cast = add(unanswered, request(is_cast=True))
    unanswered.written()
    assert list(unanswered.accepted(1)) == []
    assert [number for number, _ in unanswered.accepted(2)] == [cast]


def test_what_is_late_is_removed() -> None:
    unanswered = Unanswered(0)
    assert unanswered.next_deadline() is None
    early = add(unanswered, request(deadline=1.0))
    late = add(unanswered, request(deadline=2.0, is_cast=True))
    assert unanswered.next_deadline() == 1.0
    assert [number for number, _ in unanswered.expired(1.0)] == [early]
    assert unanswered.next_deadline() == 2.0
    unanswered.written()
    assert [number for number, _ in unanswered.expired(3.0)] == [late]
    assert list(unanswered.accepted(5)) == []
    assert len(unanswered) == 0


def test_what_is_left_at_the_end_knows_whether_it_was_written() -> None:
    unanswered = Unanswered(0)
    written = add(unanswered, request())
    unanswered.written()
    kept = add(unanswered, request())
    assert {number: unanswered.is_written(left) for number, left in unanswered.drain()} == {
        written: True,
        kept: False,
    }
