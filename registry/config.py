"""The agent's configuration file, and the timing that follows from the lease's time to live.

:func:`load` reads and validates the whole file and reports everything that is wrong with it at once.  Each
part is one frozen value that is passed down whole; the defaults work for one host with etcd on it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from registry.addresses import conninfo, grpc_address, http_url, is_loopback
from registry.timing import ETCD_ELECTION, Timing, default_ttl
from registry.toml import source as toml_source
from registry.toml.schema import Duration, Label, Schema, Table, Text, check, nearest, show, wrong
from registry.toml.source import ConfigInvalid, Document, Problem

__all__ = [
    "AgentConfig",
    "ConfigInvalid",
    "Database",
    "EtcdConfig",
    "ListenConfig",
    "PostgresService",
    "Problem",
    "Timing",
    "Tls",
    "default_ttl",
    "load",
    "parse",
    "read_text",
]

SOCKET_PATH_LIMIT = 107
"""Bytes of a unix socket's path on Linux."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of one TLS identity: the authority that is trusted, and our certificate with its key."""

    ca: Path
    cert: Path
    key: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdConfig:
    """How to reach etcd.  ``endpoints`` are URLs, all http or all https."""

    endpoints: tuple[str, ...]
    tls: Tls | None = None
    user: str = ""
    password_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Where other agents and clients reach this one; ``grpc`` is ``host:port``."""

    grpc: str
    tls: Tls | None = None
    insecure: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresService:
    """PostgreSQL instances with one system identifier; ``patroni`` is the URL of its REST API, or empty."""

    name: str
    data_directory: Path | None = None
    patroni: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """What a database's name means on this host; ``postgres`` names the service it lives in, or is empty."""

    name: str
    postgres: str
    conninfo: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Everything a host knows about itself before it speaks to anybody.  ``ttl`` is None when not given."""

    path: Path
    cluster: str
    host: str
    labels: Mapping[str, str]
    etcd: EtcdConfig
    ttl: float | None
    listen: ListenConfig
    postgres: Mapping[str, PostgresService]
    databases: Mapping[str, Database]
    run_dir: Path
    children_dir: Path

    @property
    def timing(self) -> Timing:
        """The deadlines of this host's session."""
        return Timing(default_ttl(ETCD_ELECTION), ETCD_ELECTION) if self.ttl is None else Timing(self.ttl)


class _TlsTable(Table):
    examples: ClassVar[Mapping[str, str]] = {
        "ca": 'ca = "ca.crt"',
        "cert": 'cert = "host.crt"',
        "key": 'key = "host.key"',
    }
    ca: Text
    cert: Text
    key: Text


class _EtcdTable(Table):
    endpoints: list[Annotated[str, BeforeValidator(http_url)]] = Field(default=["http://127.0.0.1:2379"])
    tls: _TlsTable | None = None
    user: Text | None = None
    password_file: Text | None = None

    @model_validator(mode="after")
    def _belong_together(self) -> _EtcdTable:
        if not self.endpoints:
            raise wrong("is empty", 'write for example ["http://127.0.0.1:2379"]', at=("endpoints",))
        wanted = "https" if self.tls else "http"
        why, other = (
            ("etcd.tls is given", "")
            if self.tls
            else ("etcd.tls is not given", "give tls = { ca, cert, key }, or ")
        )
        for index, endpoint in enumerate(self.endpoints):
            scheme, _, rest = endpoint.partition("://")
            if scheme != wanted:
                raise wrong(
                    f"{show(endpoint)}: {why}", f'{other}write "{wanted}://{rest}"', at=("endpoints", index)
                )
        if (self.user is None) is not (self.password_file is None):
            lacking = "user" if self.user is None else "password_file"
            raise wrong("is missing: user and password_file go together", at=(lacking,))
        return self


class _LeaseTable(Table):
    ttl: Duration | None = None

    @model_validator(mode="after")
    def _can_be_kept(self) -> _LeaseTable:
        if self.ttl is not None:
            try:
                Timing(self.ttl)
            except ConfigInvalid as error:
                raise wrong(error.problems[0].message, error.problems[0].hint, at=("ttl",)) from None
        return self


class _ListenTable(Table):
    grpc: Annotated[str, BeforeValidator(grpc_address)] = "127.0.0.1:7430"
    tls: _TlsTable | None = None
    insecure: bool = False

    @model_validator(mode="after")
    def _safe(self) -> _ListenTable:
        if self.tls is None and not self.insecure and not is_loopback(self.grpc):
            raise wrong(
                f"{show(self.grpc)} can be reached from other machines, and nothing says who may",
                "give tls = { ca, cert, key }, or insecure = true on a network you trust",
                at=("grpc",),
            )
        return self


class _PostgresTable(Table):
    data_directory: Text | None = None
    patroni: Annotated[str, BeforeValidator(http_url)] | None = None


class _DatabaseTable(Table):
    examples: ClassVar[Mapping[str, str]] = {"conninfo": 'conninfo = "service=app"'}
    foreign: ClassVar[Mapping[str, str]] = {"dsn": "conninfo", "service": "postgres", "url": "conninfo"}
    postgres: Text | None = None
    conninfo: Annotated[str, BeforeValidator(conninfo)]


