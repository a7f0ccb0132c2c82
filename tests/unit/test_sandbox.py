"""What the sandbox starts again, and when."""

from __future__ import annotations

from node_agent.cli.sandbox import RESTART_AFTER, Revivals


def test_each_that_was_killed_is_started_again_in_its_own_time() -> None:
    revivals = Revivals()
    assert revivals.look([], 0.0) == ([], [])
    assert revivals.look(["alpha"], 1.0) == (["alpha"], [])
    assert revivals.look(["alpha", "etcd1"], 2.0) == (["etcd1"], [])
    assert revivals.look(["alpha", "etcd1"], 1.0 + RESTART_AFTER) == ([], ["alpha"])
    assert revivals.look(["etcd1"], 2.0 + RESTART_AFTER) == ([], ["etcd1"])
    assert revivals.look([], 3.0 + RESTART_AFTER) == ([], [])


def test_one_that_is_killed_again_is_told_and_waited_for_again() -> None:
    revivals = Revivals()
    revivals.look(["etcd1"], 0.0)
    revivals.look(["etcd1"], RESTART_AFTER)
    revivals.look([], RESTART_AFTER + 1)
    assert revivals.look(["etcd1"], RESTART_AFTER + 2) == (["etcd1"], [])


def test_one_that_was_started_by_hand_meanwhile_is_left_alone() -> None:
    revivals = Revivals()
    revivals.look(["etcd1"], 0.0)
    assert revivals.look([], RESTART_AFTER) == ([], [])
    assert revivals.look([], RESTART_AFTER + 1) == ([], [])
