"""How a file that declares children is written: its tables, and what must hold between their keys.

:func:`read` finds every problem of a file at once and knows which children are not touched by any.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from node_agent.restarts import Restart
from node_agent.spec import values
from registry.toml import source as toml_source
from registry.toml.schema import (
    Duration,
    Label,
    PositiveDuration,
    Schema,
    Table,
    Text,
    check,
    nearest,
    one_of,
    wrong,
)
from registry.toml.source import Document, Path, Problem

RESTART_WORDS = {
    "always": "permanent",
    "unless-stopped": "permanent",
    "true": "permanent",
    "on-failure": "transient",
    "on-abnormal": "transient",
    "on-abort": "transient",
    "on-watchdog": "transient",
    "unexpected": "transient",
    "no": "temporary",
    "never": "temporary",
    "false": "temporary",
}
"""What systemd, Docker and supervisord say, and OTP's word for it."""

NOT_SPECS = "is the configuration of an agent, not a file of specs"
"""The problem of a file of the other kind."""

Template = Annotated[str, BeforeValidator(values.template)]


class RunTable(Table):
    """``run``: a command, or a behaviour with its arguments."""

    foreign: ClassVar[Mapping[str, str]] = {
        "exec": "run.command",
        "argv": "run.command",
        "class": "run.behaviour",
    }

    command: Annotated[
        list[Annotated[str, BeforeValidator(values.argument)]] | None, BeforeValidator(values.command)
    ] = None
    behaviour: Annotated[str, BeforeValidator(values.target)] | None = None
    args: dict[str, Annotated[Any, BeforeValidator(values.json_value)]] = Field(default={})
    path: list[Annotated[str, BeforeValidator(values.directory)]] = Field(default=[])


class PlacementTable(Table):
    """``placement``: which hosts may own the name, and which should."""

    foreign: ClassVar[Mapping[str, str]] = {"labels": "require", "hosts": "prefer", "nodes": "prefer"}

    require: dict[Label, Text] = Field(default={})
    prefer: list[Annotated[list[str], BeforeValidator(values.tier)]] = Field(default=[])
    databases: list[Label] = Field(default=[])


class ReadyTable(Table):
    """``ready``: when a started process counts as ready."""

    delay: Duration | None = None
    timeout: PositiveDuration | None = None


class StopTable(Table):
    """``[[child.stop]]``: one step of stopping."""

    examples: ClassVar[Mapping[str, str]] = {"signal": 'signal = "SIGTERM"', "wait": 'wait = "10s"'}
    foreign: ClassVar[Mapping[str, str]] = {"timeout": "wait"}

    signal: Annotated[str, BeforeValidator(values.stop_signal)]
    wait: Duration


class DefaultsTable(Table):
    """``[defaults]``, and what it shares with ``[[child]]``."""

    foreign: ClassVar[Mapping[str, str]] = {
        "ExecStart": "run.command",
        "command": "run.command",
        "cmd": "run.command",
        "exec": "run.command",
        "behaviour": "run.behaviour",
        "behavior": "run.behaviour",
        "args": "run.args",
        "Restart": "restart",
        "autorestart": "restart",
        "StartLimitBurst": "intensity",
        "startretries": "intensity",
        "StartLimitIntervalSec": "period",
        "SuccessExitStatus": "success_exit",
        "exitcodes": "success_exit",
        "User": "user",
        "Environment": "env",
        "environment": "env",
        "WorkingDirectory": "cwd",
        "directory": "cwd",
        "KillSignal": "[[child.stop]] signal",
        "stopsignal": "[[child.stop]] signal",
        "TimeoutStopSec": "[[child.stop]] wait",
        "stopwaitsecs": "[[child.stop]] wait",
        "prefer": "placement.prefer",
        "require": "placement.require",
        "databases": "placement.databases",
    }

    restart: Annotated[
        Restart, BeforeValidator(one_of({word.value: word for word in Restart}, RESTART_WORDS))
    ] = Restart.PERMANENT
    intensity: Annotated[int, BeforeValidator(values.intensity)] = 5
    period: PositiveDuration = 60.0
    success_exit: list[Annotated[int | str, BeforeValidator(values.success)]] = Field(default=[0])
    fence: list[Label] = Field(default=[])
    lock_delay: Duration = 0.0
    user: Annotated[str, BeforeValidator(values.user)] = ""
    env: dict[Annotated[str, BeforeValidator(values.variable_name)], Template] = Field(default={})
    cwd: Annotated[str, BeforeValidator(values.directory)] = ""
    run: RunTable = Field(default_factory=RunTable)
    placement: PlacementTable = Field(default_factory=PlacementTable)
    ready: ReadyTable = Field(default_factory=ReadyTable)
    stop: list[StopTable] | None = None


class ChildTable(DefaultsTable):
    """``[[child]]``."""

    examples: ClassVar[Mapping[str, str]] = {"id": 'id = "ticker"'}

    id: Label
    name: Annotated[str, BeforeValidator(values.name)] = ""


def _children(value: object) -> object:
    if value == []:
        raise wrong("is empty", "declare a child under a line [[child]]")
    return value


class FileTable(Table):
    """The file."""

    examples: ClassVar[Mapping[str, str]] = {"schema": "schema = 1", "child": "[[child]], and its keys below"}
    foreign: ClassVar[Mapping[str, str]] = {
        "children": "[[child]]",
        "default": "[defaults]",
        "Service": "[[child]]",
        "program": "[[child]]",
    }

    version: Schema = Field(alias="schema")
    defaults: dict[str, Any] = Field(default={})
    child: Annotated[list[dict[str, Any]], BeforeValidator(_children)]


