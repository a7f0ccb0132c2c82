"""Golden files: wrong input beside exactly what is said about it.

A file is a list of cases, each a title line ``=== TITLE``, the input, a line ``---`` and the expected text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GOLDEN = Path(__file__).parent.parent / "unit" / "golden"


@dataclass(frozen=True, slots=True)
class Case:
    """One wrong input and its messages."""

    title: str
    text: str
    expected: str

    def __str__(self) -> str:
        return self.title


def cases(file: str) -> list[Case]:
    """Return the cases of a file below ``tests/unit/golden``."""
    found = []
    for block in (GOLDEN / file).read_text().split("=== ")[1:]:
        title, _, rest = block.partition("\n")
        text, _, expected = rest.partition("---\n")
        found.append(Case(title, text, expected.strip("\n")))
    return found
