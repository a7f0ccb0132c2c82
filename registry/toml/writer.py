"""Plain values as TOML text, in a form that does not depend on how they were written before.

Tables become ``[headers]`` down to ``depth``, inline tables below; keys keep the order of the mapping.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def key_text(key: str) -> str:
    """Return a key, quoted if it must be."""
    return key if _BARE.fullmatch(key) else _string(key)


def value_text(value: object) -> str:
    """Return a value on one line.  Raises TypeError for what neither TOML nor JSON has."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _string(value)
        case int() | float():
            return repr(value)
        case Mapping():
            pairs = ", ".join(f"{key_text(key)} = {value_text(item)}" for key, item in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"
        case Sequence():
            return f"[{', '.join(map(value_text, value))}]"
        case _:
            raise TypeError(f"{type(value).__name__} has no form in TOML")


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}
_SPECIAL = re.compile(r'["\\\x00-\x1f\x7f]')


def _string(text: str) -> str:
    return '"' + _SPECIAL.sub(lambda found: _ESCAPES.get(found[0], f"\\u{ord(found[0]):04x}"), text) + '"'


def pairs(table: Mapping[str, object]) -> Iterator[str]:
    """Yield ``key = value`` lines."""
    return (f"{key_text(key)} = {value_text(value)}" for key, value in table.items())
