"""The group of commands, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import ast
import importlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from registry.cli.invocation import Invocation, common_options
from registry.errors import DaemonError, HerdError, Outcome, exit_code
from registry.toml.source import ConfigInvalid

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

COMMANDS = {
    "apply": "registry.cli.specs:apply",
    "call": "registry.cli.messages:call",
    "cast": "registry.cli.messages:cast",
    "delete": "registry.cli.specs:delete",
    "events": "registry.cli.explain:events",
    "logs": "registry.cli.children:logs",
    "methods": "registry.cli.names:methods",
    "names": "registry.cli.names:names",
    "nodes": "registry.cli.nodes:nodes",
    "ps": "registry.cli.children:ps",
    "restart": "registry.cli.children:restart",
    "restart-agent": "registry.cli.nodes:restart_agent",
    "specs": "registry.cli.specs:specs",
    "start": "registry.cli.specs:start",
    "status": "registry.cli.status:status",
    "stop": "registry.cli.specs:stop",
    "tree": "registry.cli.children:tree",
    "version": "registry.cli.version:version",
    "wait": "registry.cli.explain:wait",
    "whereis": "registry.cli.names:whereis",
    "why": "registry.cli.explain:why",
}
"""Our own commands and where they are, so that only the one that is used is imported."""

SECTIONS = {
    "First": ("demo", "sandbox", "status", "doctor"),
    "Look": ("nodes", "names", "ps", "tree", "methods", "whereis", "specs", "why", "events", "logs"),
    "Talk": ("call", "cast", "wait"),
    "Change": ("apply", "delete", "start", "stop", "restart"),
    "Hosts and databases": ("run", "check", "restart-agent", "sql"),
}
"""The order of the help."""

OUTCOMES = {
    Outcome.REPLY: "executed, the daemon said no",
    Outcome.REFUSED: "refused, not executed",
    Outcome.UNKNOWN: "unknown: it may have been executed",
}

_USAGE = 2
_INTERRUPTED = 128 + signal.SIGINT


class Herd(click.Group):
    """The commands by name, imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return every command's name."""
        return sorted({*COMMANDS, *_plugins()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None when there is none of that name."""
        where = _where(cmd_name)
        return _load(where) if where else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that was typed, or say which one was probably meant."""
        word = args[0]
        if not word.startswith("-") and self.get_command(ctx, word) is None:
            from difflib import get_close_matches

            near = get_close_matches(word, self.list_commands(ctx), n=1)
            meant = f", did you mean {near[0]!r}?" if near else "; pgherd --help lists them"
            raise click.UsageError(f"there is no command {word!r}{meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section."""
        known = {name for names in SECTIONS.values() for name in names}
        more = tuple(name for name in self.list_commands(ctx) if name not in known)
        for title, names in (*SECTIONS.items(), ("More", more)):
            rows = [(name, _summary(where)) for name in names if (where := _where(name))]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


@cache
def _plugins() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group="pgherd.commands")}


def _where(name: str) -> str:
    """Return ``module:attribute`` of a command, empty when there is none of that name."""
    if name in COMMANDS:
        return COMMANDS[name]
    plugin = _plugins().get(name)
    return plugin.value if plugin else ""


def _summary(where: str) -> str:
    """Return the first line of a command's docstring without importing what the command needs: a second."""
    from importlib.util import find_spec

    module, _, function = where.partition(":")
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return "(not installed)"
    for node in ast.parse(Path(spec.origin).read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
    return ""


def _load(where: str) -> click.Command:
    module, _, attribute = where.partition(":")
    command: object = getattr(importlib.import_module(module), attribute)
    if not isinstance(command, click.Command):
        raise TypeError(f"{where} is not a click command")
    return command


pgherd = Herd(
    "pgherd",
    help="Daemons around PostgreSQL: supervised, named, callable, exactly one.",
    params=common_options(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 refused or not well, 2 wrong input, 3 outcome unknown, 4 no agent, "
    "5 the daemon said no.",
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    invocation = Invocation()
    sys.exit(_run(arguments, invocation))


def _run(arguments: Sequence[str] | None, invocation: Invocation) -> int:
    try:
        code = pgherd.main(arguments, "pgherd", standalone_mode=False, obj=invocation)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except click.ClickException as error:
        print("\n".join(_usage(error)), file=sys.stderr)
        return error.exit_code
    except ConfigInvalid as error:
        print("\n".join(f"pgherd: {problem}" for problem in error.problems), file=sys.stderr)
        return _USAGE
    except HerdError as error:
        print(_as_json(error) if invocation.json else "\n".join(lines(error)), file=sys.stderr)
        return exit_code(error)


def lines(error: HerdError) -> Iterator[str]:
    """Yield an error as people read it: what, whether it was executed, and the remedy."""
    first, *more = error.message.splitlines() or [""]
    verdict = f"({error.reason}; {OUTCOMES[error.outcome]})"
    yield f"pgherd: {first} {verdict}"
    yield from (f"  {line}" for line in more)
    if isinstance(error, DaemonError) and error.details:
        # What the daemon's author gave beside the reason; other errors have told theirs.
        yield "  " + ", ".join(f"{key}={value}" for key, value in error.details.items())
    yield from (f"hint: {line}" for line in error.hint.splitlines())


def _as_json(error: HerdError) -> str:
    return json.dumps(
        {
            "reason": error.reason,
            "outcome": error.outcome.value,
            "message": error.message,
            "hint": error.hint,
            "details": error.details,
        },
        ensure_ascii=False,
    )


def _usage(error: click.ClickException) -> Iterator[str]:
    yield f"pgherd: {error.format_message()}"
    if isinstance(error, click.UsageError) and error.ctx is not None and error.ctx.command is not pgherd:
        yield f"hint: {error.ctx.command_path} --help"
