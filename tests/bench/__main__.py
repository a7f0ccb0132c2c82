"""``./dev bench``: run every benchmark beside its reference and print how they compare.

A module ``bench_*.py`` of this folder has ``METRICS``, the names it measures, and ``run()``, which returns
the fields of a :class:`~tests.bench.row.Row` for each.  Exit code 1 when a bar is missed or a module failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from registry.cli.output import print_table
from tests.bench.row import Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen benchmarks; return the exit code."""
    options = _options(arguments)
    modules = dict(_modules())
    known = sorted({metric for module in modules.values() for metric in module.METRICS})
    wanted = set(options.only.split(",")) if options.only else set(known)
    if unknown := wanted - set(known):
        print(f"no metric {', '.join(sorted(unknown))}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    failed = []
    for name, module in modules.items():
        if wanted.isdisjoint(module.METRICS):
            continue
        print(f"{name}: {', '.join(module.METRICS)} ...", file=sys.stderr, flush=True)
        try:
            rows += [Row(**row) for row in module.run() if row["metric"] in wanted]
        except Exception:  # noqa: BLE001 - the others are still worth their numbers
            traceback.print_exc()
            failed.append(name)
    _print(rows)
    if options.json:
        options.json.write_text(json.dumps([row.as_plain() for row in rows], indent=2) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or not all(row.ok for row in rows) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev bench", description="Benchmarks, each beside its reference.")
    parser.add_argument("--only", metavar="METRIC,...", help="measure only these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file, too")
    return parser.parse_args(arguments)


def _modules() -> Iterator[tuple[str, ModuleType]]:
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        yield path.stem.removeprefix("bench_"), importlib.import_module(f"tests.bench.{path.stem}")


def _print(rows: Sequence[Row]) -> None:
    print_table(
        ("METRIC", "VALUE", "UNIT", "REFERENCE", "ITS VALUE", "RATIO", "BAR", ""),
        (row.cells() for row in rows),
        empty="no benchmarks",
    )


if __name__ == "__main__":
    sys.exit(main())
