"""The agent: every object is built here, in the order in which it starts, and stopped in reverse.

    warden link → supervisor → directory, names → membership → router, peers → server → worker socket

The server comes up without etcd, so that `status` and `why` answer from the first second.  The worker socket
comes last: a worker of a former agent is let in only when it is clear whether it is still ours.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any

import grpc

from node_agent import adoption
from node_agent.attachment import WorkerSocket
from node_agent.child_host import ChildHost
from node_agent.holdings import Holdings, Persist
from node_agent.lifecycle import Child
from node_agent.local import Local
from node_agent.membership import Membership, Restored
from node_agent.postgres.fence import FenceRaiser
from node_agent.services.cluster import Cluster
from node_agent.services.remote import Remote
from node_agent.services.supervision import Supervision
from node_agent.spec.children_dir import read_children
from node_agent.supervisor import Ending, Supervisor
from node_agent.view import View
from node_agent.warden import protocol
from node_agent.warden_link import WardenLink
from node_agent.wishes import Wishes
from registry import events, security
from registry.clock import SYSTEM_CLOCK, Boottime
from registry.config import AgentConfig, ConfigInvalid
from registry.directory import Directory
from registry.errors import Denied
from registry.etcd import EtcdStore
from registry.names import Names
from registry.nodes import NodeRecord, Nodes, NodeState
from registry.ownership import Owner, cluster_prefix
from registry.peers import Peers
from registry.router import Router
from registry.server import Server
from registry.specs import Specs
from registry.store import LeaseId
from registry.v1 import cluster_pb2, cluster_pb2_grpc, supervision_pb2_grpc

PROTOCOL = 1
"""Version of what agents say to each other."""
CONFIRM_TIMEOUT = 0.05
"""Seconds an agent has to say whether it still runs a name whose owner key vanished."""
LONGEST_HANG = 5.0
"""Seconds the agent's loop may stand still, at most, before the warden replaces its process."""
RESTART_GRACE = 0.2
"""Seconds for answers under way before the agent's process is replaced."""


def version() -> str:
    """Return pgherd's version."""
    return metadata.version("pgherd")


def make_store(config: AgentConfig) -> EtcdStore:
    """Return a new connection to etcd; of use in the running loop only."""
    etcd = config.etcd
    password = etcd.password_file.read_text().strip() if etcd.password_file else ""
    return EtcdStore(
        etcd.endpoints,
        tls=etcd.tls,
        user=etcd.user,
        password=password,
        canary=f"{cluster_prefix(config.cluster)}incarnation",
    )


