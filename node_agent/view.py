"""What this agent can tell about itself and the cluster, in messages of the API.  Only reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from node_agent import why as explaining
from node_agent.claims import candidates_of, penalties_of
from node_agent.lifecycle import Child
from node_agent.membership import Membership, Phase
from node_agent.pulse import Pulse
from node_agent.spec.child import Command
from node_agent.spec.children_dir import OwnChildren
from node_agent.states import State
from node_agent.supervisor import Supervisor
from node_agent.warden_link import Welcome
from node_agent.wishes import Wishes
from registry import placement
from registry.clock import Clock
from registry.config import AgentConfig
from registry.directory import Directory
from registry.events import EventLog
from registry.specs import Desired, SpecRecord
from registry.store import MemberStatus
from registry.v1 import cluster_pb2, supervision_pb2


@dataclass(frozen=True, slots=True)
class Around:
    """What has to be asked for.

    etcd's members, the databases, the nodes whose agents do not answer, and how this host's workers are.
    """

    members: tuple[MemberStatus, ...]
    databases: tuple[cluster_pb2.DatabaseStatus, ...]
    silent: frozenset[str]
    pulses: Mapping[str, Pulse]


@dataclass(frozen=True, slots=True)
class View:
    """The reading side of one agent."""

    config: AgentConfig
    version: str
    welcome: Welcome
    membership: Membership
    directory: Directory
    supervisor: Supervisor
    wishes: Wishes
    own: OwnChildren
    log: EventLog
    clock: Clock

    # Cluster.

    def status(self, around: Around) -> cluster_pb2.StatusResponse:
        """Return how this agent is."""
        membership, session = self.membership, self.membership.session
        welcome = self.welcome
        return cluster_pb2.StatusResponse(
            cluster=self.config.cluster,
            host=self.config.host,
            node=membership.node,
            version=self.version,
            state=membership.phase.value,
            containment=welcome.containment,
            lease_slack=max(session.slack(), 0.0) if session else 0.0,
            lease_ttl=session.ttl if session else self.config.timing.ttl,
            in_sync=self.directory.in_sync,
            stale_since=self.directory.stale_since,
            revision=self.directory.revision,
            etcd=[
                cluster_pb2.EtcdMember(
                    endpoint=m.endpoint,
                    version=m.version,
                    leader=m.leader,
                    problem=m.error or ("" if m.has_leader else "it sees no leader"),
                )
                for m in around.members
            ],
            databases=around.databases,
            problems=self.problems(around),
            generation=welcome.generation,
            pids={"launcher": welcome.launcher_pid, "warden": welcome.warden_pid, "agent": welcome.agent_pid},
        )

    def problems(self, around: Around) -> list[str]:
        """Return what is not well, one sentence each."""
        found = []
        if self.membership.phase is not Phase.READY:
            found.append(f"this host is {self.membership.phase.value}: {self.membership.problem}")
        elif self.membership.problem:
            found.append(self.membership.problem)
        if not self.directory.in_sync:
            found.append(f"the copy of the registry is stale {self.directory.stale_since}")
        found += [f"etcd {m.endpoint}: {m.error}" for m in around.members if m.error]
        found += [f"database {d.name}: {d.problem}" for d in around.databases if d.problem]
        found += [
            f"the agent of {record.host} does not answer; if the host is gone, its lease ends within "
            f"{self.config.timing.ttl:g} s"
            for node in around.silent
            if (record := self.directory.nodes.get(node)) is not None
        ]
        found += [str(problem) for problem in self.own.problems]
        found += [f"{key}: {p.describe()}" for key, p in sorted(around.pulses.items()) if p.is_problem]
        found += [line for name in sorted(self.directory.specs) if (line := self._problem_of(name))]
        found += [
            f"child {child.key} of this host has the id of the cluster's {child.key}: rename it in children.d"
            for child in self.supervisor.children.values()
            if child.ownership is None and child.key in self.directory.specs
        ]
        found += [
            f"{child.key} is {child.state.value}{': ' + child.obstacle if child.obstacle else ''}"
            for child in self.supervisor.children.values()
            if child.ownership is None and child.state in (State.BACKOFF, State.FAILED)
        ]
        return found

    def _problem_of(self, name: str) -> str:
        wish = self.wishes.read(self.directory.specs[name])
        if not wish.running:
            return ""
        if self.directory.lookup(name) is None:
            return f"{name} has no owner"
        status = self.directory.status(name)
        if status is None or status.state.value != "ready":
            return f"{name} is {status.state.value if status else 'owned and not started yet'}"
        return ""

    def nodes(self) -> cluster_pb2.NodesResponse:
        """Return all hosts, those that are down too."""
        directory = self.directory
        owned: dict[str, int] = {}
        for owner in directory.owners.values():
            owned[owner.node] = owned.get(owner.node, 0) + 1
        alive = {record.host: record for record in directory.nodes.values()}
        nodes = []
        for host in sorted({*directory.hosts, *alive}):
            record, fixed = alive.get(host), directory.hosts.get(host)
            if record is None:
                nodes.append(cluster_pb2.Node(host=host, state="down", labels=fixed.labels if fixed else {}))
                continue
            nodes.append(
                cluster_pb2.Node(
                    host=host,
                    node=record.node,
                    address=record.address,
                    version=record.version,
                    protocol=record.protocol,
                    state=record.state.value,
                    containment=record.containment,
                    labels=record.labels,
                    names=owned.get(record.node, 0),
                    databases=record.databases,
                )
            )
        return cluster_pb2.NodesResponse(nodes=nodes, in_sync=directory.in_sync)

    def why(self, name: str, silent: frozenset[str], pulse: Pulse | None) -> cluster_pb2.WhyResponse:
        """Explain one name; ``silent`` are the nodes whose agents do not answer."""
        return self._explanation(explaining.explain(self._facts(name, silent, pulse), self.log.about(name)))

    def why_not_well(self, around: Around) -> cluster_pb2.WhyResponse:
        """Explain everything that is not well."""
        lines = [explaining.Line(problem) for problem in self.problems(around)]
        for name in sorted(self.directory.specs):
            if self._problem_of(name):
                lines += explaining.explain(self._facts(name, around.silent, around.pulses.get(name)), ())
        return self._explanation(lines or [explaining.Line("all is well", "pgherd status")])

    def _explanation(self, lines: list[explaining.Line]) -> cluster_pb2.WhyResponse:
        return cluster_pb2.WhyResponse(
            caveat=""
            if self.directory.in_sync
            else f"from memory: no news from etcd {self.directory.stale_since}",
            lines=[cluster_pb2.WhyLine(at=line.at, what=line.what, **{"try": line.hint}) for line in lines],
        )

    def _facts(self, name: str, silent: frozenset[str], pulse: Pulse | None) -> explaining.Facts:
        directory, holdings = self.directory, self.membership.holdings
        record = directory.specs.get(name)
        wish = self.wishes.read(record) if record else None
        placed = directory.placements.get(name)
        owner = directory.lookup(name)
        ranking = (
            placement.explain(
                name, wish.spec.constraints, candidates_of(directory), penalties_of(placed, wish.record)
            )
            if wish is not None and wish.spec is not None and owner is None
            else ()
        )
        return explaining.Facts(
            name=name,
            wish=wish,
            owner=owner,
            status=directory.status(name),
            placement=placed,
            child=self.supervisor.children.get(name),
            pulse=pulse,
            is_silent=owner is not None and owner.node in silent,
            ttl=self.config.timing.ttl,
            verdict=holdings.claims.verdicts.get(name) if holdings else None,
            ranking=ranking,
            node=directory.nodes.get(owner.node) if owner else None,
            host=self.config.host,
            now=self.clock.now(),
            known=self.known(),
        )

    def known(self) -> set[str]:
        """Return every name and child this agent could be asked about."""
        return {*self.directory.specs, *self.directory.owners, *self.supervisor.children}

    # Supervision.

    def children(self) -> list[supervision_pb2.Child]:
        """Return the children of this host, ordered by key."""
        return [self._child(self.supervisor.children[key]) for key in sorted(self.supervisor.children)]

    def _child(self, child: Child) -> supervision_pb2.Child:
        process = child.process
        return supervision_pb2.Child(
            host=self.config.host,
            child=child.spec.id,
            name=child.spec.name,
            kind="command" if isinstance(child.spec.run, Command) else "behaviour",
            state=child.state.value,
            pid=child.pid,
            epoch=child.epoch,
            start=child.start,
            restarts=child.restarts,
            last_exit=child.last_exit,
            uptime=self.clock.now() - process.since if process else 0.0,
        )

    def specs(self, name: str) -> list[supervision_pb2.Spec]:
        """Return declared specs, all with an empty ``name``."""
        records = self.directory.specs
        return [self._spec(records[key]) for key in sorted(records) if name in ("", key)]

    def _spec(self, record: SpecRecord) -> supervision_pb2.Spec:
        return supervision_pb2.Spec(
            name=record.name,
            toml=record.toml,
            desired="running" if record.desired is Desired.RUNNING else "stopped",
            who=record.who,
            at=record.at,
            problem=self.wishes.read(record).problem,
        )
