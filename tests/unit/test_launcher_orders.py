"""The launcher's end of the lifeline."""

from __future__ import annotations

import socket

import pytest

from node_agent.launcher import Launcher
from node_agent.warden import kernel
from node_agent.warden.lifeline import Kind, Order


def test_an_order_is_followed_though_the_warden_has_died_since(monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[float | None] = []
    monkeypatch.setattr(kernel.SuicideTimer, "arm", lambda timer, when: armed.append(when))
    launcher = Launcher("agent.toml", ("true",), namespace=False, contained=False)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        theirs.send(Order(Kind.ARM_AND_ACKNOWLEDGE, 1e6).packet())
        theirs.close()
        assert launcher._hear(ours) is False
    assert armed == [1e6]