class Agent:
    """One agent process, from the warden's welcome to its shutdown."""

    def __init__(self, config: AgentConfig, link: WardenLink) -> None:
        self._config, self._link = config, link
        self.log = self._emit = events.EventLog()
        self._own = read_children(config.children_dir, config.databases)
        self._ended_before: list[str] = []
        prefix = cluster_prefix(config.cluster)
        conninfos = {name: database.conninfo for name, database in config.databases.items()}
        self._host = ChildHost(
            cluster=config.cluster,
            host=config.host,
            socket=str(config.run_dir / "worker.sock"),
            link=link,
            fences=FenceRaiser(conninfos, cluster=config.cluster),
            log=self._emit,
            conninfos=conninfos,
            until=lambda: self._membership.may_act_until(),
            read_owner=lambda name: names.read_owner(name),
            counted=dict(link.welcome.starts),
        )
        self._supervisor = Supervisor(
            self._host,
            link,
            on_change=self._child_changed,
            on_end=self._child_ended,
            on_buried=self._child_buried,
        )
        self._store = make_store(config)
        self._directory = Directory(self._store, prefix, SYSTEM_CLOCK, self._emit)
        names, nodes = Names(self._store, prefix), Nodes(self._store, prefix)
        specs = Specs(self._store, prefix)
        wishes = Wishes(config.databases)

        def holdings(
            node: str, lease: LeaseId, persist: Persist, present: Callable[[], Awaitable[object]]
        ) -> Holdings:
            return Holdings(
                host=config.host,
                node=node,
                lease=lease,
                directory=self._directory,
                names=names,
                specs=specs,
                supervisor=self._supervisor,
                wishes=wishes,
                clock=SYSTEM_CLOCK,
                emit=self._emit,
                persist=persist,
                present=present,
                methods=self._local.methods,
                confirm=self._confirm,
                silent_until=self._silent_until,
            )

        self._membership = Membership(
            host=config.host,
            timing=config.timing,
            make_store=lambda: make_store(config),
            directory=self._directory,
            nodes=nodes,
            supervisor=self._supervisor,
            link=link,
            own_specs=[spec for spec in self._own.specs if spec.name],
            clock=SYSTEM_CLOCK,
            emit=self._emit,
            facts=self._facts,
            make_holdings=holdings,
        )
        self._local = Local(self._supervisor, self._membership.trusted, self._directory.specs)
        self._peers = Peers(
            self._directory,
            SYSTEM_CLOCK,
            self._emit,
            host=config.host,
            node=lambda: self._membership.node,
            connect=self._connect,
        )
        self._router = Router(self._directory, self._peers, self._local, SYSTEM_CLOCK)
        view = View(
            config=config,
            version=version(),
            welcome=link.welcome,
            membership=self._membership,
            directory=self._directory,
            supervisor=self._supervisor,
            wishes=wishes,
            own=self._own,
            log=self._emit,
            clock=SYSTEM_CLOCK,
        )
        remote = Remote(view, self._peers)
        supervision = Supervision(view, specs, remote, link, self._emit)
        cluster = Cluster(view, self._store, self._supervisor, remote, self._replace_process)
        self._server = Server(
            router=self._router,
            peers=self._peers,
            directory=self._directory,
            clock=SYSTEM_CLOCK,
            node=lambda: self._membership.node,
            ready=lambda: self._membership.trusted() and self._directory.in_sync,
            read_owner=names.read_owner,
            services=(
                (
                    "pgherd.v1.Supervision",
                    lambda server: supervision_pb2_grpc.add_SupervisionServicer_to_server(
                        supervision, server
                    ),
                ),
                (
                    "pgherd.v1.Cluster",
                    lambda server: cluster_pb2_grpc.add_ClusterServicer_to_server(cluster, server),
                ),
            ),
        )
        self._workers = WorkerSocket(config.run_dir / "worker.sock", self._local.accept, self._emit)

    async def run(self) -> None:
        """Work until the launcher was told to stop; then stop in order."""
        self._emit(
            events.AgentStarted(
                host=self._config.host,
                version=version(),
                generation=self._link.welcome.generation,
                containment=self._link.welcome.containment,
            )
        )
        for problem in self._own.problems:
            self._emit(events.SpecInvalid(name=problem.key or problem.source, why=str(problem)))
        former = self._adopt()
        async with asyncio.TaskGroup() as tasks:
            carried = [
                tasks.create_task(work, name=name)
                for name, work in (
                    ("petting", self._link.keep_petting()),
                    ("supervisor", self._supervisor.run()),
                    ("directory", self._directory.run()),
                    ("peers", self._peers.run()),
                    ("undeclared", self._drop_undeclared()),
                )
            ]
            membership = tasks.create_task(self._membership.run(former), name="membership")
            self._run_own_children()
            await self._server.start(self._config.run_dir / "agent.sock", self._config.listen)
            await self._membership.settled.wait()
            await self._workers.start()
            await self._stop(await self._stop_order())
            for task in (*carried, membership):
                task.cancel()
        await self._host.fences.close()
        await self._store.close()

    # Starting.

    def _adopt(self) -> adoption.FormerSession | None:
        """Take over what may be taken over of the agent before this one, and kill the rest."""
        welcome = self._link.welcome
        former = adoption.remembered_session(welcome.remembered, welcome.leases, SYSTEM_CLOCK.now())
        locals_ = {spec.id: spec for spec in self._own.specs if not spec.name}
        for verdict in adoption.plan(welcome.workers, welcome.remembered, former, locals_):
            match verdict:
                case adoption.Adopt(row, spec, ownership, window, replace):
                    child = self._supervisor.adopt(spec, row, ownership, window)
                    if replace:
                        child.stop(replace, again=True)
                    elif ownership is None:
                        child.confirm()
                case adoption.Kill(row, why):
                    self._emit(events.WorkerNotAdopted(name=row.child, pid=row.pid, why=why))
                    self._supervisor.bury(row)
                case adoption.Leave(row):
                    self._ended_before.append(row.child)
        return former

    async def _drop_undeclared(self) -> None:
        """Have the warden forget what ended under a former agent and is not declared any more."""
        await self._directory.synced()
        for key in self._ended_before:
            if key not in self._directory.specs and not self._supervisor.runs(key):
                self._link.remember(adoption.child_key(key), None)
                self._link.drop(key)
                self._host.forget(key)

    def _run_own_children(self) -> None:
        for spec in self._own.specs:
            known = self._supervisor.runs(spec.id) or spec.id in self._supervisor.children
            if not spec.name and not known:
                self._supervisor.run_child(spec)

    # Stopping.

    async def _stop_order(self) -> protocol.Stop:
        async for order in self._link.orders():
            if isinstance(order, protocol.Stop):
                return order
        raise AssertionError("the orders of a warden never end")

    async def _stop(self, order: protocol.Stop) -> None:
        """Refuse new work, stop the children, give the names up, and the lease last."""
        self._emit(events.AgentStopping(host=self._config.host, mode=order.mode))
        await self._membership.leave(f"the agent of {self._config.host} stops")
        self._router.close()
        await self._server.stop(grace=RESTART_GRACE)
        await self._workers.close()
        await self._link.shutdown()

    def _replace_process(self) -> None:
        """End this process so that the warden starts the next one; nothing is stopped or released."""
        asyncio.get_running_loop().call_later(RESTART_GRACE, os._exit, 0)

    # What the parts ask of each other.

    def _child_changed(self, child: Child) -> None:
        # Whoever waits for the child comes before etcd, which only hears of it.
        self._router.wake(child.key)
        self._membership.publish(child)

    def _child_ended(self, ending: Ending) -> None:
        key = ending.child.key
        self._link.remember(adoption.child_key(key), None)
        if ending.child.ownership is not None:
            self._host.forget(key)
            if key not in self._directory.specs:
                self._link.drop(key)
        self._membership.ended(ending)
        self._router.wake(key)

    def _child_buried(self, key: str) -> None:
        self._run_own_children()
        self._membership.look_again()

    def _facts(self, node: str, state: NodeState) -> NodeRecord:
        config = self._config
        return NodeRecord(
            node=node,
            host=config.host,
            address=config.listen.grpc,
            version=version(),
            protocol=PROTOCOL,
            containment=self._link.welcome.containment,
            state=state,
            labels=config.labels,
            databases=tuple(sorted(config.databases)),
        )

    def _connect(self, address: str) -> grpc.aio.Channel:
        listen = self._config.listen
        return security.channel(address, listen.tls, insecure=listen.insecure)

    async def _confirm(self, owner: Owner) -> bool:
        """Ask an owner's agent to make sure that it does not run the name any more; False: no answer."""
        record = self._directory.nodes.get(owner.node) or self._directory.departed.get(owner.node)
        if record is None:
            return False
        try:
            channel = self._connect(record.address)
        except (OSError, Denied):
            return False
        try:
            stub = cluster_pb2_grpc.ClusterStub(channel)
            request = cluster_pb2.ConfirmRequest(name=owner.name, epoch=owner.epoch)
            await stub.Confirm(request, timeout=CONFIRM_TIMEOUT)
        except grpc.aio.AioRpcError:
            return False
        finally:
            await channel.close()
        return True

    def _silent_until(self, owner: Owner) -> Boottime:
        """Return when a silent owner's lease must have ended, by what was last heard from its agent."""
        heard = self._peers.heard(owner.node)
        return heard + self._config.timing.ttl if heard is not None else SYSTEM_CLOCK.now()


async def run(config: AgentConfig, control_fd: int) -> int:
    """Be the agent of ``config`` under the warden at ``control_fd``; return the process's exit code."""
    # A hung agent is to be replaced while its lease still lets the next one adopt its workers.
    link = await WardenLink.open(control_fd, hang_limit=min(config.timing.soft / 2, LONGEST_HANG))
    agent = Agent(config, link)
    code = 0
    try:
        await agent.run()
    except* Restored as restored:
        # Every connection to etcd that saw the lost history is of no use: the warden starts a new process.
        agent.log(events.EtcdRestored(reason=_words(restored)))
        code = 1
    except* (OSError, Denied, ConfigInvalid) as failed:
        agent.log(events.AgentFailed(host=config.host, why=_words(failed)))
        code = 1
    return code


def _words(group: BaseExceptionGroup[Any]) -> str:
    """Return what the errors of a group say, however deep it is: each task group around them adds a level."""
    return "; ".join(
        _words(each) if isinstance(each, BaseExceptionGroup) else str(each) for each in group.exceptions
    )
