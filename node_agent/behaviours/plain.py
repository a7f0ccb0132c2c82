"""How JSON values of plain types are read: what pydantic would say, without asking it.

Pydantic takes milliseconds to find out, and most of it in a freshly forked process, where every object it
looks at costs a page; a restarted worker has callers waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic_core import SchemaValidator
from pydantic_core.core_schema import CoreSchema

_PLAIN: tuple[tuple[Any, CoreSchema], ...] = (
    (Any, {"type": "any"}),
    (bool, {"type": "bool"}),
    (bytes, {"type": "bytes"}),
    (float, {"type": "float"}),
    (int, {"type": "int"}),
    (str, {"type": "str"}),
)


def plain_schema(kind: Any) -> CoreSchema | None:
    """Return pydantic's schema of a plain type, or of a list, dict or union of such; None for any other."""
    # Compared by identity: an annotation may be of any type, and equal to anything.
    for plain, schema in _PLAIN:
        if kind is plain:
            return schema
    match get_origin(kind), get_args(kind):
        case (origin, kinds) if origin is Union or origin is UnionType:
            return _union([part for part in kinds if part is not type(None)], nullable=type(None) in kinds)
        case (origin, (item,)) if origin is list and (items := plain_schema(item)):
            return {"type": "list", "items_schema": items}
        case (origin, (key, value)) if origin is dict:
            keys, values = plain_schema(key), plain_schema(value)
            return {"type": "dict", "keys_schema": keys, "values_schema": values} if keys and values else None
        case _:
            return None


def _union(kinds: list[Any], *, nullable: bool) -> CoreSchema | None:
    choices = [schema for kind in kinds if (schema := plain_schema(kind))]
    if len(choices) < len(kinds):
        return None
    whole: CoreSchema = choices[0] if len(choices) == 1 else {"type": "union", "choices": [*choices]}
    return {"type": "nullable", "schema": whole} if nullable else whole


def plain_reader(members: Mapping[str, tuple[CoreSchema, bool]]) -> Callable[[str], Any]:
    """Return what reads the text of a JSON object with these members: the schema of each, and if it must be.

    It raises pydantic's ValidationError.
    """
    return SchemaValidator(
        {
            "type": "typed-dict",
            "fields": {
                name: {"type": "typed-dict-field", "schema": schema, "required": required}
                for name, (schema, required) in members.items()
            },
            "extra_behavior": "forbid",
            "config": {"strict": True},
        }
    ).validate_json
