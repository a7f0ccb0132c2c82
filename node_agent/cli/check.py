"""``pgherd check``: what is wrong in files, before an agent reads them.  Needs no agent and no network."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from node_agent.spec.child import ChildSpec, parse_lenient, stop_fits
from registry.cli.invocation import Command, Invocation, pass_invocation
from registry.cli.output import print_json
from registry.config import AgentConfig, ConfigInvalid, Problem, parse, read_text
from registry.toml import source as toml_source

_WRONG = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a file turned out to be ("agent", "spec", empty if it cannot be read), and what is wrong in it."""

    file: Path
    kind: str = ""
    config: AgentConfig | None = None
    children: tuple[ChildSpec, ...] = ()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """Yield the findings as people read them."""
        yield from map(str, self.problems)
        if not self.problems:
            yield f"{self.file}: ok, {self._contents()}"
        yield from (f"{self.file}: warning: {warning}" for warning in self.warnings)

    def _contents(self) -> str:
        if self.config is not None:
            return f"the configuration of host {self.config.host} in cluster {self.config.cluster}"
        declared = ", ".join(child.name or child.id for child in self.children)
        return f"{len(self.children)} {'child' if len(self.children) == 1 else 'children'}: {declared}"

    def as_plain(self) -> dict[str, Any]:
        """Return the findings as values of JSON."""
        return {
            "file": str(self.file),
            "ok": not self.problems,
            "kind": self.kind,
            "children": [{"id": child.id, "name": child.name} for child in self.children],
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
            "warnings": list(self.warnings),
        }


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@pass_invocation
def check(invocation: Invocation, files: Sequence[Path]) -> int:
    """Validate agent configurations and spec files, or directories of them.

    Every problem of every file is shown.  Specs are checked against the databases of the agent.toml, and its
    lease, when one is among the files.  Exit code 2 when something is wrong.
    """
    checked = check_files(files)
    if invocation.json:
        print_json([each.as_plain() for each in checked])
    else:
        for line in (line for each in checked for line in each.lines()):
            click.echo(line)
    return _WRONG if any(each.problems for each in checked) else 0


def check_files(paths: Sequence[Path]) -> list[Checked]:
    """Check files, configurations first; a directory stands for the ``*.toml`` in it."""
    contents: dict[Path, str] = {}
    checked = []
    for file in _files(paths):
        try:
            contents[file] = read_text(file)
        except ConfigInvalid as error:
            checked.append(Checked(file=file, problems=error.problems))
    specs = {file: text for file, text in contents.items() if _declares_children(text, str(file))}
    configs = [_check_config(text, file) for file, text in contents.items() if file not in specs]
    return _refuse_duplicates([*checked, *configs, *_check_specs(specs, configs)])


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        yield from sorted(path.glob("*.toml")) if path.is_dir() else (path,)


def _declares_children(text: str, source: str) -> bool:
    """Tell a spec file from an agent's configuration by its tables; in doubt by its name."""
    try:
        keys = toml_source.read(text, source).data.keys()
    except ConfigInvalid:
        return "[[child]]" in text
    return bool(keys & {"child", "defaults"})


def _check_config(text: str, file: Path) -> Checked:
    try:
        return Checked(file=file, kind="agent", config=parse(text, file))
    except ConfigInvalid as error:
        return Checked(file=file, kind="agent", problems=error.problems)


def _check_specs(specs: dict[Path, str], configs: Collection[Checked]) -> Iterator[Checked]:
    known = [each.config for each in configs if each.config is not None]
    databases = {name for config in known for name in config.databases} if known else None
    timings = [config.timing for config in known]
    for file, text in specs.items():
        children, problems = parse_lenient(text, str(file), databases=databases)
        warnings = [
            f"{child.id}: {why}"
            for child in children
            for timing in timings
            if (why := stop_fits(child, timing))
        ]
        yield Checked(
            file=file,
            kind="spec",
            children=children,
            problems=problems,
            warnings=tuple(dict.fromkeys(warnings)),
        )


def _refuse_duplicates(checked: Sequence[Checked]) -> list[Checked]:
    """Add a problem for every name that another file has declared before."""
    owner: dict[str, Path] = {}
    result = []
    for each in checked:
        twice = [
            Problem(
                str(each.file),
                0,
                f"child[{child.id}].name",
                f'"{child.name}" is also declared in {owner[child.name]}',
            )
            for child in each.children
            if child.name and owner.setdefault(child.name, each.file) != each.file
        ]
        result.append(dataclasses.replace(each, problems=(*each.problems, *twice)))
    return result
