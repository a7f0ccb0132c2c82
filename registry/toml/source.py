"""A TOML file whose values still know where they stand, and the problems found in it.

:func:`read` parses text with :mod:`tomllib`, which forgets positions.  Only when something is wrong is it
scanned once more for the line of every key: an agent reads thousands of good specs for a bad one.  Nothing
here knows what the keys mean.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from registry.toml.writer import key_text

Path = tuple[str | int, ...]
"""Keys and list positions from the top of a file to a value."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a file: where, what, and what to write instead.

    ``line`` counts from 1; 0 means the file as a whole.  ``key`` is dotted and may be empty.
    """

    source: str
    line: int
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = ":".join(part for part in (self.source, str(self.line or "")) if part)
        text = ": ".join(part for part in (where, self.key, self.message) if part)
        return f"{text} ({self.hint})" if self.hint else text


class ConfigInvalid(Exception):
    """A configuration or spec cannot be used; ``problems`` are all that were found, in the file's order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Document:
    """A parsed file."""

    source: str
    data: Mapping[str, Any]
    text: str = field(repr=False)

    @cached_property
    def lines(self) -> Mapping[Path, int]:
        """The line of every key, table and list element; looked for only when a problem is to be told."""
        return _Scanner(self.text.replace("\r\n", "\n")).scan()

    def line(self, path: Path) -> int:
        """Return the line of ``path``, or of the nearest table around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def key(self, path: Path) -> str:
        """Return ``path`` as people write it; a table in a list goes by its ``id``, or its number from 1."""
        text, value = "", self.data
        for step in path:
            value = _step(value, step)
            if isinstance(step, int):
                own = value.get("id") if isinstance(value, dict) else None
                text += f"[{own if isinstance(own, str) else step + 1}]"
            else:
                text += f".{key_text(step)}" if text else key_text(step)
        return text

    def problem(self, path: Path, message: str, hint: str = "") -> Problem:
        """Return what is wrong at ``path``."""
        return Problem(self.source, self.line(path), self.key(path), message, hint)


def _step(value: Any, step: str | int) -> Any:
    try:
        return value[step]
    except (KeyError, IndexError, TypeError):
        return None


def read(text: str, source: str) -> Document:
    """Parse a file's text; ``source`` is its name for people.  Raises ConfigInvalid."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigInvalid([_syntax_problem(text, source, str(error))]) from None
    return Document(source, data, text)


_PLACE = re.compile(
    r"^(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$", re.S
)


def _syntax_problem(text: str, source: str, error: str) -> Problem:
    lines = text.splitlines() or [""]
    if (place := _PLACE.match(error)) is None:
        return Problem(source, 0, "", f"not TOML: {error}")
    number = int(place["line"] or len(lines))
    line = lines[min(number, len(lines)) - 1]
    what = place["what"]
    return Problem(source, number, "", f"not TOML: {what[:1].lower()}{what[1:]}", _syntax_hint(what, line))


def _syntax_hint(what: str, line: str) -> str:
    assignment = re.match(r"\s*([\w.-]+)\s*=\s*(.*?)\s*$", line)
    if what == "Invalid value" and assignment and re.match(r"[A-Za-z/$~]", assignment[2]):
        return f'text is written in quotes: {assignment[1]} = "{assignment[2]}"'
    if what == "Invalid value" and re.search(r",\s*\}", line):
        return "no comma before }"
    if "{" in line and "}" not in line:
        return "{ } must stand on one line; several lines are written as a [table]"
    if re.match(r"\s*[\w.-]+\s*:", line):
        return "a key is followed by =, not by :"
    if what.startswith(("Cannot overwrite", "Cannot declare", "Cannot mutate")):
        return "it is there twice"
    return f"the line is: {line.strip()}" if line.strip() else ""


class _Scanner:
    """Finds the line of every key in text that is known to be valid TOML."""

    _blank = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
    _part = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*'""")
    _dot = re.compile(r"[ \t]*\.[ \t]*")
    _scalar = re.compile(
        r'"""(?:\\.|[^\\])*?"""(?:"{0,2})'
        r"|'''.*?'''(?:'{0,2})"
        r'|"(?:\\.|[^"\\])*"'
        r"|'[^']*'"
        r"|\d{4}-\d\d-\d\d \d\d:[^,\]}\s#]*"
        r"|[^,\[\]{}\s#]+",
        re.S,
    )

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._breaks = [match.start() for match in re.finditer("\n", text)]
        self._tables: dict[Path, int] = {}
        self._lines: dict[Path, int] = {}

    def scan(self) -> Mapping[Path, int]:
        table: Path = ()
        while self._at() is not None:
            table = self._header() if self._at() == "[" else self._pair(table)
        return self._lines

    def _at(self) -> str | None:
        """Skip blanks and comments; return the next character, None at the end."""
        self._skip(self._blank)
        return self._text[self._position] if self._position < len(self._text) else None

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._position)
        assert match is not None, f"tomllib accepted what the scanner does not understand at {self._position}"
        self._position = match.end()
        return match.group()

    def _note(self, path: Path, line: int) -> None:
        for end in range(1, len(path) + 1):
            self._lines.setdefault(path[:end], line)

    def _line(self) -> int:
        return bisect_right(self._breaks, self._position - 1) + 1

    def _keys(self) -> list[str]:
        keys = []
        while True:
            part = self._skip(self._part)
            keys.append(next(iter(tomllib.loads(f"{part}=0"))) if part[0] in "\"'" else part)
            if not self._dot.match(self._text, self._position):
                return keys
            self._skip(self._dot)

    def _header(self) -> Path:
        """Pass ``[table]`` or ``[[table]]``; return the path of what follows it."""
        line = self._line()
        brackets = 2 if self._text.startswith("[[", self._position) else 1
        self._position += brackets
        self._at()
        keys = self._keys()
        self._at()
        self._position += brackets
        path: Path = ()
        for last, key in ((index == len(keys) - 1, key) for index, key in enumerate(keys)):
            path = (*path, key)
            if last and brackets == 2:
                self._tables[path] = self._tables.get(path, 0) + 1
            if path in self._tables:
                path = (*path, self._tables[path] - 1)
        self._note(path, line)
        return path

    def _pair(self, table: Path) -> Path:
        """Pass ``key = value``; return the table it belongs to."""
        line = self._line()
        path = (*table, *self._keys())
        self._note(path, line)
        self._at()
        self._position += 1
        self._value(path)
        return table

    def _value(self, path: Path) -> None:
        opening = self._at()
        if opening not in ("[", "{"):
            self._skip(self._scalar)
            return
        self._position += 1
        element = 0
        while (here := self._at()) not in ("]", "}"):
            if here == ",":
                self._position += 1
            elif opening == "{":
                self._pair(path)
            else:
                self._note((*path, element), self._line())
                self._value((*path, element))
                element += 1
        self._position += 1
