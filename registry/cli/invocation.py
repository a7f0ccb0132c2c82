"""What every command has in common: ``--agent``, ``--json``, ``--timeout``, before or after its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from registry.find_agent import CONFIG_VARIABLE, find_config
from registry.units import format_duration, parse_duration

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Invocation:
    """The common options of one run.  ``timeout`` is in seconds; None: the command's own default."""

    agent: str | None = None
    json: bool = False
    timeout: float | None = None

    def seconds(self, default: float) -> float:
        """Return the timeout to use."""
        return default if self.timeout is None else self.timeout


class Duration(click.ParamType[float]):
    """Seconds, written with a unit: ``500ms``, ``30s``, ``5m``."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return ``value`` in seconds."""
        if isinstance(value, float):
            return value
        try:
            seconds = parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not 0 < seconds <= 86400:
            self.fail(f"{format_duration(seconds)} is not between 1ms and 24h", param, ctx)
        return seconds


def common_options() -> list[click.Option]:
    """Return the common options; their values end up in the :class:`Invocation`."""
    return [
        click.Option(
            ["--agent"],
            metavar="ADDRESS",
            expose_value=False,
            callback=_remember,
            help="Agent to ask: a socket's path or host:port.  Default: PGHERD_AGENT, the nearest .pgherd/ "
            "of a sandbox upwards, /run/pgherd/agent.sock.",
        ),
        click.Option(
            ["--json"],
            is_flag=True,
            default=None,
            expose_value=False,
            callback=_remember,
            help="Print JSON, errors too.",
        ),
        click.Option(
            ["--timeout"],
            type=Duration(),
            metavar="DURATION",
            expose_value=False,
            callback=_remember,
            help="How long to wait for an answer, such as 500ms, 30s, 5m.",
        ),
    ]


def _remember(context: click.Context, parameter: click.Parameter, value: object) -> None:
    """Keep an option that was given; the one nearest to the command's end wins."""
    if value is not None and parameter.name is not None:
        setattr(context.ensure_object(Invocation), parameter.name, value)


class Command(click.Command):
    """A command with the common options behind its own."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.params += common_options()


pass_invocation = click.make_pass_decorator(Invocation, ensure=True)


def config_option(help: str = "The host's configuration.") -> Callable[[F], F]:
    """Return the option -c; without it, PGHERD_CONFIG or a sandbox, /etc/pgherd/agent.toml is meant."""
    return click.option(
        "-c",
        "--config",
        type=click.Path(path_type=Path),
        envvar=CONFIG_VARIABLE,
        show_envvar=True,
        default=find_config,
        show_default="the nearest sandbox's, or /etc/pgherd/agent.toml",
        help=help,
    )
