"""Runs ``pgherd`` commands inside the test process, where that is quicker than a process each."""

from __future__ import annotations

import pytest

from registry.cli import main


class CommandLine:
    """Call it with the words of a command; it returns the exit code and keeps what was printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.output = self.errors = ""

    def __call__(self, *words: str) -> int:
        with pytest.raises(SystemExit) as end:
            main(words)
        self.output, self.errors = self._capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs commands."""
    return CommandLine(capsys)
