"""Addresses in configuration: URLs, ``host:port``, PostgreSQL connection strings.

The functions are validators of :mod:`registry.toml.schema`: they return the text or raise ``wrong(...)``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, urlsplit

from registry.toml.schema import show, text, wrong

_PAIR = re.compile(r"""\s*(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|(?:[^\s'\\]|\\.)*)(?=\s|$)""")
_PASSWORD = re.compile(r"\b(ssl)?password\s*=\s*[^\s]", re.I)
_SECRETS = {"password", "sslpassword"}
_URI = ("postgresql://", "postgres://")


def http_url(value: object) -> str:
    """Check ``http://host:port`` or ``https://host:port``, nothing after it."""
    url = text(value).rstrip("/")
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise wrong(f"{show(url)} is no URL", f'write "http://{url}" or "https://{url}"')
    if scheme not in ("http", "https"):
        raise wrong(
            f"{show(url)} is neither http:// nor https://", f'write "http://{rest}" or "https://{rest}"'
        )
    if "@" in rest:
        raise wrong("the URL contains a user", "user and password_file have keys of their own")
    if "/" in rest or "?" in rest:
        raise wrong(f"{show(url)} has a path", f'write "{scheme}://{re.split("[/?]", rest)[0]}"')
    _host_port(rest, f"{scheme}://")
    return url


def grpc_address(value: object) -> str:
    """Check ``host:port``; the host must be one that others can use, since they are told this address."""
    address = text(value)
    if "://" in address:
        raise wrong(f"{show(address)} is a URL", f'write "{address.partition("://")[2]}"')
    host = _host_port(address, "")
    if host in ("", "*", "0.0.0.0", "::"):
        port = address.rpartition(":")[2]
        hint = f'write the name that other hosts use for this one: "alpha.internal:{port}"'
        raise wrong(f"{show(address)}: others are told this address and cannot reach it", hint)
    return address


def is_loopback(address: str) -> bool:
    """Tell whether ``host:port`` can only be reached from this machine."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_port(address: str, prefix: str) -> str:
    """Check ``host:port`` or ``[ipv6]:port``; return the host."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]\s]*)(?::(\d+))?", address)
    if match is None:
        hint = f'write "{prefix}[{address}]:7430"' if address.count(":") > 1 else f'write "{prefix}host:port"'
        raise wrong(f"{show(address)} is not host:port", hint)
    if match[2] is None:
        raise wrong(
            f"{show(address)} has no port",
            f'write for example "{prefix}{address}:{2379 if prefix else 7430}"',
        )
    if not 1 <= int(match[2]) <= 65535:
        raise wrong(f"{show(address)}: there is no port {match[2]}", "ports are 1 to 65535")
    return match[1].strip("[]")


def conninfo(value: object) -> str:
    """Check a libpq connection string: one that can be read, and without a password."""
    string = text(value)
    secret = contains_password(string) if string.startswith(_URI) else _SECRETS & set(_keywords(string))
    if secret:
        raise wrong("contains a password", "use passfile=, a service file, or a certificate")
    return string


def contains_password(string: str) -> bool:
    """Tell whether a connection string, or an argument that may be or contain one, shows a password."""
    if string.startswith(_URI):
        parts = urlsplit(string)
        return bool(parts.password or _SECRETS & {key for key, _ in parse_qsl(parts.query)})
    return _PASSWORD.search(string) is not None


def _keywords(string: str) -> Iterator[str]:
    """Yield the keywords of a connection string as libpq reads it."""
    position = 0
    while string[position:].strip():
        pair = _PAIR.match(string, position)
        if pair is None:
            hint = f'write "dbname={string}" or "service={string}"' if re.fullmatch(r"\w+", string) else ""
            raise wrong(f"{show(string)} is not of the form key=value ...", hint)
        yield pair[1]
        position = pair.end()
