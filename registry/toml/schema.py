"""Pydantic models of TOML tables, and their errors in the operator's words.

:func:`check` validates one table and returns either the model or every :class:`~registry.toml.source.Problem`
in it, each with its line, the value that was found and what to write instead.  The value types shared by the
agent's configuration and the children's specs live here too.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from registry import units
from registry.toml.source import Document, Path, Problem
from registry.toml.writer import value_text


class Table(BaseModel):
    """A TOML table: no unknown keys, no conversion between types.

    ``examples`` shows how a key that must be there is written; ``foreign`` maps other programs' keys to ours.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    examples: typing.ClassVar[Mapping[str, str]] = {}
    foreign: typing.ClassVar[Mapping[str, str]] = {}


T = TypeVar("T", bound=Table)
V = TypeVar("V")


def check(model: type[T], table: object, document: Document, at: Path = ()) -> tuple[T | None, list[Problem]]:
    """Validate ``table``, which stands at ``at``; return the model, or None and what is wrong."""
    try:
        return model.model_validate(table), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
    # A key that is missing because it is misspelt is one mistake, not two.
    meant = {
        (*place[:-1], _meant(_model_at(model, place[:-1]), str(place[-1])))
        for place in (each["loc"] for each in errors if each["type"] == "extra_forbidden")
    }
    kept = (each for each in errors if not (each["type"] == "missing" and each["loc"] in meant))
    return None, [_problem(each, model, document, at) for each in kept]


def wrong(message: str, hint: str = "", *, at: Path = ()) -> PydanticCustomError:
    """Return the error for a validator to raise; ``at`` leads from a table to the key it is about."""
    return PydanticCustomError("wrong", "{message}", {"message": message, "hint": hint, "at": at})


def show(value: object) -> str:
    """Return ``value`` as TOML would have it, cut to what fits in a message."""
    try:
        written = value_text(value)
    except TypeError:
        written = str(value)
    return written if len(written) <= 60 else f"{written[:50]} … {written[-5:]}"


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ``did you mean "..."?``, or an empty string; ``cutoff``: how alike they must be, up to 1."""
    close = _nearest(word, known, cutoff)
    return f'did you mean "{close}"?' if close else ""


def _nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), "")


_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}


def _problem(error: ErrorDetails, model: type[Table], document: Document, at: Path) -> Problem:
    place: Path = error["loc"]
    if place and place[-1] == "[key]":
        place = place[:-1]
    kind, value, path = error["type"], error["input"], (*at, *place)
    if kind == "wrong":
        found = error["ctx"]
        return document.problem((*path, *found["at"]), found["message"], found["hint"])
    if kind == "missing":
        example = _model_at(model, place[:-1]).examples.get(str(place[-1]), "")
        return document.problem(path, "is missing", f"write {example}" if example else "")
    if kind == "extra_forbidden":
        return document.problem(path, "unknown key", _known(_model_at(model, place[:-1]), str(place[-1])))
    if kind in _WANTED:
        return document.problem(
            path, f"must be {_WANTED[kind]}, not {show(value)}", _fixed(kind, value, path)
        )
    return document.problem(path, f"{show(value)}: {error['msg']}")


def _fixed(kind: str, value: object, path: Path = ()) -> str:
    if kind == "string_type" and isinstance(value, int | float | bool):
        return f'write "{show(value)}"'
    if kind == "list_type" and isinstance(value, dict):
        return f"write [[{'.'.join(step for step in path if isinstance(step, str))}]], with two brackets"
    if kind == "list_type":
        return f"write [{show(value)}]"
    if (
        kind in ("int_type", "bool_type")
        and isinstance(value, str)
        and re.fullmatch(r"\d+|true|false", value)
    ):
        return f"write {value}"
    return ""


def _known(model: type[Table], key: str) -> str:
    """Say what an unknown key probably meant."""
    if key in model.foreign:
        return f"here it is {model.foreign[key]}"
    return nearest(key, _keys(model)) or f"known here: {', '.join(_keys(model))}"


def _meant(model: type[Table], key: str) -> str:
    return model.foreign.get(key) or _nearest(key, _keys(model))


def _keys(model: type[Table]) -> list[str]:
    """Return the keys of a table, those that must be there first."""
    fields = sorted(model.model_fields.items(), key=lambda field: not field[1].is_required())
    return [field.alias or name for name, field in fields]


def _model_at(model: type[Table], path: Path) -> type[Table]:
    """Return the model of the table at ``path``."""
    kind: Any = model
    for step in path:
        if isinstance(kind, type) and issubclass(kind, Table):
            kind = kind.model_fields[str(step)].annotation
            parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
            kind = parts[0] if isinstance(kind, types.UnionType) else kind
        else:
            kind = typing.get_args(kind)[-1]
    assert isinstance(kind, type), f"{path} is no table of {model.__name__}"
    assert issubclass(kind, Table), f"{path} is no table of {model.__name__}"
    return kind


# Values.


def text(value: object) -> str:
    """Check text that is not empty."""
    if not isinstance(value, str):
        raise wrong(f"must be text, not {show(value)}", _fixed("string_type", value))
    if not value.strip():
        raise wrong("is empty")
    if "\0" in value:
        raise wrong("must not contain a NUL character")
    return value


def _duration(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise wrong(f"{value} has no unit", f'write "{value}s"')
    word = text(value)
    try:
        return units.parse_duration(word)
    except ValueError:
        fixed = units.almost_duration(word)
        hint = f'write "{fixed}"' if fixed else 'durations are "500ms", "30s", "5m", "1h"'
        raise wrong(f"{show(word)} is not a duration", hint) from None


def _positive_duration(value: object) -> float:
    seconds = _duration(value)
    if seconds <= 0:
        raise wrong(f"must be longer than 0, not {show(value)}")
    return seconds


LABEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def label(value: object) -> str:
    """Check a host, cluster, child, service or database name: lower case, up to 63 characters."""
    name = text(value)
    if LABEL.fullmatch(name):
        return name
    if len(name) > 63:
        raise wrong(f"{show(name)} has {len(name)} characters, 63 are allowed")
    fixed = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("._-")
    allowed = "allowed: a-z 0-9 . _ - and first a letter or digit"
    raise wrong(f"{show(name)} is not a usable name", f'write "{fixed}"; {allowed}' if fixed else allowed)


def one_of(known: Mapping[str, V], foreign: Mapping[str, str]) -> Callable[[object], V]:
    """Return a validator for a word out of ``known``; ``foreign`` maps other systems' words to ours."""

    def validate(value: object) -> V:
        word = str(value).lower() if isinstance(value, bool) else text(value)
        if word in known:
            return known[word]
        close = f'did you mean "{foreign[word]}"?' if word in foreign else nearest(word, known)
        words = ", ".join(f'"{word}"' for word in known)
        raise wrong(f"{show(word)} is none of {words}", close)

    return validate


def schema_version(value: object) -> int:
    """Accept the only version of the file format there is."""
    if value != 1 or isinstance(value, bool):
        raise wrong(f"{show(value)} is not a version this pgherd reads", "write schema = 1")
    return 1


Text = Annotated[str, BeforeValidator(text)]
Duration = Annotated[float, BeforeValidator(_duration)]
PositiveDuration = Annotated[float, BeforeValidator(_positive_duration)]
Label = Annotated[str, BeforeValidator(label)]
Schema = Annotated[int, BeforeValidator(schema_version)]
