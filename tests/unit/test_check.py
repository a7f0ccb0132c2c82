"""``pgherd check``: what is wrong in files, without an agent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from registry.cli import main

DEPLOY = Path(__file__).parents[2] / "deploy"
AGENT = """\
schema = 1
cluster = "prod"
host = "alpha"
lease.ttl = "5s"
[database.app]
conninfo = "service=app"
"""
SPEC = """\
schema = 1
[[child]]
id = "{0}"
name = "{0}"
fence = ["app"]
run.command = ["true"]
"""

Check: TypeAlias = Callable[..., tuple[int, str]]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    """Run ``pgherd check``; return the exit code and what was printed."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main(["check", *map(str, arguments)])
        assert isinstance(caught.value.code, int)
        return caught.value.code, capsys.readouterr().out

    return run


def test_good_files_are_named_with_what_they_declare(check: Check, tmp_path: Path) -> None:
    agent, spec = tmp_path / "agent.toml", tmp_path / "ticker.toml"
    agent.write_text(AGENT)
    spec.write_text(SPEC.format("ticker"))
    assert check(spec, agent) == (
        0,
        f"{agent}: ok, the configuration of host alpha in cluster prod\n{spec}: ok, 1 child: ticker\n",
    )


def test_every_problem_of_every_file_is_printed(check: Check, tmp_path: Path) -> None:
    agent, spec = tmp_path / "agent.toml", tmp_path / "ticker.toml"
    agent.write_text(AGENT.replace("5s", "5"))
    spec.write_text(SPEC.format("ticker").replace("fence", "fense") + 'restart = "always"\n')
    code, out = check(agent, spec, tmp_path / "none.toml")
    assert code == 2
    assert out == (
        f"{tmp_path}/none.toml: No such file or directory\n"
        f'{agent}:4: lease.ttl: "5" is not a duration (write "5s")\n'
        f'{spec}:5: child[ticker].fense: unknown key (did you mean "fence"?)\n'
        f'{spec}:7: child[ticker].restart: "always" is none of "permanent", "transient", "temporary" '
        '(did you mean "permanent"?)\n'
    )


def test_a_file_that_is_not_text_does_not_hide_the_problems_of_its_neighbours(
    check: Check, tmp_path: Path
) -> None:
    (tmp_path / "a.toml").write_text(SPEC.format("ticker").replace("fence", "fense"))
    (tmp_path / "b.toml").write_bytes(b"schema = 1\n# \xff\n")
    (tmp_path / "c.toml").write_text(SPEC.format("tocker"))
    code, out = check(tmp_path)
    assert code == 2
    assert out == (
        f"{tmp_path}/b.toml:2: is not UTF-8\n"
        f'{tmp_path}/a.toml:5: child[ticker].fense: unknown key (did you mean "fence"?)\n'
        f"{tmp_path}/c.toml: ok, 1 child: tocker\n"
    )


def test_specs_are_checked_against_the_databases_and_the_lease_of_the_agent(
    check: Check, tmp_path: Path
) -> None:
    (tmp_path / "agent.toml").write_text(AGENT)
    spec = tmp_path / "a.toml"
    spec.write_text(SPEC.format("a") + 'stop = [{ signal = "INT", wait = "9s" }]\n')
    warning = f"{spec}: warning: a: stop stages sum to 9 s; after a lost lease 0.8 s remain"
    assert check(tmp_path)[1].splitlines()[1:] == [f"{spec}: ok, 1 child: a", warning]
    spec.write_text(SPEC.format("a").replace("app", "ap"))
    code, out = check(tmp_path)
    assert code == 2
    assert (
        f'{spec}:5: child[a].fence[1]: there is no [database.ap] in agent.toml (did you mean "app"?)' in out
    )
    assert check(spec)[0] == 0, "without an agent.toml nobody knows the databases"


def test_a_name_declared_in_two_files_is_a_problem(check: Check, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(SPEC.format("same"))
    code, out = check(tmp_path)
    assert code == 2
    assert f'{tmp_path}/b.toml: child[same].name: "same" is also declared in {tmp_path}/a.toml' in out


def test_json_has_every_problem_in_its_parts(check: Check, tmp_path: Path) -> None:
    spec = tmp_path / "a.toml"
    spec.write_text(SPEC.format("a") + "period = 5\n")
    code, out = check("--json", spec)
    assert code == 2
    assert json.loads(out) == [
        {
            "file": str(spec),
            "ok": False,
            "kind": "spec",
            "children": [],
            "problems": [
                {
                    "source": str(spec),
                    "line": 7,
                    "key": "child[a].period",
                    "message": "5 has no unit",
                    "hint": 'write "5s"',
                }
            ],
            "warnings": [],
        }
    ]


def test_what_is_shipped_to_start_from_has_no_problems(check: Check, tmp_path: Path) -> None:
    (documented,) = re.findall(r"```toml\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    agent = tmp_path / "agent.toml"
    agent.write_text(documented)
    code, out = check(agent, DEPLOY / "specs")
    assert code == 0
    specs = sorted((DEPLOY / "specs").glob("*.toml"))
    assert [line for line in out.splitlines() if "warning" not in line] == [
        f"{agent}: ok, the configuration of host alpha in cluster prod",
        *(f"{spec}: ok, 1 child: {spec.stem}" for spec in specs),
    ]
    assert len(specs) >= 2
    assert all("stop stages sum to" in line for line in out.splitlines() if "warning" in line)
