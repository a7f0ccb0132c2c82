"""From ``module:Class`` in a spec to a behaviour class, with an error its author understands."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from node_agent.behaviours.interface import BadBehaviour, did_you_mean
from node_agent.behaviours.server import Server

OURS = ("registry", "node_agent")


def load(target: str, path: Sequence[str] = ()) -> type[Server]:
    """Import the class ``target`` names, looking into the directories of ``path`` first.

    Raises :class:`BadBehaviour` when there is no such class, with the cause where importing it failed.
    """
    module_name, _, class_name = target.partition(":")
    if not module_name or not class_name:
        raise BadBehaviour(f'behaviour "{target}" must be written "module:Class"')
    refuse_shadows(path)
    sys.path[:0] = [directory for directory in path if directory not in sys.path]
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise BadBehaviour(f"cannot import {module_name}: {_cause(error, path)}") from error
    behaviour = getattr(module, class_name, None)
    where = getattr(module, "__file__", None) or module_name
    if behaviour is None:
        servers = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Server)
        ]
        hint = did_you_mean(class_name, [name for name in servers if name != "Server"])
        raise BadBehaviour(f"{where} has no class {class_name}{f': {hint}' if hint else ''}")
    if not (isinstance(behaviour, type) and issubclass(behaviour, Server)):
        raise BadBehaviour(f"{class_name} in {where} is not a node_agent.behaviours.Server")
    return behaviour


def refuse_shadows(path: Sequence[str]) -> None:
    """Raise :class:`BadBehaviour` if a directory of ``path`` has modules with the names of ours.

    They would never be imported, because ours are in memory already: an import would silently get the wrong
    one.
    """
    for directory in path:
        for name in OURS:
            own = str(sys.modules[name].__file__)
            for theirs in (f"{directory}/{name}.py", f"{directory}/{name}/__init__.py"):
                if os.path.exists(theirs) and not os.path.samefile(theirs, own):
                    raise BadBehaviour(
                        f"{theirs} has the name of pgherd's own module {own}, and one process can have "
                        f"only one of them: rename it"
                    )


def _cause(error: BaseException, path: Sequence[str]) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if any(frame.filename.startswith(str(part)) for part in path)]
    place = f" ({inside[-1].filename}:{inside[-1].lineno})" if inside else ""
    text = str(error).splitlines()[0] if str(error) else "no message"
    return f"{type(error).__name__}: {text}{place}"