class _AgentTable(Table):
    examples: ClassVar[Mapping[str, str]] = {"schema": "schema = 1", "cluster": 'cluster = "prod"'}
    foreign: ClassVar[Mapping[str, str]] = {"node": "host", "name": "host", "databases": "[database.NAME]"}
    version: Schema = Field(alias="schema")
    cluster: Label
    host: Label = Field(default_factory=lambda: _own_name(), validate_default=True)
    labels: dict[Label, Text] = Field(default={})
    etcd: _EtcdTable = Field(default_factory=_EtcdTable)
    lease: _LeaseTable = Field(default_factory=_LeaseTable)
    listen: _ListenTable = Field(default_factory=_ListenTable)
    postgres: dict[Label, _PostgresTable] = Field(default={})
    database: dict[Label, _DatabaseTable] = Field(default={})
    run_dir: Text = "/run/pgherd"
    children_dir: Text = "children.d"


def load(path: Path) -> AgentConfig:
    """Read and validate a file, and that the files it names can be read.  Raises ConfigInvalid."""
    text = read_text(path)
    config, document = _parse(text, path)
    unreadable = [
        document.problem(place, f"{file}: {why}")
        for place, file in _files(config)
        if (why := _unreadable(file))
    ]
    if unreadable:
        raise ConfigInvalid(unreadable)
    return config


def parse(text: str, path: Path) -> AgentConfig:
    """Validate the text of the file at ``path`` without looking at this machine.  Raises ConfigInvalid."""
    return _parse(text, path)[0]


def read_text(path: Path) -> str:
    """Return a file's text.  Raises ConfigInvalid."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigInvalid([Problem(str(path), 0, "", error.strerror or str(error))]) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigInvalid([Problem(str(path), line, "", "is not UTF-8")]) from error


def _parse(text: str, path: Path) -> tuple[AgentConfig, Document]:
    document = toml_source.read(text, str(path))
    table, problems = check(_AgentTable, document.data, document)
    base = path.absolute().parent
    problems += _cross_problems(document, base)
    if table is None or problems:
        raise ConfigInvalid(sorted(problems, key=lambda problem: problem.line))
    return _config(table, path, base), document


def _config(table: _AgentTable, path: Path, base: Path) -> AgentConfig:
    def tls(files: _TlsTable | None) -> Tls | None:
        return Tls(base / files.ca, base / files.cert, base / files.key) if files else None

    etcd, listen = table.etcd, table.listen
    return AgentConfig(
        path=path,
        cluster=table.cluster,
        host=table.host,
        labels=dict(table.labels),
        etcd=EtcdConfig(
            endpoints=tuple(etcd.endpoints),
            tls=tls(etcd.tls),
            user=etcd.user or "",
            password_file=base / etcd.password_file if etcd.password_file else None,
        ),
        ttl=table.lease.ttl,
        listen=ListenConfig(grpc=listen.grpc, tls=tls(listen.tls), insecure=listen.insecure),
        postgres={
            name: PostgresService(
                name=name,
                data_directory=base / service.data_directory if service.data_directory else None,
                patroni=service.patroni or "",
            )
            for name, service in table.postgres.items()
        },
        databases={
            name: Database(name=name, postgres=database.postgres or "", conninfo=database.conninfo)
            for name, database in table.database.items()
        },
        run_dir=base / table.run_dir,
        children_dir=base / table.children_dir,
    )


def _own_name() -> str:
    return socket.gethostname().partition(".")[0].lower()


def _cross_problems(document: Document, base: Path) -> list[Problem]:
    """Find what is wrong between the tables; looks at what is there, valid or not."""
    problems = []
    services, databases = (_tables(document.data.get(section)) for section in ("postgres", "database"))
    for name, database in databases.items():
        service = _tables(database).get("postgres")
        if isinstance(service, str) and service not in services:
            hint = nearest(service, services) or f"declare it with a line [postgres.{service}]"
            place = ("database", name, "postgres")
            problems.append(document.problem(place, f"there is no [postgres.{service}]", hint))
    run_dir = document.data.get("run_dir")
    if isinstance(run_dir, str) and len(os.fsencode(base / run_dir / "worker.sock")) > SOCKET_PATH_LIMIT:
        why = (
            f"{show(run_dir)} is too long for the sockets in it, whose paths end at {SOCKET_PATH_LIMIT} bytes"
        )
        problems.append(document.problem(("run_dir",), why, "choose a shorter one"))
    return problems


def _tables(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _files(config: AgentConfig) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Yield the files that the configuration names, with the keys that name them."""
    for section, tls in (("etcd", config.etcd.tls), ("listen", config.listen.tls)):
        for key in ("ca", "cert", "key") if tls else ():
            yield (section, "tls", key), getattr(tls, key)
    if config.etcd.password_file:
        yield ("etcd", "password_file"), config.etcd.password_file


def _unreadable(file: Path) -> str:
    try:
        with file.open("rb"):
            return ""
    except OSError as error:
        return error.strerror or str(error)
