"""Has etcd been replaced, or restored from a snapshot, under our feet?

A restore keeps the cluster id when nobody changes the token, old leases go on being renewed, and a watch
from a revision of the lost future is silent.  Only the revision tells: nothing else makes it go backwards.
"""

from __future__ import annotations

from registry.errors import StoreRestored
from registry.etcd.wire import Message
from registry.store import Revision


class History:
    """What the response headers have shown.  Once broken it stays so: everything known is void."""

    def __init__(self) -> None:
        self.highest: Revision = 0
        self._cluster = 0
        self._broken = ""

    def admit(self, header: Message, floor: Revision) -> bool:
        """Take note of a header; ``floor`` is :attr:`highest` as of the moment the request was sent.

        Return False if the revision is too old: a member that lags, or a restore; one linearizable read
        tells.  Raises StoreRestored.
        """
        self.check()
        if self._cluster and header.cluster_id != self._cluster:
            self._break(f"cluster id is {header.cluster_id:x}, it was {self._cluster:x}")
        self._cluster = header.cluster_id
        self.highest = max(self.highest, header.revision)
        return bool(header.revision >= floor)

    def confirm(self, header: Message, floor: Revision) -> None:
        """Judge the header of a linearizable read.  Raises StoreRestored."""
        if not self.admit(header, floor):
            self._break(f"revision is {header.revision}, {floor} was seen before")

    def check(self) -> None:
        """Raise StoreRestored if the history is broken."""
        if self._broken:
            raise StoreRestored(self._broken)

    def _break(self, why: str) -> None:
        self._broken = f"etcd was restored or replaced: {why}"
        self.check()
