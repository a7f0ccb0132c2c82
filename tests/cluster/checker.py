"""Decides from a history whether the promises were kept.  Pure.

    P1  the processes of one name never run at the same time, and their tokens only grow
    P2  no commit of a lower token after the first commit of a higher one
    P5  a refused request had no effect, an unknown one at most one, a replied call exactly one

A stopped process does not run.  An effect counts whenever it comes, also after its request was answered.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from tests.cluster.history import Call, Commit, Effect, History, Life, Token

_T = TypeVar("_T")
Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken."""

    promise: str
    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.promise} {self.name}: {self.what}"


def check(history: History) -> list[Violation]:
    """Return every broken promise, none when all is well."""
    return [
        *_each(history.lives, _one_at_a_time),
        *_each(history.lives, _tokens_grow),
        *_each(history.lives, _one_host_an_epoch),
        *_each(history.commits, _commits_in_order),
        *_outcomes(history.calls, (*history.effects,)),
        *_effects_of_the_living(history.lives, history.effects),
        *_each(history.calls, _answers_in_order),
    ]


def _each(
    records: Iterable[_T], judge: Callable[[str, Sequence[_T]], Iterator[Violation]]
) -> Iterator[Violation]:
    by_name: defaultdict[str, list[_T]] = defaultdict(list)
    for record in records:
        by_name[record.name].append(record)  # type: ignore[attr-defined]
    for name, mine in sorted(by_name.items()):
        yield from judge(name, mine)


# P1


def running(life: Life) -> list[Span]:
    """Return when a process ran: its life without its pauses."""
    end = math.inf if life.ended is None else life.ended
    spans, at = [], life.began
    for stopped, resumed in sorted(life.pauses):
        if stopped > at:
            spans.append((at, min(stopped, end)))
        at = max(at, math.inf if resumed is None else resumed)
        if at >= end:
            return spans
    return [*spans, (at, end)]


def _overlap(one: Life, other: Life) -> Span | None:
    for a in running(one):
        for b in running(other):
            begin, end = max(a[0], b[0]), min(a[1], b[1])
            if begin < end:
                return begin, end
    return None


def _one_at_a_time(name: str, lives: Sequence[Life]) -> Iterator[Violation]:
    ordered = sorted(lives, key=lambda life: life.began)
    for index, one in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if span := _overlap(one, other):
                lasted = "still do" if math.isinf(span[1]) else f"for {span[1] - span[0]:.3f} s"
                yield Violation(
                    "P1", name, f"{_who(one)} and {_who(other)} ran at once from {span[0]:.3f} on, {lasted}"
                )


def _tokens_grow(name: str, lives: Sequence[Life]) -> Iterator[Violation]:
    ordered = sorted(lives, key=lambda life: life.began)
    for before, after in pairwise(ordered):
        if after.token <= before.token:
            yield Violation("P1", name, f"{_who(after)} began after {_who(before)} without a higher token")


def _one_host_an_epoch(name: str, lives: Sequence[Life]) -> Iterator[Violation]:
    hosts: defaultdict[int, set[str]] = defaultdict(set)
    for life in lives:
        hosts[life.token.epoch].add(life.host)
    for epoch, where in sorted(hosts.items()):
        if len(where) > 1:
            yield Violation("P1", name, f"epoch {epoch} ran on {' and '.join(sorted(where))}")


# P2


def _commits_in_order(name: str, commits: Sequence[Commit]) -> Iterator[Violation]:
    highest = Token(0, 0)
    for commit in sorted(commits, key=lambda commit: commit.at):
        if commit.token < highest:
            yield Violation("P2", name, f"{commit.op} committed with {commit.token} after {highest} had")
        highest = max(highest, commit.token)


# P5

_ALLOWED = {
    ("call", "reply"): (1, 1),
    ("call", "refused"): (0, 0),
    ("call", "unknown"): (0, 1),
    # Accepted is not executed: the process may die in between.
    ("cast", "reply"): (0, 1),
    ("cast", "refused"): (0, 0),
    ("cast", "unknown"): (0, 1),
}


def _outcomes(calls: Iterable[Call], effects: Sequence[Effect]) -> Iterator[Violation]:
    times = Counter(effect.op for effect in effects)
    by = {effect.op: effect.token for effect in effects}
    asked = set()
    for call in calls:
        asked.add(call.op)
        least, most = _ALLOWED[call.kind, call.outcome]
        if not least <= times[call.op] <= most:
            yield Violation(
                "P5",
                call.name,
                f"{call.kind} {call.op} ended in {call.outcome}, executed {times[call.op]} times",
            )
        if call.token is not None and call.op in by and call.token != by[call.op]:
            yield Violation(
                "P5", call.name, f"{call.op} was executed by {by[call.op]}, the answer says {call.token}"
            )
    for op in sorted(times.keys() - asked):
        yield Violation("P5", "", f"{op} was executed and never asked for")


def _effects_of_the_living(lives: Iterable[Life], effects: Iterable[Effect]) -> Iterator[Violation]:
    known = {(life.name, life.token): life for life in lives}
    for effect in effects:
        life = known.get((effect.name, effect.token))
        if life is None or effect.at < life.began or (life.ended is not None and effect.at > life.ended):
            yield Violation(
                "P1", effect.name, f"{effect.op} has an effect by {effect.token}, which did not run"
            )


def _answers_in_order(name: str, calls: Sequence[Call]) -> Iterator[Violation]:
    """Who asks after an answer has come is never answered by somebody older."""
    answered = [call for call in calls if call.token is not None and call.finished is not None]
    by_finish = sorted(answered, key=lambda call: call.finished or 0.0)
    highest: Call | None = None
    index = 0
    for call in sorted(answered, key=lambda call: call.sent):
        while index < len(by_finish) and (by_finish[index].finished or 0.0) < call.sent:
            done = by_finish[index]
            if highest is None or _token(done) > _token(highest):
                highest = done
            index += 1
        if highest is not None and _token(call) < _token(highest):
            yield Violation(
                "P1", name, f"{call.op} was answered by {call.token} after {highest.op} by {highest.token}"
            )


def _token(call: Call) -> Token:
    assert call.token is not None
    return call.token


def _who(life: Life) -> str:
    return f"{life.token.epoch}.{life.token.start} on {life.host} (pid {life.pid})"
