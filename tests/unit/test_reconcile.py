"""What etcd says a node owns against what it runs."""

from __future__ import annotations

from node_agent.reconcile import Idle, Stray, differences
from registry.ownership import Owner


def owner(name: str, node: str, epoch: int) -> Owner:
    return Owner(name, node, node.split("-")[0], epoch, "claim", 1, epoch)


def test_nothing_differs_when_every_own_key_has_its_process() -> None:
    owners = [owner("a", "alpha-1", 5), owner("b", "beta-1", 6)]
    assert differences(owners, "alpha-1", {"a": 5}, set()) == []


def test_a_key_without_a_process_and_a_process_without_a_key_are_found() -> None:
    owners = [owner("a", "alpha-1", 5), owner("b", "beta-1", 6)]
    found = differences(owners, "alpha-1", {"b": 4}, set())
    assert found == [Idle(owners[0]), Stray("b", 4)]


def test_a_process_at_another_epoch_than_its_key_is_both() -> None:
    mine = owner("a", "alpha-1", 9)
    assert differences([mine], "alpha-1", {"a": 5}, set()) == [Idle(mine), Stray("a", 5)]


def test_a_claim_or_release_under_way_is_left_alone() -> None:
    assert differences([owner("a", "alpha-1", 5)], "alpha-1", {"b": 4}, {"a", "b"}) == []
