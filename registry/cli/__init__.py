"""The command line: ``pgherd COMMAND``.

One module per topic, loaded when its command is used; commands of other packages come from the entry points
of the group ``pgherd.commands``.  A command either prints what it was asked for and returns, or raises;
:func:`main` is the only place that turns errors into messages and exit codes.
"""

from __future__ import annotations

from registry.cli.group import main

__all__ = ["main"]
