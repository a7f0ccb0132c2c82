"""How the command line prints tables, moments, spans and messages."""

from __future__ import annotations

import sys
import time

import pytest

from registry.cli.output import age, as_plain, enum_word, moment, print_table, span, token
from registry.v1.messages_pb2 import Frame
from registry.v1.names_pb2 import NAME_STATE_STARTING, Name


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (12, "12s"),
        (60, "1m"),
        (185, "3m 5s"),
        (3600 * 2 + 30, "2h"),
        (86400 * 2 + 3600 * 4 + 61, "2d 4h"),
        (-1, "0.0s"),
    ],
)
def test_spans_have_at_most_two_units(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_moments_have_a_date_unless_they_are_of_today() -> None:
    assert moment(0) == "now"
    assert len(moment(time.time())) == len("03:12:05")
    assert moment(86400 * 365).startswith(("1970-12-31 ", "1971-01-01 "))
    assert age(0) == ""


def test_the_token_is_empty_without_an_owner() -> None:
    assert token(31, 2) == "31.2"
    assert token(0, 0) == ""


def test_enums_are_their_last_word() -> None:
    assert enum_word("NAME_STATE_READY", "NameState") == "ready"
    assert as_plain(Name(state=NAME_STATE_STARTING))["state"] == "starting"


def test_fields_that_may_be_absent_are_absent_when_not_set() -> None:
    plain = as_plain(Frame(json="{}", epoch=1 << 60))
    assert plain["epoch"] == 1 << 60
    assert plain["json"] == "{}"
    assert "data" not in plain
    assert "error" not in plain


def test_tables_have_colours_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_table(("NAME", "STATE"), [("ticker", "ready"), ("long-name", "")], empty="none")
    assert capsys.readouterr().out == "NAME       STATE\nticker     ready\nlong-name  -\n"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(("NAME", "STATE"), [("ticker", "ready")], empty="none")
    assert "\x1b[32mready" in capsys.readouterr().out


def test_what_others_wrote_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("NAME", "WHO"), [("ticker", "FATAL:  no\n\tDETAIL: \x1b[2Jwhy"), ("a b", "ann")], empty="")
    assert capsys.readouterr().out == ("NAME    WHO\nticker  FATAL:  no DETAIL: [2Jwhy\na b     ann\n")


def test_an_empty_table_says_so_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("NAME",), [], empty="no names yet")
    assert capsys.readouterr().out == "no names yet\n"
