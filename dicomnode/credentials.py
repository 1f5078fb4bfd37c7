"""What config.yaml says of DICOM TLS, and whether the files it names are fit for use."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeVar

from dicomnode import x509
from dicomnode.errors import ConfigError
from dicomnode.schema import setting

Profile = Literal["bcp195", "bcp195-extended"]
_SOON = timedelta(days=30)
_MANY_AUTHORITIES = 20
_OTHERS = 0o027
"""Mode bits a private key must not have: anything for others, writing for the group."""


@dataclass(frozen=True, slots=True)
class NodeTls:
    """node.tls: the node then listens with DICOM TLS, and only with it."""

    cert: Path = setting(doc="PEM file: our certificate, then those between it and the CA")
    key: Path = setting(doc="PEM file: the private key of cert")
    ca: Path | None = setting(None, "PEM file: who may sign our peers, or the peers themselves")
    key_password: str | None = setting(None, "password of key", secret=True)
    require_client_cert: bool = setting(True, "refuse callers without a certificate from ca")
    profile: Profile = setting("bcp195", "cipher suites: PS3.15 B.12, or 256-bit only (B.11)")


@dataclass(frozen=True, slots=True)
class PeerTls:
    """peers.*.tls as a mapping: what differs from node.tls when we call this peer."""

    ca: Path | None = setting(None, "PEM file: who signed the peer; null: node.tls.ca")
    cert: Path | None = setting(None, "PEM file: our certificate; null: node.tls.cert")
    key: Path | None = setting(None, "PEM file: the private key of cert; null: node.tls.key")
    key_password: str | None = setting(None, "password of key", secret=True)
    server_name: str | None = setting(None, "name in its certificate; null: peers.*.host")
    profile: Profile = setting("bcp195", "cipher suites: PS3.15 B.12, or 256-bit only (B.11)")


_Settings = TypeVar("_Settings", NodeTls | None, bool | PeerTls)


@dataclass(frozen=True, slots=True)
class Pem:
    """A file, and the key of config.yaml that names it."""

    where: str
    path: Path


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a context is built from."""

    cert: Pem | None
    key: Pem | None
    ca: Pem | None
    key_password: str | None = field(repr=False)
    profile: Profile


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How to call one peer; picklable, for the process that delivers."""

    where: str
    credentials: Credentials
    server_name: str
    checks_name: bool
    """False: `server_name` is a bare address, which few certificates of hospitals carry; any
    certificate that `ca` vouches for is then taken, so `ca` should hold the peer's own."""


def client_tls(peer: str, wanted: bool | PeerTls, host: str, node: NodeTls | None) -> ClientTls:
    """peers.<peer>.tls (true, or a mapping) with what it takes over from node.tls.

    Raises:
        ConfigError: neither says who signed the peer's certificate.
    """
    where = f"peers.{peer}.tls"
    own = wanted if isinstance(wanted, PeerTls) else PeerTls()
    if own.ca is None and (node is None or node.ca is None):
        raise ConfigError(f"{where}.ca: missing, and node.tls.ca too; name the CA of this peer")
    if (own.cert is None) != (own.key is None):
        raise ConfigError(f"{where}: cert and key go together; give both or neither")
    shared = node_credentials(node) if node else Credentials(None, None, None, None, own.profile)
    mine = own.cert is not None
    credentials = Credentials(
        cert=_pem(f"{where}.cert", own.cert) if mine else shared.cert,
        key=_pem(f"{where}.key", own.key) if mine else shared.key,
        ca=_pem(f"{where}.ca", own.ca) or shared.ca,
        key_password=own.key_password if mine else shared.key_password,
        profile=own.profile,
    )
    name = own.server_name or host
    return ClientTls(where, credentials, name, own.server_name is not None or not _is_address(name))


def own_port_tls(settings: NodeTls) -> ClientTls:
    """How to call our own port, which shows the certificate that we know: nothing else is taken."""
    credentials = replace(node_credentials(settings), ca=Pem("node.tls.cert", settings.cert))
    return ClientTls("node.tls", credentials, "localhost", checks_name=False)


def node_credentials(settings: NodeTls) -> Credentials:
    """The files of node.tls, each with its key."""
    return Credentials(
        cert=Pem("node.tls.cert", settings.cert),
        key=Pem("node.tls.key", settings.key),
        ca=_pem("node.tls.ca", settings.ca),
        key_password=settings.key_password,
        profile=settings.profile,
    )


