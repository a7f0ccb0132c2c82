"""What a warden tells its launcher: when to die, and that all is over.

A SOCK_SEQPACKET socket pair.  The launcher holds a kernel timer that kills it, and with it the warden and
all workers, when the warden is not there to enforce a deadline: stopped, swapped out, spinning.  So the
timer must be set *before* a process exists that depends on it: an earlier moment than the one in force is
acknowledged.
"""

from __future__ import annotations

import enum
import select
import socket
import struct
from dataclasses import dataclass

GRACE = 0.1
"""Seconds after a hard deadline until the launcher's timer does what the warden should have done."""
_ACKNOWLEDGED_WITHIN = 1.0
_FORMAT = struct.Struct("<Bd")


class Kind(enum.IntEnum):
    """What a packet asks for."""

    ARM = 1
    ARM_AND_ACKNOWLEDGE = 2
    END = 3


@dataclass(frozen=True, slots=True)
class Order:
    """``value``: moment of CLOCK_BOOTTIME, 0 for never; for END the exit code."""

    kind: Kind
    value: float

    def packet(self) -> bytes:
        return _FORMAT.pack(self.kind, self.value)

    @classmethod
    def read(cls, packet: bytes) -> Order:
        """Return the order in ``packet``.  Raises ValueError."""
        try:
            kind, value = _FORMAT.unpack(packet)
        except struct.error as error:
            raise ValueError(f"not an order: {packet!r}") from error
        return cls(Kind(kind), value)


class LauncherSilent(Exception):
    """The launcher did not confirm in time that its timer is set."""


class Lifeline:
    """The warden's end."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.socket.setblocking(False)
        self._armed = 0.0

    def arm(self, when: float | None) -> None:
        """Have everything killed at ``when``, CLOCK_BOOTTIME, or never.

        Raises :class:`LauncherSilent` if that is earlier than before and was not confirmed within a second.
        """
        moment = when or 0.0
        if moment == self._armed:
            return
        if moment == 0.0 or 0.0 < self._armed < moment:
            self._send(Order(Kind.ARM, moment))
        else:
            order = Order(Kind.ARM_AND_ACKNOWLEDGE, moment)
            self._send(order)
            self._wait_for(order.packet())
        self._armed = moment

    def end(self, code: int) -> None:
        """Tell the launcher to exit with ``code`` when this process has ended."""
        self._send(Order(Kind.END, float(code)))

    def hears_end(self) -> bool:
        """Tell whether the launcher is dead; late acknowledgements are thrown away."""
        try:
            return self.socket.recv(64) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _send(self, order: Order) -> None:
        try:
            self.socket.send(order.packet())
        except OSError as error:
            raise LauncherSilent(f"the launcher does not take orders: {error.strerror}") from error

    def _wait_for(self, packet: bytes) -> None:
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        while poll.poll(_ACKNOWLEDGED_WITHIN * 1000):
            answer = self.socket.recv(64)
            if answer == packet:
                return
            if not answer:
                break
        raise LauncherSilent("the launcher does not confirm that its timer is set")
