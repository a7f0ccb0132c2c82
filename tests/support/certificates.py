"""Certificates for TLS between tests' processes, made by the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path

from registry.config import Tls


class Authority:
    """A certificate authority in a directory."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.directory = directory
        self.certificate = directory / f"{name}.crt"
        self._key = directory / f"{name}.key"
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", self._key, "-out", self.certificate, "-subj", f"/CN={name}", "-days", "2"),
        )

    def issue(self, name: str, file: str = "") -> Tls:
        """Issue a certificate for a server or client on loopback; ``file`` names its files, else ``name``."""
        key, request, certificate = (
            self.directory / f"{file or name}.{suffix}" for suffix in ("key", "csr", "crt")
        )
        extensions = self.directory / f"{file or name}.ext"
        extensions.write_text(
            "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n"
        )
        _openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", key, "-out", request, "-subj", f"/CN={name}"),
        )
        _openssl(
            *("x509", "-req", "-in", request, "-out", certificate, "-days", "2", "-extfile", extensions),
            *("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial"),
        )
        return Tls(ca=self.certificate, cert=certificate, key=key)


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
