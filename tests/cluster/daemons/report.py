"""How a worker of a cluster test tells the observer what it is and what it does."""

from __future__ import annotations

import json
import socket
import time


class Report:
    """A connection to the observer; made before anything is done, and it waits for permission."""

    def __init__(self, observer: str, name: str, epoch: int, start: int, host: str) -> None:
        self._who = {"name": name, "epoch": epoch, "start": start, "host": host}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(observer)
        self._socket.send(json.dumps(self._who).encode())
        self._socket.recv(16)

    def did(self, op: str) -> None:
        """Say that ``op`` is executed now."""
        at = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._socket.send(json.dumps({**self._who, "op": op, "at": at}).encode())
