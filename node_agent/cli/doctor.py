"""``pgherd doctor``: what stands in the way on this host, one check after the other, each with its remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import click

from node_agent.cli.checks import Finding, Verdict, examine
from registry.cli.invocation import Command, Invocation, config_option, pass_invocation
from registry.cli.output import print_json, print_table, styled
from registry.config import Timing, load


@click.command(cls=Command)
@config_option()
@click.option("--timing", is_flag=True, help="Print the deadlines that follow from the lease, check nothing.")
@pass_invocation
def doctor(invocation: Invocation, config: Path, timing: bool) -> int:
    """Check this host: configuration, agent, etcd, containment, databases.

    Works without an agent and without etcd.  Exit code 1 when something is wrong.
    """
    if timing:
        _print_timing(invocation, load(config).timing)
        return 0
    findings = list(examine(config, invocation.agent))
    if invocation.json:
        print_json([asdict(finding) | {"verdict": finding.verdict.value} for finding in findings])
    else:
        _print(findings)
    return 1 if any(finding.verdict is Verdict.WRONG for finding in findings) else 0


def _print(findings: Iterable[Finding]) -> None:
    wrong = 0
    for finding in findings:
        word = finding.verdict.value
        click.echo(f"{styled(word)}{' ' * (6 - len(word))}{finding.check:<15} {finding.what}")
        if finding.remedy:
            click.echo(f"{'':<21} try: {finding.remedy}")
        wrong += finding.verdict is Verdict.WRONG
    click.echo("nothing is wrong" if not wrong else f"{wrong} wrong")


def _print_timing(invocation: Invocation, timing: Timing) -> None:
    if invocation.json:
        print_json([{"what": what, "seconds": seconds, "why": why} for what, seconds, why in timing.table()])
        return
    print_table(
        ("WHAT", "SECONDS", "WHY"),
        ((what, f"{seconds:.2f}", why) for what, seconds, why in timing.table()),
        empty="",
    )
