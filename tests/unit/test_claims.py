"""When a host may claim an ownerless name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from node_agent.claims import (
    RESCHEDULE_BASE,
    RESCHEDULE_CAP,
    STAGGER,
    Due,
    Loss,
    NotHere,
    decide,
    penalties_of,
)
from node_agent.spec.child import parse
from node_agent.wishes import Wish
from registry.ownership import Owner, PlacementRecord
from registry.placement import Candidate
from registry.specs import Desired, SpecRecord

NAME = "ticker"


def wish(extra: str = "", *, desired: Desired = Desired.RUNNING, problem: str = "") -> Wish:
    text = f'schema = 1\n[[child]]\nid = "t"\nname = "{NAME}"\nrun.command = ["true"]\n{extra}'
    (spec,) = parse(text, "ticker.toml")
    record = SpecRecord(name=NAME, toml=text, desired=desired, who="anna", at=0.0, digest=spec.digest)
    return Wish(NAME, spec, desired is Desired.RUNNING, problem, record)


def hosts(*names: str) -> tuple[Candidate, ...]:
    return tuple(Candidate(name, f"{name}-1", {}, frozenset()) for name in names)


def lost(*, clean: bool) -> Loss:
    return Loss(Owner(NAME, "alpha-1", "alpha", 7, "c", 1, 7), 90.0, clean)


def due(
    host: str, wanted: Wish, *, penalties: Mapping[str, int] | None = None, loss: Loss | None = None
) -> Due:
    verdict = decide(wanted, host, hosts("alpha", "beta", "gamma"), penalties or {}, 100.0, loss)
    assert isinstance(verdict, Due)
    return verdict


PREFER = 'placement.prefer = ["beta", "alpha"]'


def test_the_first_choice_claims_at_once_and_each_further_one_a_little_later() -> None:
    times = {host: due(host, wish(PREFER)).at for host in ("beta", "alpha", "gamma")}
    assert times == {"beta": 100.0, "alpha": 100.0 + STAGGER, "gamma": 100.0 + 2 * STAGGER}


def test_lock_delay_holds_a_name_back_only_after_an_unclean_loss() -> None:
    wanted = wish(f'{PREFER}\nlock_delay = "2s"')
    assert due("beta", wanted).at == 100.0
    assert due("beta", wanted, loss=lost(clean=True)).at == 100.0
    assert due("beta", wanted, loss=lost(clean=False)).at == 102.0


def test_a_name_that_every_host_gave_up_waits_longer_each_time() -> None:
    once = due("beta", wish(PREFER), penalties={"alpha": 1, "beta": 1, "gamma": 1})
    often = due("beta", wish(PREFER), penalties={"alpha": 20, "beta": 20, "gamma": 20})
    assert once.at == 100.0 + RESCHEDULE_BASE
    assert often.at == 100.0 + RESCHEDULE_CAP


def test_no_host_goes_first_when_every_one_gave_up() -> None:
    """Else the second in order starts it at once, and it crashes round and round."""
    times = {
        host: due(host, wish(PREFER), penalties={"alpha": 2, "beta": 1, "gamma": 7}).at
        for host in ("beta", "alpha", "gamma")
    }
    assert times == {host: 100.0 + RESCHEDULE_BASE + place * STAGGER for place, host in enumerate(times)}


def test_a_changed_wish_is_tried_at_once_wherever_the_former_one_failed() -> None:
    placed = PlacementRecord(name=NAME, penalties={"alpha": 3}, mod_revision=5)
    assert penalties_of(placed, replace(wish().record, mod_revision=4)) == {"alpha": 3}
    assert penalties_of(placed, replace(wish().record, mod_revision=6)) == {}
    assert penalties_of(None, wish().record) == {}


def test_a_host_that_gave_up_comes_after_those_that_did_not() -> None:
    assert due("alpha", wish(PREFER), penalties={"beta": 1}).at == 100.0
    assert due("beta", wish(PREFER), penalties={"beta": 1}).at == 100.0 + 2 * STAGGER


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (wish(desired=Desired.STOPPED), "stopped by anna"),
        (wish(problem="no database app"), "no database app"),
        (wish('placement.require = { disk = "ssd" }'), 'it has no label disk, the spec requires "ssd"'),
    ],
)
def test_a_name_that_is_not_for_this_host_says_why(wanted: Wish, why: str) -> None:
    assert decide(wanted, "alpha", hosts("alpha"), {}, 100.0, None) == NotHere(NAME, why)


def test_a_host_that_is_not_ready_is_no_candidate() -> None:
    verdict = decide(wish(), "alpha", hosts("beta"), {}, 100.0, None)
    assert verdict == NotHere(NAME, "this host is not ready")
