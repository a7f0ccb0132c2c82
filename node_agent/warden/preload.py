"""What the warden imports once, so that everything it forks has it already, and whether that is still true.

The agent and the Python workers are forked from the warden's image: they start in milliseconds and share its
memory.  After an upgrade the image is old, so the agent is then executed anew: it must run the code on disk.
Importing starts no thread and opens nothing; what was imported is used only in the forked processes.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

AGENT_ENTRY = "node_agent.__main__:main"
WORKER_ENTRY = "node_agent.worker.main:run"
ALSO = ("node_agent.postgres.backend", "node_agent.daemons.sweeper")
"""Imported by a worker when it has databases, and because it is this daemon."""
_OURS = ("node_agent", "registry")


def load(entry: str) -> Callable[..., Any]:
    """Return the function that "module:function" names.  Raises ImportError or AttributeError."""
    module, _, function = entry.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


class Image:
    """The code in this process's memory, and the files it came from."""

    def __init__(self) -> None:
        self._stamps: dict[str, int] = {}

    def fill(self, *entries: str) -> str:
        """Import what the entries and :data:`ALSO` need; return what went wrong, empty if nothing did."""
        problem = ""
        try:
            for entry in entries:
                load(entry)
            for module in ALSO:
                importlib.import_module(module)
        except (ImportError, AttributeError, SyntaxError) as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            self._stamps = {path: _stamp(path) for path in _own_files()}
        # What is imported after a fork is looked for in the directories as they are then.
        importlib.invalidate_caches()
        gc.collect()
        gc.freeze()
        return problem

    def is_current(self) -> bool:
        """Return whether every file of ours is the one that was imported."""
        return bool(self._stamps) and all(_stamp(path) == seen for path, seen in self._stamps.items())


def _own_files() -> set[str]:
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in _OURS]
    return {path for module in modules if (path := getattr(module, "__file__", None))}


def _stamp(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
