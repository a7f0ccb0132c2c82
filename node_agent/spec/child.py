"""The spec of a child: the declared wish that a worker should exist, and how it is to be treated.

A file has one or more ``[[child]]`` tables and ``[defaults]`` for all of them; :func:`parse` reports every
problem of the file at once.  :func:`to_toml` writes a spec back as a file of its own, which is how named
specs are kept in etcd; the text does not depend on how the spec was written, so equal specs have equal
digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from node_agent.restarts import Restart
from node_agent.spec.schema import ChildTable, read
from node_agent.spec.values import VARIABLE
from registry.placement import Constraints
from registry.timing import Timing
from registry.toml.source import ConfigInvalid, Problem
from registry.toml.writer import pairs
from registry.units import format_duration


@dataclass(frozen=True, slots=True)
class Command:
    """A program and its arguments."""

    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """A Python class, ``module:Class``, forked from the agent's environment.

    ``args`` is handed to it; ``path`` are directories put before ``sys.path``.
    """

    target: str
    args: Mapping[str, Any] = field(default_factory=dict)
    path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ready:
    """When a started process counts as ready: a command after ``delay``, a behaviour when it says so.

    A behaviour that has not said so ``timeout`` seconds after its start is killed, and restarted like one
    that crashed.
    """

    delay: float = 0.0
    timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class StopStage:
    """One step of stopping: send ``signal``, wait at most ``wait`` seconds.  SIGKILL comes last."""

    signal: str
    wait: float


DEFAULT_STOP = (StopStage("SIGTERM", 10.0),)
"""Without stages (``stop = []``) a child is killed at once, OTP's ``brutal_kill``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """One child.  ``name`` is its global name; empty: it is local to every host that has its file.

    ``constraints.databases`` has those of ``fence`` too.  ``lock_delay`` is how long a lost name stays free
    before the next owner starts, for workers that check no fence.  ``source`` says which file it is from, for
    people; it takes no part in comparisons.
    """

    id: str
    name: str = ""
    run: Command | Behaviour
    restart: Restart = Restart.PERMANENT
    intensity: int = 5
    period: float = 60.0
    success_exit: frozenset[int | str] = frozenset({0})
    fence: tuple[str, ...] = ()
    lock_delay: float = 0.0
    user: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    ready: Ready = Ready()
    stop: tuple[StopStage, ...] = DEFAULT_STOP
    constraints: Constraints = field(default_factory=Constraints)
    source: str = field(default="", compare=False)

    @property
    def digest(self) -> str:
        """Return what tells this spec from any that means something else: 32 hexadecimal digits."""
        return hashlib.sha256(to_toml(self).encode()).hexdigest()[:32]


def substitute(spec: ChildSpec, **values: str | int) -> ChildSpec:
    """Return the spec with each ``${...}`` replaced in command, environment and working directory.

    ``$${x}`` stands for a literal ``${x}``.  Raises KeyError for a variable without a value; :func:`parse`
    lets only those of :data:`~node_agent.spec.values.VARIABLES` pass.
    """

    def fill(text: str) -> str:
        return VARIABLE.sub(lambda found: found[0][1:] if found[1] else str(values[found[2]]), text)

    run = Command(tuple(map(fill, spec.run.argv))) if isinstance(spec.run, Command) else spec.run
    env = {key: fill(value) for key, value in spec.env.items()}
    return replace(spec, run=run, env=env, cwd=fill(spec.cwd))


def stop_fits(spec: ChildSpec, timing: Timing) -> str:
    """Return a warning when the stop stages cannot run whole after a lost lease; empty when they can.

    A lost lease leaves ``timing.hard - timing.soft`` until the warden kills.  Only a named child has a lease,
    and only stages that somebody wrote were meant to be run whole.
    """
    left, needed = timing.hard - timing.soft, sum(stage.wait for stage in spec.stop)
    if not spec.name or spec.stop == DEFAULT_STOP or needed <= left:
        return ""
    return f"stop stages sum to {needed:g} s; after a lost lease {left:.1f} s remain"


def parse(text: str, source: str, *, databases: Collection[str] | None = None) -> tuple[ChildSpec, ...]:
    """Return the children that a file declares, in its order.

    ``source`` is the file's name for people; ``databases`` are the names that exist, where they are known.
    Raises ConfigInvalid with every problem of the file.
    """
    children, problems = parse_lenient(text, source, databases=databases)
    if problems:
        raise ConfigInvalid(problems)
    return children


def parse_lenient(
    text: str, source: str, *, databases: Collection[str] | None = None
) -> tuple[tuple[ChildSpec, ...], tuple[Problem, ...]]:
    """Return the children that can be used, and the problems of the others.

    So one mistake on a host does not keep its other children from running.  A problem that concerns the whole
    file (syntax, ``[defaults]``, an unknown key at its top) leaves none.
    """
    reading = read(text, source, databases)
    return tuple(_spec(table, source) for table in reading.good), tuple(reading.problems)


def _spec(table: ChildTable, source: str) -> ChildSpec:
    run, placement = table.run, table.placement
    stop = (
        DEFAULT_STOP
        if table.stop is None
        else tuple(StopStage(stage.signal, stage.wait) for stage in table.stop)
    )
    return ChildSpec(
        id=table.id,
        name=table.name,
        run=Behaviour(run.behaviour, run.args, tuple(run.path))
        if run.behaviour
        else Command(tuple(run.command or ())),
        restart=table.restart,
        intensity=table.intensity,
        period=table.period,
        success_exit=frozenset(table.success_exit),
        fence=tuple(table.fence),
        lock_delay=table.lock_delay,
        user=table.user,
        env=table.env,
        cwd=table.cwd,
        ready=Ready(**table.ready.model_dump(exclude_none=True)),
        stop=stop,
        constraints=Constraints(
            require=placement.require,
            prefer=tuple(tuple(tier) for tier in placement.prefer),
            databases=frozenset(placement.databases) | frozenset(table.fence),
        ),
        source=source,
    )


def to_toml(spec: ChildSpec) -> str:
    """Return a file that declares just this child; what equals the default is left out."""
    blocks = ["schema = 1"]
    for title, table in _sections(spec):
        blocks.append("\n".join((title, *pairs(table))))
    return "\n\n".join(blocks) + "\n"


def _sections(spec: ChildSpec) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield the tables of a spec's file, each with its header."""
    yield "[[child]]", _head(spec)
    if isinstance(spec.run, Command):
        yield "[child.run]", {"command": spec.run.argv}
    else:
        yield (
            "[child.run]",
            {"behaviour": spec.run.target} | ({"path": spec.run.path} if spec.run.path else {}),
        )
    constraints = spec.constraints
    tables: Mapping[str, Mapping[str, object]] = {
        "run.args": _sorted(spec.run.args) if isinstance(spec.run, Behaviour) else {},
        "env": _sorted(spec.env),
        "placement": {
            "require": _sorted(constraints.require),
            "prefer": [tier[0] if len(tier) == 1 else tier for tier in constraints.prefer],
            "databases": sorted(constraints.databases - set(spec.fence)),
        },
        "ready": {
            key: format_duration(value)
            for key, value in (("delay", spec.ready.delay), ("timeout", spec.ready.timeout))
            if value != getattr(Ready(), key)
        },
    }
    for title, table in tables.items():
        written = {key: value for key, value in table.items() if title != "placement" or value}
        if written:
            yield f"[child.{title}]", written
    if spec.stop != DEFAULT_STOP:
        for stage in spec.stop:
            yield "[[child.stop]]", {"signal": stage.signal, "wait": format_duration(stage.wait)}


def _head(spec: ChildSpec) -> Mapping[str, object]:
    defaults = {each.name: each.default for each in fields(ChildSpec)}
    codes = sorted(each for each in spec.success_exit if isinstance(each, int))
    killed = sorted(each for each in spec.success_exit if isinstance(each, str))
    written = {
        "id": spec.id,
        "name": spec.name,
        "restart": spec.restart.value,
        "intensity": spec.intensity,
        "period": format_duration(spec.period),
        "success_exit": [*codes, *killed],
        "fence": spec.fence,
        "lock_delay": format_duration(spec.lock_delay),
        "user": spec.user,
        "cwd": spec.cwd,
    }
    written = {key: value for key, value in written.items() if getattr(spec, key) != defaults[key]}
    return written if spec.stop else {**written, "stop": []}


def _sorted(value: Any) -> Any:
    """Return a value with the keys of every mapping in it in order."""
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value
