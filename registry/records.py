"""How a frozen record becomes a JSON value in etcd, and back.

The JSON holds what the key, its lease and its revision do not say already; those come from the key-value and
are the codec's ``outside`` fields.  Unknown members are ignored, so that an older agent reads what a newer
one wrote.  A value that does not fit is :class:`Malformed`, never a half-filled record.
"""

from __future__ import annotations

import json
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

R = TypeVar("R")


class Malformed(ValueError):
    """A value in etcd is not what its key says it should be; the text names the first thing that is wrong."""


class Codec(Generic[R]):
    """Encodes records of one frozen dataclass; equal records give equal bytes."""

    def __init__(self, kind: type[R], *, outside: tuple[str, ...] = ()) -> None:
        self._adapter = TypeAdapter(kind)
        self._outside = set(outside)

    def encode(self, record: R) -> bytes:
        """Return the JSON text of ``record`` without the outside fields."""
        value = self._adapter.dump_python(record, mode="json", exclude=self._outside)
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()

    def decode(self, value: bytes, **outside: Any) -> R:
        """Return the record.  Raises Malformed."""
        try:
            members = json.loads(value)
            if not isinstance(members, dict):
                raise Malformed(f"not a JSON object: {value[:80]!r}")
            return self._adapter.validate_python({**members, **outside})
        except Malformed:
            raise
        except ValueError as error:  # pydantic's ValidationError is one
            raise Malformed(_first_problem(error)) from error


def _first_problem(error: ValueError) -> str:
    problems = getattr(error, "errors", None)
    if problems is None:
        return f"not JSON: {error}"
    first = problems(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