@dataclass(slots=True)
class Reading:
    """What was found in a file: the tables that can be used, and all problems in the file's order."""

    good: list[ChildTable] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read(text: str, source: str, databases: Collection[str] | None) -> Reading:
    """Read a file's children; ``databases`` are those that exist, if known.  Never raises for bad content.

    A problem outside the children, in ``[defaults]`` say, leaves no child good: what they would do without
    it is not what was written.
    """
    try:
        document = toml_source.read(text, source)
    except toml_source.ConfigInvalid as error:
        return Reading(problems=list(error.problems))
    if document.data.keys() & {"cluster", "etcd"} and not document.data.keys() & {"child", "defaults"}:
        return Reading(problems=[document.problem((), NOT_SPECS, "specs stand under lines [[child]]")])
    _, problems = check(FileTable, document.data, document)
    defaults, found = _defaults(document)
    problems += found
    usable = not problems
    first: dict[tuple[str, str], Path] = {}
    good = []
    for at, own in _tables(document):
        table = _merge(defaults, own)
        child, found = check(ChildTable, table, document, at)
        found += _conflicts(document, at, table, databases, missing_defaults=not usable)
        found += _duplicates(document, at, own, first)
        problems += found
        if child is not None and not found and usable:
            good.append(child)
    return Reading(good, sorted(problems, key=lambda problem: problem.line))


def _tables(document: Document) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    children = document.data.get("child")
    if isinstance(children, list):
        yield from ((("child", index), own) for index, own in enumerate(children) if isinstance(own, dict))


def _defaults(document: Document) -> tuple[Mapping[str, Any], list[Problem]]:
    """Return the defaults that can be used, and what is wrong with the others."""
    written = document.data.get("defaults")
    usable: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in written.items() if isinstance(written, dict) else ():
        if key in ("id", "name"):
            problems.append(
                document.problem(("defaults", key), "belongs to one child", "write it under [[child]]")
            )
            continue
        _, found = check(DefaultsTable, {key: value}, document, ("defaults",))
        problems += found
        if not found:
            usable[key] = value
    return usable, problems


def _merge(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a child's keys over the defaults; in tables (``env``, ``run``, ...) each key counts alone."""
    merged = {**defaults, **own}
    for key in defaults.keys() & own.keys():
        if isinstance(defaults[key], dict) and isinstance(own[key], dict):
            merged[key] = {**defaults[key], **own[key]}
    return merged


def _conflicts(
    document: Document,
    at: Path,
    table: Mapping[str, Any],
    databases: Collection[str] | None,
    *,
    missing_defaults: bool,
) -> list[Problem]:
    """Find what is wrong between the keys of a child; looks at what is there, valid or not."""
    run, ready, placement = (_table(table.get(key)) for key in ("run", "ready", "placement"))
    problems = []

    def complain(place: Path, message: str, hint: str) -> None:
        problems.append(document.problem((*at, *place), message, hint))

    if "command" in run and "behaviour" in run:
        complain(("run",), "has both command and behaviour", "a child is one of them")
    elif not run.keys() & {"command", "behaviour"}:
        if (
            not missing_defaults
            and run.keys() <= RunTable.model_fields.keys()
            and table.get("run", run) == run
        ):
            complain(
                ("run",), "has neither command nor behaviour", 'write run.command = ["program", "argument"]'
            )
    elif "command" in run:
        for key in ("args", "path"):
            if key in run:
                complain(("run", key), "is for behaviours", "arguments of a program are part of run.command")
        if "timeout" in ready:
            complain(("ready", "timeout"), "is for behaviours", "a command is ready after ready.delay")
    elif "delay" in ready:
        complain(("ready", "delay"), "is for commands", "a behaviour is ready when it says so")
    for key in ("fence", "lock_delay", "placement"):
        if "name" not in table and table.get(key):
            why = "needs a name: a child without one runs on every host that has its file, and owns nothing"
            complain((key,), why, 'write name = "..."')
    for place, names in (
        (("fence",), table.get("fence")),
        (("placement", "databases"), placement.get("databases")),
    ):
        for index, name in enumerate(names if isinstance(names, list) else ()):
            if databases is not None and isinstance(name, str) and name not in databases:
                known = nearest(name, databases) or f"declared: {', '.join(sorted(databases)) or 'none'}"
                complain((*place, index), f"there is no [database.{name}] in agent.toml", known)
    mentioned: set[str] = set()
    prefer = placement.get("prefer")
    for index, tier in enumerate(prefer if isinstance(prefer, list) else ()):
        for host in tier if isinstance(tier, list) else [tier]:
            if isinstance(host, str) and host in mentioned:
                complain(
                    ("placement", "prefer", index), f'"{host}" is mentioned twice', "its first tier counts"
                )
            elif isinstance(host, str):
                mentioned.add(host)
    return problems


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _duplicates(
    document: Document, at: Path, own: Mapping[str, Any], first: dict[tuple[str, str], Path]
) -> list[Problem]:
    """Find an id or a name that an earlier child has; ``first`` remembers them."""
    problems = []
    for key in ("id", "name"):
        value = own.get(key)
        if not isinstance(value, str):
            continue
        holder = first.setdefault((key, value), at)
        if holder != at:
            line = document.line((*holder, key))
            problems.append(document.problem((*at, key), f'"{value}" is taken by the child in line {line}'))
    return problems
