"""The real coordination store: etcd, reached over gRPC by asyncio.

Only the generated messages of ``python3-etcd3`` are used, never its clients: a name's ownership hangs on what
happens when a member dies, hangs, loses its quorum or is restored, and that is decided here, visibly.

| module | what |
| --- | --- |
| ``store`` | :class:`EtcdStore`, the operations of the port :class:`registry.store.Store` |
| ``watch`` | the watch that resumes where it was |
| ``members`` | channels, rotation, deadlines, login; what to do with an attempt that failed |
| ``history`` | has etcd been replaced or restored under us? |
| ``failures`` | what an error says about whether the request was executed |
| ``wire`` | plain values to and from etcd's messages; the only module that imports ``etcd3`` |

Production wants etcd 3.5.23 or 3.6: older ones revoke live leases after a pause of the leader, and lose watch
events (their CHANGELOGs at 3.4.24 to 3.4.38 and 3.5.8 to 3.5.23 list which).
"""

from __future__ import annotations

from registry.etcd.store import EtcdStore

__all__ = ["EtcdStore"]
