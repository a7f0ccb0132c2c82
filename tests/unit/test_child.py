"""Specs of children: what a file may say, what is wrong in it, and how a spec is written back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent.restarts import Restart
from node_agent.spec.child import (
    Behaviour,
    ChildSpec,
    Command,
    Ready,
    StopStage,
    parse,
    parse_lenient,
    stop_fits,
    substitute,
    to_toml,
)
from node_agent.spec.schema import ChildTable
from registry.placement import Constraints
from registry.timing import Timing
from registry.toml.source import ConfigInvalid
from registry.toml.writer import key_text, value_text
from tests.support.golden import Case, cases

WHOLE = """
schema = 1
[defaults]
user = "postgres"
env = { LANG = "C", TZ = "UTC" }
[[child]]
id           = "pgqd"
name         = "eu/ticker"
restart      = "transient"
intensity    = 3
period       = "5m"
success_exit = [0, "INT", "SIGTERM"]
lock_delay   = "2s"
cwd          = "/var/lib/${host}"
run.command  = ["pgqd", "/etc/pgqd/${name}.ini"]
ready.delay  = "500ms"
env          = { TZ = "Europe/Zurich" }
[child.placement]
require   = { zone = "eu-1" }
prefer    = ["alpha", ["beta", "gamma"]]
databases = ["log"]
[[child.stop]]
signal = "SIGINT"
wait   = "10s"
[[child.stop]]
signal = "QUIT"
wait   = "5s"
[[child]]
id            = "sweeper"
name          = "sweeper"
fence         = ["app"]
run.behaviour = "sweeper.daemon:Sweeper"
run.path      = ["/srv/sweeper"]
run.args      = { policy = { table = "history", keep = 30 }, verbose = true }
ready.timeout = "10s"
[[child]]
id          = "local"
run.command = ["true"]
"""


def test_the_whole_file_is_understood() -> None:
    pgqd, sweeper, local = parse(WHOLE, "children.toml", databases={"app", "log"})
    assert pgqd == ChildSpec(
        id="pgqd",
        name="eu/ticker",
        run=Command(("pgqd", "/etc/pgqd/${name}.ini")),
        restart=Restart.TRANSIENT,
        intensity=3,
        period=300.0,
        success_exit=frozenset({0, "SIGINT", "SIGTERM"}),
        lock_delay=2.0,
        user="postgres",
        env={"LANG": "C", "TZ": "Europe/Zurich"},
        cwd="/var/lib/${host}",
        ready=Ready(delay=0.5),
        stop=(StopStage("SIGINT", 10.0), StopStage("SIGQUIT", 5.0)),
        constraints=Constraints(
            require={"zone": "eu-1"}, prefer=(("alpha",), ("beta", "gamma")), databases=frozenset({"log"})
        ),
    )
    assert sweeper == ChildSpec(
        id="sweeper",
        name="sweeper",
        run=Behaviour(
            "sweeper.daemon:Sweeper",
            {"policy": {"table": "history", "keep": 30}, "verbose": True},
            ("/srv/sweeper",),
        ),
        fence=("app",),
        user="postgres",
        env={"LANG": "C", "TZ": "UTC"},
        ready=Ready(timeout=10.0),
        constraints=Constraints(databases=frozenset({"app"})),
    )
    assert local == ChildSpec(
        id="local", run=Command(("true",)), user="postgres", env={"LANG": "C", "TZ": "UTC"}
    )
    assert local.source == "children.toml"


@pytest.mark.parametrize("case", cases("spec.txt"), ids=str)
def test_wrong_specs_are_told_apart(case: Case) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse(case.text, "spec.toml", databases={"app", "log"})
    assert str(caught.value) == case.expected


def test_databases_are_not_checked_where_nobody_knows_them() -> None:
    (child,) = parse(
        'schema = 1\n[[child]]\nid = "a"\nname = "a"\nfence = ["any"]\nrun.command = ["true"]\n', "spec.toml"
    )
    assert child.fence == ("any",)


TWO = """
schema = 1
[[child]]
id = "good"
run.command = ["true"]
[[child]]
id = "bad"
run.command = "true"
[[child]]
id = "good"
run.command = ["false"]
"""


def test_a_bad_child_leaves_the_others_usable_where_that_is_asked_for() -> None:
    children, problems = parse_lenient(TWO, "spec.toml")
    assert [(child.id, child.run) for child in children] == [("good", Command(("true",)))]
    assert [problem.line for problem in problems] == [8, 10]


@pytest.mark.parametrize(
    "mistake", ["shema = 1", "schema = 2", "schema = 1\n[defaults]\nuser = 3", "schema = 1\n[what]\nx = 1"]
)
def test_a_mistake_outside_the_children_leaves_none(mistake: str) -> None:
    children, problems = parse_lenient(
        f'{mistake}\n[[child]]\nid = "a"\nrun.command = ["true"]\n', "spec.toml"
    )
    assert not children
    assert problems


def test_variables_are_substituted_in_command_environment_and_directory() -> None:
    spec = ChildSpec(
        id="a",
        run=Command(("run", "${name}@${epoch}", "$${name}", "$HOME", "${host}${node}")),
        env={"I": "${instance}.${index}"},
        cwd="/srv/${host}",
    )
    filled = substitute(
        spec, node="alpha-01", host="alpha", name="ticker", instance="ticker", index=0, epoch=31
    )
    assert filled.run == Command(("run", "ticker@31", "${name}", "$HOME", "alphaalpha-01"))
    assert filled.env == {"I": "ticker.0"}
    assert filled.cwd == "/srv/alpha"


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        ('name = "a"', ""),
        ('name = "a"\nstop = [{ signal = "INT", wait = "800ms" }]', ""),
        (
            'name = "a"\nstop = [{ signal = "INT", wait = "10s" }, { signal = "QUIT", wait = "5s" }]',
            "stop stages sum to 15 s; after a lost lease 0.8 s remain",
        ),
        ('stop = [{ signal = "INT", wait = "10s" }]', ""),
    ],
)
def test_stop_stages_that_a_lost_lease_cuts_short_are_warned_of(keys: str, warning: str) -> None:
    (child,) = parse(f'schema = 1\n[[child]]\nid = "a"\nrun.command = ["true"]\n{keys}\n', "spec.toml")
    assert stop_fits(child, Timing(5)) == warning


def test_a_spec_is_written_back_without_its_defaults() -> None:
    assert (
        "\n" + to_toml(parse(WHOLE, "children.toml")[0])
        == """
