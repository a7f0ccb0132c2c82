"""Plain types are read as pydantic reads them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, NewType, Optional, TypedDict

import pytest
from pydantic import Field, TypeAdapter

from node_agent.behaviours.plain import plain_schema

Table = NewType("Table", str)


class Point(TypedDict):
    x: int


@pytest.mark.parametrize(
    "kind",
    [
        Any, bool, bytes, float, int, str, int | None, str | None | int, str | float,
        Optional[int],  # noqa: UP045 - another type than int | None
        list[int], list[str | None], dict[str, Any], dict[str, list[int]], dict[str, int | None] | None,
    ],
    ids=str,
)  # fmt: skip
def test_the_schema_of_a_plain_type_is_pydantics_own(kind: Any) -> None:
    assert plain_schema(kind) == TypeAdapter(kind).core_schema


@pytest.mark.parametrize(
    "kind",
    [
        datetime, list, dict, tuple[int, ...], set[int], list[datetime], dict[str, datetime], int | datetime,
        Literal["a"], Annotated[int, Field(gt=0)], Annotated[list[int], []], Table, Point, None,
    ],
    ids=str,
)  # fmt: skip
def test_every_other_type_is_pydantics_business(kind: Any) -> None:
    assert plain_schema(kind) is None
