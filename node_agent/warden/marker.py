"""The marks that tell whose a process is, in the environment it was executed with.

``PGHERD_WARDEN`` names the warden and the launcher above it, ``PGHERD_WORKER`` the worker.  Every process
below a warden has them unless it took care not to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from node_agent.warden import kernel

WARDEN_VARIABLE = "PGHERD_WARDEN"
WORKER_VARIABLE = "PGHERD_WORKER"
NO_WORKER = "0" * 32
"""Value of WORKER_VARIABLE in the warden itself: its forks overwrite it in place."""


@dataclass(frozen=True, slots=True)
class Marker:
    """Value of WARDEN_VARIABLE.

    ``namespace`` is the launcher's PID namespace: its ``launcher`` pid and ``started`` (clock ticks since
    boot) mean nothing in another one, and a container's herd must not look like a dead one's remains from
    outside.
    """

    warden: str
    namespace: int
    launcher: int
    started: int
    config: str

    @classmethod
    def new(cls, config: str) -> Marker:
        """Return the marker of a new warden of this launcher process."""
        pid = os.getpid()
        return cls(os.urandom(16).hex(), _own_namespace(), pid, kernel.start_ticks(pid), config)

    @classmethod
    def parse(cls, text: str) -> Marker:
        """Return the marker with this :meth:`text`.  Raises ValueError."""
        warden, namespace, launcher, started, config = text.split(":", 4)
        return cls(warden, int(namespace), int(launcher), int(started), config)

    def text(self) -> str:
        """Return the value of the variable."""
        return f"{self.warden}:{self.namespace}:{self.launcher}:{self.started}:{self.config}"

    def launcher_lives(self) -> bool:
        """Tell whether the launcher of this marker still runs."""
        return kernel.start_ticks(self.launcher) == self.started and not kernel.is_dying(self.launcher)


def marked(config: str) -> Iterator[tuple[int, Marker]]:
    """Yield the processes of any herd of this configuration whose launcher is, or was, in this namespace."""
    namespace = _own_namespace()
    for pid in kernel.processes():
        marker = _marker_of(pid)
        if marker is not None and marker.namespace == namespace and marker.config == config:
            yield pid, marker


def _marker_of(pid: int) -> Marker | None:
    prefix = f"{WARDEN_VARIABLE}=".encode()
    for variable in kernel.environment(pid):
        if variable.startswith(prefix):
            try:
                return Marker.parse(os.fsdecode(variable[len(prefix) :]))
            except ValueError:
                return None
    return None


def _own_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
