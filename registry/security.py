"""Channels and ports: TLS where others could listen, plain only where nobody else can.

A certificate is the identity of an agent or a remote client, and both sides show one.  Plain connections are
made and accepted on loopback and unix sockets only, unless the configuration says ``insecure``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from registry.errors import Denied
from registry.find_agent import UNIX, target
from registry.wire import MAX_BATCH

if TYPE_CHECKING:
    from registry.config import Tls

MAX_PENDING = 32_768
"""Requests that have arrived and that this process has not looked at yet; more are cancelled by gRPC."""

_LIMITS = (
    ("grpc.max_send_message_length", MAX_BATCH),
    ("grpc.max_receive_message_length", MAX_BATCH),
    # A dead host is noticed on an idle link after 15 s; long before that its node has left the directory.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_LIMITS,
    # Whether a request may be sent again is decided in registry.router, never by the transport.
    ("grpc.enable_retries", 0),
    # Agents are reached directly, whatever http_proxy is set for downloads.
    ("grpc.enable_http_proxy", 0),
    # A channel's backoff is its own: one that failed must not delay the next one to the same address.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_LIMITS,
    # Two agents on one port is a mistake that must be seen.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # What gRPC turns away by itself looks like something that may have been executed.  So it takes every
    # stream, as long as this loop can keep up at all, and the services say what is too much.
    ("grpc.server.max_pending_requests", MAX_PENDING),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
)


def is_private(address: str) -> bool:
    """Return whether only processes of this machine can be at the other end of ``address``."""
    if target(address).startswith(UNIX):
        return True
    # Here and not above: validating configuration is a tenth of a second that a command at a socket saves.
    from registry.addresses import is_loopback

    return is_loopback(address)


def channel(address: str, tls: Tls | None = None, *, insecure: bool = False) -> grpc.aio.Channel:
    """Return a channel to an agent; connects when it is first used.

    Raises Denied where the connection would be readable by others and ``insecure`` does not allow it; OSError
    when a file of ``tls`` cannot be read.
    """
    where = target(address)
    if tls is not None and not where.startswith(UNIX):
        return grpc.aio.secure_channel(where, _channel_credentials(tls), options=CHANNEL_OPTIONS)
    if not insecure and not is_private(address):
        raise Denied(
            f"no TLS certificate to speak to {address} with",
            hint="give a certificate (for commands: listen.tls of the agent.toml that PGHERD_CONFIG names), "
            "or ask the agent of this host",
            details={"address": address},
        )
    return grpc.aio.insecure_channel(where, options=CHANNEL_OPTIONS)


def add_port(server: grpc.aio.Server, address: str, tls: Tls | None = None, *, insecure: bool = False) -> int:
    """Let ``server`` listen at ``address``; return the port, 1 for a unix socket.

    Raises Denied where others could listen in and ``insecure`` does not allow it; OSError when the address
    cannot be used or a file of ``tls`` cannot be read.
    """
    where = target(address)
    if not (tls or insecure or is_private(address)):
        raise Denied(f"not listening at {address} without TLS", details={"address": address})
    try:
        if tls is not None and not where.startswith(UNIX):
            return server.add_secure_port(where, _server_credentials(tls))
        return server.add_insecure_port(where)
    except RuntimeError as error:
        raise OSError(f"cannot listen at {address}: it is in use, or not an address of this host") from error


def _channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        tls.ca.read_bytes(), private_key=tls.key.read_bytes(), certificate_chain=tls.cert.read_bytes()
    )


def _server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Return credentials that read the files again when they have changed, for each new connection."""
    seen = _stamp(tls)

    def read() -> grpc.ServerCertificateConfiguration:
        pairs = [(tls.key.read_bytes(), tls.cert.read_bytes())]
        return grpc.ssl_server_certificate_configuration(pairs, tls.ca.read_bytes())

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        try:
            stamp = _stamp(tls)
            if stamp == seen:
                return None
            configuration = read()
        except OSError:
            # Half of a renewal; the next connection looks again.
            return None
        seen = stamp
        return configuration

    # None means "as before" (the stubs do not know it).
    return grpc.dynamic_ssl_server_credentials(read(), renewed, True)  # type: ignore[arg-type]


def _stamp(tls: Tls) -> tuple[tuple[Path, int, int], ...]:
    return tuple((path, path.stat().st_mtime_ns, path.stat().st_ino) for path in (tls.ca, tls.cert, tls.key))
