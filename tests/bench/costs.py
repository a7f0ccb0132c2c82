"""What processes cost, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from node_agent.warden import kernel

AGENT = "pgherd: agent"
_TICKS = os.sysconf("SC_CLK_TCK")


def host_processes(launcher: int) -> tuple[int, int, int]:
    """Return the pids of launcher, warden and agent, without the workers beside the agent."""
    (warden,) = kernel.children(launcher)
    (agent,) = (pid for pid in kernel.children(warden) if _name(pid) == AGENT)
    return launcher, warden, agent


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return what these processes have computed since they were started, utime and stime."""
    return sum(_cpu_ticks(pid) for pid in pids) / _TICKS


def proportional_mb(pids: Iterable[int]) -> float:
    """Return their proportional set size in MiB: what is shared counts in part for each of its users."""
    return sum(_pss_kib(pid) for pid in pids) / 1024


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _pss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise ProcessLookupError(f"process {pid} has no memory any more")
