"""Durations as people write them: ``500ms``, ``30s``, ``5m``, ``1h``."""

from __future__ import annotations

import re
from decimal import Decimal

_SIZES = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]+)?)(ms|s|m|h)")
_ALMOST = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
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
        return _seconds(float(match[1]), match[2])
    fixed = almost_duration(text)
    if fixed:
        raise ValueError(f'"{text}" is not a duration, write "{fixed}"')
    raise ValueError(f'"{text}" is not a duration, write for example "500ms", "30s", "5m" or "1h"')


def _seconds(count: float, unit: str) -> float:
    # Divided, not multiplied by 0.001: so 7ms is exactly the 0.007 that people write elsewhere.
    return count / 1000 if unit == "ms" else count * _SIZES[unit]


def almost_duration(text: str) -> str:
    """Return the duration that ``text`` seems to mean (``30 sec`` means ``30s``), empty if none."""
    match = _ALMOST.fullmatch(text)
    unit = _WORDS.get(match[2].lower()) if match else None
    return f"{match[1]}{unit}" if match and unit else ""


def format_duration(seconds: float) -> str:
    """Return ``seconds`` in the largest unit that leaves a whole number; reads back as exactly the same."""
    if seconds == 0:
        return "0s"
    for unit, size in _SIZES.items():
        count = round(seconds / size)
        if _seconds(count, unit) == seconds:
            return f"{count}{unit}"
    return f"{Decimal(repr(seconds)):f}s"
