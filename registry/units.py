"""Durations as people write them: ``500ms``, ``30s``, ``5m``, ``1h``."""

from __future__ import annotations

import re

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_ALMOST = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_WORDS = {
    "": "s",
    **dict.fromkeys(("ms", "msec", "msecs", "millis", "milliseconds"), "ms"),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), "m"),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), "h"),
}


def parse_duration(text: str) -> float:
    """Return seconds.  Raises ValueError, with the form that was probably meant where there is one."""
    if match := _DURATION.fullmatch(text):
        return float(match[1]) * _UNITS[match[2]]
    fixed = almost_duration(text)
    if fixed:
        raise ValueError(f'"{text}" is not a duration, write "{fixed}"')
    raise ValueError(f'"{text}" is not a duration, write for example "500ms", "30s", "5m" or "1h"')


def almost_duration(text: str) -> str:
    """Return the duration that ``text`` seems to mean (``30 sec`` means ``30s``), empty if none."""
    match = _ALMOST.fullmatch(text)
    unit = _WORDS.get(match[2].lower()) if match else None
    return f"{match[1]}{unit}" if match and unit else ""


def format_duration(seconds: float) -> str:
    """Return ``seconds`` in the largest unit that leaves a whole number."""
    if seconds == 0:
        return "0s"
    for unit in ("h", "m", "s", "ms"):
        count = round(seconds / _UNITS[unit], 9)
        if count == int(count):
            return f"{int(count)}{unit}"
    return f"{seconds:.6f}".rstrip("0") + "s"
