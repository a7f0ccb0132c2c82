"""The command line against a real host with a real daemon."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from node_agent.sandbox.cluster import Sandbox
from tests.support.command_line import CommandLine

pytestmark = pytest.mark.slow

TICKER = """
schema = 1
[[child]]
id = "ticker"
name = "ticker"
run.command = ["/bin/sh", "-c", "echo one; echo two; exec sleep 1h"]
"""


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One host, one etcd member, PostgreSQL, and the sweeper."""
    sandbox = Sandbox(tmp_path_factory.mktemp("workplace"), hosts=("alpha",), members=1)

    async def start() -> None:
        await sandbox.start()
        await sandbox.apply_sweeper()

    try:
        asyncio.run(start())
        yield sandbox
    finally:
        asyncio.run(sandbox.stop())


@pytest.fixture
def here(herd: Sandbox, run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The test is typed in the sandbox's directory; the sweeper is ready."""
    monkeypatch.chdir(herd.workplace)
    monkeypatch.delenv("PGHERD_AGENT", raising=False)
    assert run("wait", "sweeper", "--timeout", "30s") == 0, run.errors
    return herd


@pytest.fixture
def ticker(here: Sandbox, run: CommandLine, tmp_path: Path) -> Iterator[str]:
    """A plain command under a name; gone at the end."""
    (tmp_path / "ticker.toml").write_text(TICKER)
    assert run("apply", str(tmp_path / "ticker.toml")) == 0, run.errors
    assert run("wait", "ticker", "--timeout", "30s") == 0, run.errors
    yield "ticker"
    assert run("delete", "ticker") == 0, run.errors


def _json(run: CommandLine, *words: str) -> dict[str, object]:
    assert run(*words, "--json") == 0, run.errors
    answer: dict[str, object] = json.loads(run.output)
    return answer


def test_all_is_well(here: Sandbox, run: CommandLine) -> None:
    assert run("status") == 0, run.output
    assert run.output.endswith("all is well\n")
    assert run("doctor", "-c", str(here.hosts["alpha"].directory / "agent.toml")) == 0, run.output


def test_the_sandbox_of_this_directory_is_asked(here: Sandbox, run: CommandLine) -> None:
    assert run("nodes") == 0
    assert run.output.splitlines()[1].startswith("alpha  ready")


def test_a_daemon_is_asked_by_its_name(here: Sandbox, run: CommandLine) -> None:
    assert run("call", "sweeper", "status") == 0, run.errors
    status = json.loads(run.output)
    name = _json(run, "whereis", "sweeper")["name"]
    assert isinstance(name, dict)
    assert (status["epoch"], status["start"]) == (name["epoch"], name["start"])
    assert run("cast", "sweeper", "tick") == 0, run.errors
    assert run.output == f"accepted by epoch {name['epoch']}, start {name['start']}\n"


def test_what_a_daemon_offers_is_listed(here: Sandbox, run: CommandLine) -> None:
    assert run("methods", "sweeper") == 0
    assert "sweep_now  call" in run.output


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["call", "sweper", "status"], 1, "NO_SUCH_NAME", "sweeper"),
        (["call", "sweeper", "statsu"], 1, "NO_SUCH_METHOD", "status"),
        (["call", "Sweeper!", "status"], 2, "INVALID", ""),
        (["call", "sweeper", "status", '{"verbose": 1}'], 2, "INVALID", ""),
        (["call", "sweeper", "status", "--epoch", "1"], 1, "WRONG_EPOCH", ""),
        (["methods", "sweper"], 1, "NO_SUCH_NAME", "sweeper"),
        (["restart", "sweper"], 1, "NO_SUCH_NAME", ""),
        (["ps", "alhpa"], 1, "NO_SUCH_NAME", "alpha"),
        (["call", "sweeper", "tick"], 1, "NO_SUCH_METHOD", "pgherd cast"),
        (["call", "sweeper@alpha", "status"], 1, "NO_SUCH_NAME", "did you mean 'sweeper'?"),
        (["logs", "sweper"], 1, "NO_SUCH_NAME", ""),
    ],
)
def test_mistakes_are_refused_with_a_hint(
    here: Sandbox, run: CommandLine, words: list[str], code: int, message: str, hint: str
) -> None:
    assert run(*words) == code, run.errors
    assert f"({message}; refused, not executed)" in run.errors
    assert hint in run.errors


def test_a_wrong_spec_changes_nothing_and_every_problem_is_shown(
    here: Sandbox, run: CommandLine, tmp_path: Path
) -> None:
    spec = TICKER.replace("ticker", "first") + '[[child]]\nid = "b"\nrestart = "always"\nnmae = "b"\n'
    (tmp_path / "two.toml").write_text(spec)
    assert run("apply", str(tmp_path / "two.toml")) == 2
    assert "permanent" in run.errors
    assert "nmae" in run.errors
    assert run("specs", "first") == 1


def test_an_applied_spec_can_be_applied_again(ticker: str, run: CommandLine, tmp_path: Path) -> None:
    assert run("specs", ticker) == 0
    (tmp_path / "again.toml").write_text(run.output)
    assert run("apply", str(tmp_path / "again.toml")) == 0
    assert run.output == "ticker unchanged\n"


