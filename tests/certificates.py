"""Certificates for tests, made with the openssl program: an authority and what it signs."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

OPENSSL = "/usr/bin/openssl"
KEYS = {
    "P-256": ("ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
    "RSA 2048": ("rsa:2048",),
    "RSA 1024": ("rsa:1024",),
}


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key."""

    cert: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """A certification authority in a folder of its own."""

    folder: Path
    name: str = "authority"

    @property
    def cert(self) -> Path:
        return self.folder / "ca.pem"

    def create(self) -> "Authority":
        self.folder.mkdir(parents=True, exist_ok=True)
        subject = ("-subj", f"/CN={self.name}", "-days", "90")
        subject += ("-addext", "keyUsage=critical,keyCertSign,cRLSign")  # RFC 5280 4.2.1.3
        _run("req", "-x509", *_new("P-256", self.folder / "ca.key"), *subject, "-out", self.cert)
        return self

    def sign(
        self,
        name: str,
        *,
        key: str = "P-256",
        days: int = 60,
        extensions: str = "subjectAltName=DNS:localhost",
        digest: str = "sha256",
    ) -> Pair:
        """A certificate for `name`; negative `days`: it has expired."""
        pair = Pair(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        request, extra = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extra.write_text(f"{extensions}\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n")
        _run("req", *_new(key, pair.key), "-subj", f"/CN={name}", "-out", request)
        ours = ("-CA", self.cert, "-CAkey", self.folder / "ca.key", "-CAcreateserial")
        valid = ("-days", str(days), f"-{digest}", "-extfile", extra)
        _run("x509", "-req", "-in", request, *ours, *valid, "-out", pair.cert)
        return pair


def encrypted(pair: Pair, password: str) -> Pair:
    """The same pair with its key under a password."""
    key = pair.key.with_suffix(".encrypted.key")
    _run("pkcs8", "-topk8", "-in", pair.key, "-passout", f"pass:{password}", "-out", key)
    return Pair(pair.cert, key)


def _new(key: str, path: Path) -> tuple[object, ...]:
    return "-newkey", *KEYS[key], "-nodes", "-keyout", path


def _run(*arguments: object) -> None:
    command = [OPENSSL, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