schema = 1

[[child]]
id = "pgqd"
name = "eu/ticker"
restart = "transient"
intensity = 3
period = "5m"
success_exit = [0, "SIGINT", "SIGTERM"]
lock_delay = "2s"
user = "postgres"
cwd = "/var/lib/${host}"

[child.run]
command = ["pgqd", "/etc/pgqd/${name}.ini"]

[child.env]
LANG = "C"
TZ = "Europe/Zurich"

[child.placement]
require = { zone = "eu-1" }
prefer = ["alpha", ["beta", "gamma"]]
databases = ["log"]

[child.ready]
delay = "500ms"

[[child.stop]]
signal = "SIGINT"
wait = "10s"

[[child.stop]]
signal = "SIGQUIT"
wait = "5s"
"""
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("", 'restart = "permanent"'),
        ("", 'period = "60s"'),
        ('period = "5m"', 'period = "300s"'),
        ('success_exit = ["INT", 0]', 'success_exit = [0, "SIGINT"]'),
        ('env = { A = "1", B = "2" }', '[child.env]\nB = "2"\nA = "1"'),
        ('stop = [{ signal = "TERM", wait = "10s" }]', ""),
        ('placement = { prefer = [["alpha"]], databases = ["app"] }\nfence = ["app"]',
         'placement.prefer = ["alpha"]\nfence = ["app"]'),
    ],
)  # fmt: skip
def test_the_digest_is_that_of_the_meaning(one: str, other: str) -> None:
    head = 'schema = 1\n[[child]]\nid = "a"\nname = "a"\nrun.command = ["true"]\n'
    (first,), (second,) = parse(head + one, "one.toml"), parse(f"# x\n{head}{other}", "other.toml")
    assert first.digest == second.digest
    assert parse(head + 'user = "x"', "one.toml")[0].digest != first.digest


text = st.text(st.characters(codec="utf-8", exclude_characters="\0$"), min_size=1, max_size=8).filter(
    str.strip
)
label = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,5}", fullmatch=True)
seconds = st.integers(1, 10**7).map(lambda milliseconds: milliseconds / 1000)
json_value = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
runs = st.one_of(
    st.builds(Command, st.lists(text, min_size=1, max_size=3).map(tuple)),
    st.builds(
        Behaviour,
        st.just("module.sub:Class"),
        st.dictionaries(st.text(), json_value, max_size=3),
        st.lists(text.map(lambda word: f"/{word}"), max_size=2).map(tuple),
    ),
)


@st.composite
def specs(draw: st.DrawFn) -> ChildSpec:
    run = draw(runs)
    fence = tuple(draw(st.lists(label, unique=True, max_size=2)))
    hosts = draw(st.lists(label, unique=True, max_size=3))
    return ChildSpec(
        id=draw(label),
        name=draw(label),
        run=run,
        restart=draw(st.sampled_from(Restart)),
        intensity=draw(st.integers(0, 100)),
        period=draw(seconds),
        success_exit=draw(
            st.frozensets(st.integers(0, 255) | st.sampled_from(["SIGINT", "SIGHUP"]), max_size=3)
        ),
        fence=fence,
        lock_delay=draw(seconds),
        user=draw(st.sampled_from(["", "postgres"])),
        env=draw(st.dictionaries(st.from_regex(r"X[A-Za-z0-9_]{0,4}", fullmatch=True), st.just("") | text)),
        cwd=draw(st.sampled_from(["", "/srv/${host}"])),
        ready=Ready(delay=draw(seconds)) if isinstance(run, Command) else Ready(timeout=draw(seconds)),
        stop=draw(
            st.lists(st.builds(StopStage, st.sampled_from(["SIGINT", "SIGTERM"]), seconds), max_size=2).map(
                tuple
            )
        ),
        constraints=Constraints(
            require=draw(st.dictionaries(label, text, max_size=2)),
            prefer=tuple((host,) for host in hosts[:1]) + ((tuple(hosts[1:]),) if hosts[1:] else ()),
            databases=frozenset(fence) | draw(st.frozensets(label, max_size=2)),
        ),
    )


@pytest.mark.slow
@given(specs())
def test_what_is_written_back_reads_as_the_same_spec(spec: ChildSpec) -> None:
    (again,) = parse(to_toml(spec), "etcd")
    assert again == spec
    assert again.digest == spec.digest


JUNK = st.recursive(
    st.booleans()
    | st.integers(-3, 300)
    | st.floats()
    | st.text(max_size=3)
    | st.dates()
    | st.sampled_from(["a", "1s"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["x", "command", "wait", "a b"]), inner)
    ),
    max_leaves=4,
)
KEYS = sorted(ChildTable.model_fields)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key_text(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return value.isoformat() if hasattr(value, "isoformat") else value_text(value)


@pytest.mark.slow
@given(
    st.lists(st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=6), max_size=3),
    st.dictionaries(st.sampled_from(KEYS), JUNK),
)
def test_no_file_of_wrong_values_does_more_than_report_problems(
    children: list[dict[str, Any]], defaults: dict[str, Any]
) -> None:
    text = "schema = 1\n[defaults]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in defaults.items())
    for child in children:
        text += "[[child]]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in child.items())
    good, problems = parse_lenient(text, "spec.toml", databases={"a"})
    assert problems or good
    assert all(1 <= problem.line <= text.count("\n") + 1 and problem.message for problem in problems)