def test_a_spec_that_this_host_cannot_run_is_written_with_a_warning(
    here: Sandbox, run: CommandLine, tmp_path: Path
) -> None:
    spec = TICKER.replace("ticker", "elsewhere") + 'fence = ["accounts"]\n'
    (tmp_path / "elsewhere.toml").write_text(spec)
    assert run("apply", str(tmp_path / "elsewhere.toml")) == 0, run.errors
    assert run.output == (
        "elsewhere created (host alpha has no [database.accounts], so it will not run there)\n"
    )
    assert run("delete", "elsewhere") == 0
    assert run.output == "elsewhere: spec deleted\n"


def test_the_configuration_of_an_agent_is_not_applied(here: Sandbox, run: CommandLine) -> None:
    assert run("apply", str(here.hosts["alpha"].directory / "agent.toml")) == 2
    assert "is the configuration of an agent, not a file of specs" in run.errors


def test_a_file_of_many_specs_is_written_at_once(here: Sandbox, run: CommandLine, tmp_path: Path) -> None:
    names = [f"many{number}" for number in range(60)]
    many = "schema = 1\n" + "".join(
        f'[[child]]\nid = "{name}"\nname = "{name}"\nplacement.require = {{ disk = "none" }}\n'
        'run.command = ["true"]\n'
        for name in names
    )
    (tmp_path / "many.toml").write_text(many)
    assert run("apply", str(tmp_path / "many.toml")) == 0, run.errors
    assert run.output.count("created") == len(names)
    for name in names:
        assert run("delete", name) == 0, run.errors


def test_a_spec_too_large_for_etcd_is_invalid(here: Sandbox, run: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "huge.toml").write_text(TICKER.replace("ticker", "huge").replace("one", "x" * 1_600_000))
    assert run("apply", str(tmp_path / "huge.toml")) == 2
    assert "huge: its spec is 1.53 MiB, and etcd takes 1.5 MiB at most (INVALID" in run.errors
    assert run("specs", "huge") == 1


def test_children_that_ended_long_ago_are_no_news_after_a_restart_of_the_agent(
    ticker: str, run: CommandLine
) -> None:
    assert run("stop", ticker) == 0
    assert run("wait", ticker, "--for", "stopped") == 0
    assert run("restart-agent") == 0, run.errors
    assert run("events") == 0
    assert "of the former agent is killed" not in run.output
    assert run("start", ticker) == 0
    assert run("wait", ticker) == 0, run.errors


def test_a_stopped_name_stays_stopped_until_it_is_started(ticker: str, run: CommandLine) -> None:
    assert run("stop", ticker) == 0
    assert run("wait", ticker, "--for", "stopped") == 0
    assert run("whereis", ticker) == 1
    assert "stopped" in run.errors
    assert run("why", ticker) == 0
    assert "stop" in run.output
    assert run("start", ticker) == 0
    assert run("wait", ticker) == 0


def test_a_restart_keeps_the_epoch(ticker: str, run: CommandLine) -> None:
    before = _json(run, "whereis", ticker)["name"]
    assert run("restart", ticker) == 0, run.errors
    after = _json(run, "whereis", ticker)["name"]
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert (after["epoch"], after["start"]) == (before["epoch"], before["start"] + 1)


def test_what_a_worker_wrote_can_be_read(ticker: str, run: CommandLine) -> None:
    while not run.output.endswith("one\ntwo\n"):
        assert run("logs", ticker) == 0, run.errors
    assert run("logs", ticker, "-n", "1") == 0
    assert run.output == "two\n"
    assert run.errors == ""


def test_workers_survive_their_agent(ticker: str, run: CommandLine) -> None:
    before = _pids(run)
    assert run("restart-agent") == 0, run.errors
    assert run("wait", ticker) == 0, run.errors
    assert _pids(run) == before


def _pids(run: CommandLine) -> dict[str, int]:
    children = _json(run, "ps")["children"]
    assert isinstance(children, list)
    return {child["child"]: child["pid"] for child in children}


def test_why_answers_while_etcd_is_away(here: Sandbox, run: CommandLine) -> None:
    asyncio.run(here.etcd.kill_member(0))
    try:
        while (code := run("status", "--json", "--timeout", "20s")) == 0:
            pass
        assert code == 1
        assert run("why", "sweeper") == 0
        assert "sweeper" in run.output
        assert run("doctor", "-c", str(here.hosts["alpha"].directory / "agent.toml")) == 1
        assert "wrong etcd" in run.output
    finally:
        asyncio.run(here.etcd.start_member(0))
    assert run("wait", "sweeper", "--timeout", "30s") == 0, run.errors


STUCK = """
schema = 1
[[child]]
id = "stuck"
name = "stuck"
run.behaviour = "stuck:Stuck"
run.path = ["{path}"]
"""

STUCK_PY = """
import asyncio
from node_agent.behaviours import Server, cast

class Stuck(Server):
    @cast
    async def hang(self) -> None:
        await asyncio.Event().wait()
"""


def test_a_handler_that_hangs_is_named(here: Sandbox, run: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK_PY)
    (tmp_path / "stuck.toml").write_text(STUCK.format(path=tmp_path))
    assert run("apply", str(tmp_path / "stuck.toml")) == 0, run.errors
    assert run("wait", "stuck", "--timeout", "30s") == 0, run.errors
    for _ in range(3):
        assert run("cast", "stuck", "hang") == 0, run.errors
    assert run("why", "stuck") == 0
    assert "its handler `hang` runs for " in run.output
    assert "2 messages wait" in run.output
    assert run("delete", "stuck") == 0, run.errors
