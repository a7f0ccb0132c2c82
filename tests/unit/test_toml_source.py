"""Every key of a TOML file is found on the line where it is written."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.toml.source import ConfigInvalid, Path, read
from registry.toml.writer import key_text, pairs, value_text

TEXT = '''\
# a comment with [brackets] and "quotes" = x
title = "first"

[owner]  # [not.this]
name.first = "A"
"quoted key" = 'single "quoted"'
multi = """
[not.a.table]
key = "x" \\"""
"""
literal = \'\'\'
]] }}
\'\'\'
when = 1979-05-27 07:32:00
inline = { a = 1, b = { c = [1,
  2] } }

[[child]]
id = "a" # comment
list = [
  "x", # one, two
  # only a comment
  "]",
  [3, [4]],
]

  [[ child . stop ]]
  signal = "INT"
  [[child.stop]]
  signal = "TERM"
  [child.env]
  A = "1"

[[child]]
id = "b"
[child.stop_at]
x = 1
[a.b."c.d"]
e = true
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("title",), 2),
        (("owner",), 4),
        (("owner", "name"), 5),
        (("owner", "name", "first"), 5),
        (("owner", "quoted key"), 6),
        (("owner", "multi"), 7),
        (("owner", "literal"), 11),
        (("owner", "when"), 14),
        (("owner", "inline", "a"), 15),
        (("owner", "inline", "b", "c", 1), 16),
        (("child", 0), 18),
        (("child", 0, "id"), 19),
        (("child", 0, "list", 0), 21),
        (("child", 0, "list", 1), 23),
        (("child", 0, "list", 2, 1, 0), 24),
        (("child", 0, "stop", 0), 27),
        (("child", 0, "stop", 0, "signal"), 28),
        (("child", 0, "stop", 1, "signal"), 30),
        (("child", 0, "env", "A"), 32),
        (("child", 1), 34),
        (("child", 1, "stop_at", "x"), 37),
        (("a", "b"), 38),
        (("a", "b", "c.d", "e"), 39),
    ],
)
def test_a_key_is_found_on_its_line(path: Path, line: int) -> None:
    assert read(TEXT, "x.toml").line(path) == line


def test_a_key_that_is_not_written_is_said_to_be_missing_in_its_table() -> None:
    document = read(TEXT, "x.toml")
    assert document.line(("child", 1, "name")) == 34
    assert document.line(("nothing", "at", "all")) == 1


def test_lines_do_not_depend_on_how_lines_end() -> None:
    assert read(TEXT.replace("\n", "\r\n"), "x.toml").lines == read(TEXT, "x.toml").lines


def test_a_problem_reads_like_the_messages_of_a_compiler() -> None:
    document = read(TEXT, "x.toml")
    problem = document.problem(("child", 0, "stop", 1, "signal"), "no such signal", "write SIGTERM")
    assert str(problem) == "x.toml:30: child[a].stop[2].signal: no such signal (write SIGTERM)"


@pytest.mark.parametrize("text", ["a = ", "[a", 'a = "', "a = [1,\n", "= 1", "a = 1\na = 2", "\0"])
def test_text_that_is_not_toml_is_one_problem(text: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        read(text, "x.toml")
    (problem,) = caught.value.problems
    assert problem.message.startswith("not TOML: ")
    assert 1 <= problem.line <= text.count("\n") + 1


KEYS = st.text("ab-_. \"'#[]=", max_size=4)
SCALARS = st.one_of(
    st.integers(-9, 9), st.booleans(), st.text("ab\n\"'\\#[]{}=,\t", max_size=6), st.floats(allow_nan=False)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
TABLES = st.dictionaries(KEYS, VALUES, max_size=4)


def paths(value: Any, path: Path = ()) -> Iterator[Path]:
    if path:
        yield path
    steps = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    )
    for step, item in steps:
        yield from paths(item, (*path, step))


@pytest.mark.slow
@given(TABLES)
def test_what_is_written_reads_as_it_was_and_every_value_has_a_line(table: dict[str, Any]) -> None:
    text = "\n".join(pairs(table))
    document = read(text, "x.toml")
    assert document.data == table
    assert set(document.lines) == set(paths(table))
    for number, key in enumerate(table, 1):
        assert document.line((key,)) == number


@pytest.mark.slow
@given(st.lists(TABLES, min_size=1, max_size=4), KEYS, st.booleans())
def test_repeated_and_nested_tables_keep_their_lines(
    tables: list[dict[str, Any]], key: str, nested: bool
) -> None:
    header = f"{key_text(key)} . sub" if nested else key_text(key)
    lines: list[str] = []
    expected: dict[Path, int] = {}
    for index, table in enumerate(tables):
        at: Path = (key, "sub", index) if nested else (key, index)
        lines.append(f"[[{header}]]")
        expected[at] = len(lines)
        for name, value in table.items():
            lines.append(f"\t{key_text(name)}={value_text(value)}# {key}")
            expected[*at, name] = len(lines)
    document = read("\n".join(lines), "x.toml")
    assert {path: document.line(path) for path in expected} == expected


@given(st.text('a=1[]{}".,#\n', max_size=12))
def test_the_scanner_understands_all_that_tomllib_does(text: str) -> None:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    assert set(read(text, "x.toml").lines) >= set(paths(data))