def problems(node: NodeTls | None, peers: Mapping[str, tuple[bool | PeerTls, str]]) -> list[str]:
    """What is wrong between node.tls and the (tls, host) of each peer, a line each."""
    found = []
    if node is not None and node.require_client_cert and node.ca is None:
        found.append("node.tls.ca: missing; name who signs the certificates of callers")
    for name, (wanted, host) in peers.items():
        try:
            client_tls(name, wanted, host, node)
        except ConfigError as error:
            found.append(str(error))
    return found


def in_folder(settings: _Settings, folder: Path) -> _Settings:
    """The same settings; relative paths start at `folder`."""
    if not isinstance(settings, NodeTls | PeerTls):
        return settings
    paths = {name: getattr(settings, name) for name in ("cert", "key", "ca")}
    return replace(settings, **{name: folder / path for name, path in paths.items() if path})


# the files


def check_dates(cert: Pem, now: float) -> None:
    """Our own certificate is valid now.

    Raises:
        ConfigError: our certificate has expired, or is not valid yet.
    """
    own, today = certificates(cert)[0], datetime.fromtimestamp(now, UTC)
    if own.not_after < today:
        words = f"expired on {own.not_after:%Y-%m-%d}; have it renewed and put it in place"
        raise ConfigError(f"{cert.where}: {cert.path}: {words}")
    if own.not_before > today:
        words = f"valid only from {own.not_before:%Y-%m-%d %H:%M} UTC on; check the clock"
        raise ConfigError(f"{cert.where}: {cert.path}: {words}")


def certificates(pem: Pem) -> list[x509.Certificate]:
    """What a PEM file holds, at least one.

    Raises:
        ConfigError: it cannot be read, or holds no certificate.
    """
    try:
        found = x509.read_pem(read(pem))
    except ValueError as error:
        raise ConfigError(f"{pem.where}: {pem.path}: {error}; copy the file again") from error
    if not found:
        words = "no PEM certificate in it; `openssl x509 -inform DER` converts a DER file"
        raise ConfigError(f"{pem.where}: {pem.path}: {words}")
    return found


def read(pem: Pem) -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return pem.path.read_text("ascii", errors="replace")
    except PermissionError as error:
        words = "not readable; give the user who runs dicomnode read access"
        raise ConfigError(f"{pem.where}: {pem.path}: {words}") from error
    except OSError as error:
        words = f"{error.strerror}; relative paths start at the folder of config.yaml"
        raise ConfigError(f"{pem.where}: {pem.path}: {words}") from error


def weaknesses(credentials: Credentials, now: float) -> list[str]:
    """What is weak or soon over in these files, a line each."""
    today, found = datetime.fromtimestamp(now, UTC), []
    for pem in filter(None, (credentials.cert, credentials.ca)):
        inside = certificates(pem)
        for number, certificate in enumerate(inside, 1):
            which = f"certificate {number} of " if len(inside) > 1 else ""
            found += [f"{pem.where}: {which}{pem.path}: {w}" for w in _weak(certificate, today)]
    if (ca := credentials.ca) is not None and len(certificates(ca)) > _MANY_AUTHORITIES:
        words = "whoever any of them signs is trusted; name the CA of your site only"
        found.append(f"{ca.where}: {ca.path}: more than {_MANY_AUTHORITIES} authorities; {words}")
    if (key := credentials.key) is not None and key.path.stat().st_mode & _OTHERS:
        found.append(f"{key.where}: {key.path}: others can read or change it; chmod 600")
    return found


def _weak(certificate: x509.Certificate, today: datetime) -> list[str]:
    found = []
    if certificate.not_after < today:
        found.append(f"expired on {certificate.not_after:%Y-%m-%d}; replace it")
    elif certificate.not_after < today + _SOON:
        days = (certificate.not_after - today).days
        found.append(f"expires in {days} days ({certificate.not_after:%Y-%m-%d}); renew it")
    if certificate.rsa_bits is not None and certificate.rsa_bits < 2048:
        found.append(f"RSA {certificate.rsa_bits} bits; BCP 195 asks for 2048")
    if certificate.weak_hash and not certificate.self_issued:
        found.append(f"signed with {certificate.weak_hash}; BCP 195 asks for SHA-256")
    return found


def _pem(where: str, path: Path | None) -> Pem | None:
    return None if path is None else Pem(where, path)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
