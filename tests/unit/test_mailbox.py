"""The bounded queue of a worker, and its memory of answers."""

from __future__ import annotations

from node_agent.worker.mailbox import Mailbox, Message, Put, Results
from registry.v1 import messages_pb2


def message(request: int = 1, *, size: int = 10, key: str = "", method: str = "work") -> Message:
    return Message(method, True, {}, deadline=5.0, key=key, request=request, size=size)


def answer(text: str = "1") -> messages_pb2.Frame:
    return messages_pb2.Frame(kind=messages_pb2.KIND_REPLY, json=text)


def test_messages_come_out_in_the_order_they_went_in() -> None:
    mailbox = Mailbox()
    for request in range(1, 4):
        assert mailbox.put(message(request)) is Put.TAKEN
    taken = [mailbox.take(), mailbox.take(), mailbox.take()]
    assert [each.request for each in taken if each is not None] == [1, 2, 3]
    assert mailbox.take() is None


def test_a_mailbox_refuses_more_messages_than_its_bound() -> None:
    mailbox = Mailbox(messages=2)
    assert [mailbox.put(message(n)) for n in range(3)] == [Put.TAKEN, Put.TAKEN, Put.FULL]
    mailbox.take()
    assert mailbox.put(message(9)) is Put.TAKEN


def test_a_mailbox_refuses_more_bytes_than_its_bound() -> None:
    mailbox = Mailbox(size=100)
    assert mailbox.put(message(1, size=60)) is Put.TAKEN
    assert mailbox.put(message(2, size=60)) is Put.FULL
    assert mailbox.waiting_bytes == 60
    mailbox.take()
    assert mailbox.put(message(2, size=60)) is Put.TAKEN


def test_the_daemons_own_timers_are_taken_beyond_the_bound() -> None:
    mailbox = Mailbox(messages=1)
    mailbox.put(message(1))
    assert mailbox.put(message(0), bounded=False) is Put.TAKEN


def test_a_taker_that_found_nothing_is_woken_once() -> None:
    mailbox = Mailbox()
    assert not mailbox.must_wake()
    assert mailbox.take() is None
    assert not mailbox.must_wake()
    mailbox.put(message(1))
    assert mailbox.must_wake()
    assert not mailbox.must_wake()


def test_a_busy_taker_is_not_woken() -> None:
    mailbox = Mailbox()
    mailbox.put(message(1))
    mailbox.take()
    mailbox.put(message(2))
    assert not mailbox.must_wake()


def test_a_cancelled_message_is_removed_and_its_bytes_are_free() -> None:
    mailbox = Mailbox()
    mailbox.put(message(1))
    mailbox.put(message(2))
    cancelled = mailbox.cancel(1)
    assert cancelled is not None
    assert cancelled.request == 1
    assert (len(mailbox), mailbox.waiting_bytes) == (1, 10)
    assert mailbox.cancel(1) is None


def test_a_message_that_others_have_joined_is_not_cancelled() -> None:
    mailbox = Mailbox()
    first = message(1)
    first.joined += (2,)
    mailbox.put(first)
    assert mailbox.cancel(1) is None
    assert len(mailbox) == 1


def test_a_message_can_be_taken_back_until_it_is_handled() -> None:
    mailbox = Mailbox()
    own = message(0)
    mailbox.put(own)
    assert mailbox.discard(own)
    assert not mailbox.discard(own)


def test_a_closed_mailbox_gives_back_what_is_left_and_takes_nothing() -> None:
    mailbox = Mailbox()
    mailbox.put(message(1))
    assert [left.request for left in mailbox.close()] == [1]
    assert mailbox.put(message(2)) is Put.CLOSED
    assert mailbox.put(message(2), bounded=False) is Put.CLOSED
    assert (len(mailbox), mailbox.waiting_bytes) == (0, 0)


def test_casts_and_timers_have_no_requests_to_answer() -> None:
    assert Message("work", False, {}, deadline=5.0, request=3).requests == []
    assert Message("work", True, {}, deadline=5.0).requests == []
    assert message(3).requests == [3]


def test_a_repeated_key_joins_the_first_while_it_runs() -> None:
    results = Results()
    first, second = message(1, key="k"), message(2, key="k")
    second.deadline = 9.0
    assert results.seen(first, 0.0) is False
    assert results.seen(second, 0.0) is True
    assert first.requests == [1, 2]
    assert first.deadline == 9.0


def test_a_repeated_key_gets_the_stored_answer() -> None:
    results = Results()
    first = message(1, key="k")
    results.seen(first, 0.0)
    results.answered(first, answer(), 0.0)
    assert results.seen(message(2, key="k"), 1.0) == answer()


def test_a_key_belongs_to_its_method() -> None:
    results = Results()
    results.seen(message(1, key="k"), 0.0)
    assert results.seen(message(2, key="k", method="other"), 0.0) is False


def test_a_key_that_was_not_executed_is_new_again() -> None:
    results = Results()
    first = message(1, key="k")
    results.seen(first, 0.0)
    results.forget(first)
    assert results.seen(message(2, key="k"), 0.0) is False


def test_answers_are_forgotten_after_their_time() -> None:
    results = Results(ttl=10.0)
    first = message(1, key="k")
    results.seen(first, 0.0)
    results.answered(first, answer(), 0.0)
    assert results.seen(message(2, key="k"), 9.9) == answer()
    assert results.seen(message(3, key="k"), 10.0) is False


def test_the_oldest_answers_go_when_there_are_too_many_or_they_are_too_large() -> None:
    few, small = Results(count=2), Results(size=80)
    for number in range(3):
        for results in (few, small):
            each = message(number, key=f"k{number}")
            results.seen(each, 0.0)
            results.answered(each, answer("x" * 40), 0.0)
    assert few.seen(message(9, key="k0"), 0.0) is False
    assert few.seen(message(9, key="k1"), 0.0) == answer("x" * 40)
    assert len(small) == 1
    assert small.seen(message(9, key="k2"), 0.0) == answer("x" * 40)


def test_messages_nobody_waits_for_any_more_make_room() -> None:
    mailbox = Mailbox(messages=3)
    kept, *late = (Message("m", True, {}, deadline, size=10) for deadline in (5.0, 1.0, 2.0))
    for message in (late[0], kept, late[1]):
        mailbox.put(message)
    assert mailbox.expired(3.0) == late
    assert (len(mailbox), mailbox.waiting_bytes) == (1, 10)
    assert mailbox.expired(3.0) == []
    assert mailbox.take() is kept
