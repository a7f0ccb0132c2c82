"""The spec files of this host: every ``*.toml`` in its children directory, one bad child invalid alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from node_agent.spec.child import ChildSpec, parse_lenient
from registry.config import ConfigInvalid, Problem, read_text


@dataclass(frozen=True, slots=True)
class OwnChildren:
    """What the files say: the children that can be used, and every problem of the others."""

    specs: tuple[ChildSpec, ...]
    problems: tuple[Problem, ...]


def read_children(directory: Path, databases: Collection[str]) -> OwnChildren:
    """Read all spec files of a directory; none is fine.  The first of two children with one key counts."""
    specs: dict[str, ChildSpec] = {}
    problems: list[Problem] = []
    for path in sorted(directory.glob("*.toml")):
        try:
            found, wrong = parse_lenient(read_text(path), str(path), databases=databases)
        except ConfigInvalid as invalid:
            problems += invalid.problems
            continue
        problems += wrong
        for spec in found:
            key = spec.name or spec.id
            if key in specs:
                why = f"{key} is declared in {specs[key].source} already"
                problems.append(Problem(str(path), 0, key, why))
            else:
                specs[key] = spec
    return OwnChildren(tuple(specs.values()), tuple(problems))
