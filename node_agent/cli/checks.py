"""What ``pgherd doctor`` looks at.  A check returns findings and raises nothing for what it checks."""

from __future__ import annotations

import asyncio
import enum
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from node_agent.postgres import install
from node_agent.warden.kernel import has_capabilities
from registry.cli.agent import connect
from registry.cli.invocation import Invocation
from registry.config import AgentConfig, ConfigInvalid, Database, EtcdConfig, Timing, load
from registry.errors import HerdError, StoreError, Unreachable
from registry.etcd import EtcdStore
from registry.store import MemberStatus
from registry.units import format_duration
from registry.v1.cluster_pb2 import StatusRequest, StatusResponse

_CAP_SYS_ADMIN = 21
_SOUND_ETCD = (3, 5, 23)
_ANSWER_SECONDS = 3.0


class Verdict(enum.Enum):
    """How a check ended; a note is worth knowing and not wrong."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: about what, how it is, what helps."""

    check: str
    verdict: Verdict
    what: str
    remedy: str = ""


def examine(path: Path, agent: str | None) -> Iterator[Finding]:
    """Run every check that makes sense, from the configuration outwards."""
    try:
        config = load(path)
    except ConfigInvalid as error:
        for problem in error.problems:
            yield Finding("configuration", Verdict.WRONG, str(problem), f"pgherd check {path}")
        if agent is not None:
            yield from _running_agent(agent, "")
        return
    yield Finding("configuration", Verdict.OK, f"{path}: host {config.host} of cluster {config.cluster}")
    yield from _agent(config, agent)
    yield from asyncio.run(_etcd(config.etcd, config.timing))
    for database in config.databases.values():
        yield asyncio.run(_database(database, config.cluster))


def _agent(config: AgentConfig, agent: str | None) -> Iterator[Finding]:
    findings = list(
        _running_agent(agent or str(config.run_dir / "agent.sock"), f"pgherd run -c {config.path}")
    )
    yield from findings
    if any(finding.verdict is Verdict.OK for finding in findings):
        return
    yield _port(config.listen.grpc)
    if has_capabilities(_CAP_SYS_ADMIN) or os.getpid() == 1:
        yield Finding("containment", Verdict.OK, f"would be full, started by uid {os.getuid()} as here")
    else:
        yield _partial(f"would be partial: uid {os.getuid()} may not make a PID namespace")


def _running_agent(address: str, start: str) -> Iterator[Finding]:
    try:
        with connect(Invocation(agent=address, timeout=_ANSWER_SECONDS)) as agent:
            answer = agent.ask(agent.cluster.Status, StatusRequest())
    except Unreachable as error:
        yield Finding("agent", Verdict.WRONG, error.message, start)
    except HerdError as error:
        yield Finding("agent", Verdict.WRONG, error.message, error.hint)
    else:
        yield from _answering(answer)


def _answering(agent: StatusResponse) -> Iterator[Finding]:
    yield Finding(
        "agent",
        Verdict.OK,
        f"{agent.host} is {agent.state}: pgherd {agent.version}, node {agent.node}, "
        f"generation {agent.generation}",
    )
    for problem in agent.problems:
        yield Finding("agent", Verdict.WRONG, problem, "pgherd why")
    if not agent.in_sync:
        yield Finding("registry", Verdict.WRONG, f"its copy is behind: {agent.stale_since}", "pgherd why")
    if agent.containment == "full":
        yield Finding("containment", Verdict.OK, "full: when the warden dies, every descendant dies")
    else:
        yield _partial("partial: what a worker forks twice, or runs set-uid, can survive the warden")


def _partial(what: str) -> Finding:
    return Finding("containment", Verdict.NOTE, what, "run it with CAP_SYS_ADMIN, or as PID 1 of a container")


def _port(address: str) -> Finding:
    """Find out whether the agent could listen where it should."""
    host, _, port = address.rpartition(":")
    try:
        (family, kind, protocol, _, where), *_ = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        remedy = f"ss -ltnp 'sport = :{port}', or another listen.grpc"
        return Finding("listen", Verdict.WRONG, f"{address} cannot be used: {why}", remedy)
    return Finding("listen", Verdict.OK, f"{address} is free")


async def _etcd(config: EtcdConfig, timing: Timing) -> Sequence[Finding]:
    password = config.password_file.read_text().strip() if config.password_file else ""
    store = EtcdStore(config.endpoints, tls=config.tls, user=config.user, password=password)
    try:
        members = await store.members(timeout=_ANSWER_SECONDS)
        findings = [finding for member in members for finding in _member(member)]
        if any(member.has_leader for member in members):
            findings.append(await _lease(store, timing))
        return findings
    finally:
        await store.close()


def _member(member: MemberStatus) -> Iterator[Finding]:
    if member.error:
        remedy = (
            f"etcdctl --endpoints={member.endpoint} endpoint status: does it run, is this its client URL?"
        )
        yield Finding("etcd", Verdict.WRONG, f"{member.endpoint}: {member.error}", remedy)
    elif not member.has_leader:
        remedy = "start the other members: a majority must run and reach each other"
        yield Finding(
            "etcd", Verdict.WRONG, f"{member.endpoint} has no leader, it can neither read nor write", remedy
        )
    else:
        role = ", leader" if member.leader else ""
        yield Finding(
            "etcd", Verdict.OK, f"{member.endpoint}: {member.version}{role}, revision {member.revision}"
        )
    if member.version and _numbers(member.version) < _SOUND_ETCD:
        yield Finding(
            "etcd",
            Verdict.NOTE,
            f"{member.endpoint}: {member.version} has known defects in leases and after crashes",
            "production wants 3.5.23 or newer, or 3.6",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


async def _lease(store: EtcdStore, timing: Timing) -> Finding:
    """Ask for a lease as a session would: etcd raises one that is shorter than 1.5 election timeouts."""
    try:
        lease = await store.grant(timing.ttl, timeout=_ANSWER_SECONDS)
        await store.revoke(lease.id, timeout=_ANSWER_SECONDS)
    except StoreError as error:
        return Finding(
            "lease",
            Verdict.WRONG,
            f"etcd grants none: {error}",
            "etcdctl endpoint status; etcdctl alarm list",
        )
    wanted, given = format_duration(timing.ttl), format_duration(lease.ttl)
    if lease.ttl > timing.ttl:
        remedy = "a shorter --election-timeout of etcd, or a longer lease.ttl"
        return Finding(
            "lease", Verdict.WRONG, f"asked for {wanted}, etcd grants no less than {given}", remedy
        )
    return Finding("lease", Verdict.OK, f"{wanted}; pgherd doctor --timing shows what follows from it")


async def _database(database: Database, cluster: str) -> Finding:
    check, remedy = f"database {database.name}", f"pgherd sql install {database.name}"
    try:
        status = await install.status(database.conninfo)
    except install.DatabaseUnreachable as error:
        return Finding(
            check, Verdict.WRONG, str(error), error.hint or "is conninfo right, and PostgreSQL running?"
        )
    except install.InstallFailed as error:
        return Finding(check, Verdict.WRONG, str(error), error.hint)
    if status.problems:
        return Finding(check, Verdict.WRONG, "; ".join(status.problems), remedy)
    if status.cluster != cluster:
        what = f'schema herd belongs to cluster "{status.cluster}", not "{cluster}"'
        return Finding(check, Verdict.WRONG, what, remedy)
    role = "standby" if status.standby else "primary"
    return Finding(
        check, Verdict.OK, f"PostgreSQL {status.server_version}, {role}, schema herd version {status.version}"
    )
