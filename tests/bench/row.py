"""One line of the benchmark table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A metric, its median, and that of its reference in the same run.

    ``bar`` says in words what is wanted, such as ``ratio >= 1`` or ``<= 30``; empty when it is only reported.
    """

    metric: str
    value: float
    unit: str
    reference: str = ""
    reference_value: float | None = None
    ratio: float | None = None
    bar: str = ""
    ok: bool = True

    def as_plain(self) -> dict[str, Any]:
        """Return the row as values of JSON."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """Return the row as a table shows it."""
        verdict = ("ok" if self.ok else "missed") if self.bar else ""
        reference, ratio = (_number(number) for number in (self.reference_value, self.ratio))
        return (
            self.metric, _number(self.value), self.unit, self.reference, reference, ratio, self.bar, verdict,
        )  # fmt: skip


def at_most(
    metric: str, ours: Sequence[float], unit: str, bar: float, reference: str, its: Sequence[float]
) -> dict[str, Any]:
    """Return the fields of a row: the medians, and whether ours is not above ``bar``."""
    value, other = statistics.median(ours), statistics.median(its)
    return {
        "metric": metric, "value": value, "unit": unit, "reference": reference, "reference_value": other,
        "ratio": value / other if other > 0 else None, "bar": f"<= {bar:g}", "ok": value <= bar,
    }  # fmt: skip


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
