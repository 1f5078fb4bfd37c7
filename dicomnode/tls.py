"""DICOM TLS: the contexts of both sides, the handshake of a connection that came in.

Both sides follow the BCP 195 RFC 8996, 9325 TLS Secure Transport Connection Profile (PS3.15 B.12):
TLS 1.2 and 1.3, forward secrecy, authenticated encryption. There is no plain fallback.
"""

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable

from dicomnode import metrics
from dicomnode.credentials import (
    ClientTls,
    Credentials,
    NodeTls,
    Pem,
    Profile,
    certificates,
    check_dates,
    node_credentials,
    read,
    weaknesses,
)
from dicomnode.errors import ConfigError

log = logging.getLogger(__name__)

_ALERT_SECONDS = 0.5

_SUITES: dict[Profile, str] = {
    "bcp195": "ECDHE+AESGCM:@SECLEVEL=2",
    "bcp195-extended": "ECDHE+AESGCM+AES256:ECDHE+CHACHA20:@SECLEVEL=2",
}
"""TLS 1.2 cipher suites (RFC 9325 4.2; the extended profile of PS3.15 B.11 leaves 128 bits out).
TLS 1.3 has only good ones. Security level 2 refuses RSA below 2048 bits and SHA-1 signatures."""


def server_context(settings: NodeTls, now: float) -> ssl.SSLContext:
    """The context for connections that come in; `now` is in seconds since the epoch.

    Raises:
        ConfigError: a file is missing, unreadable, expired, or not what its key says.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _fill(context, node_credentials(settings), now)
    if settings.require_client_cert:
        if settings.ca is None:
            raise ConfigError("node.tls.ca: missing; name who signs the certificates of callers")
        context.verify_mode = ssl.CERT_REQUIRED
    # a resumed session would skip the certificate; associations are few and long, so none is
    context.options |= ssl.OP_NO_TICKET | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0
    return context


def client_context(tls: ClientTls, now: float) -> ssl.SSLContext:
    """The context for a connection to a peer, whose certificate is always verified.

    For pynetdicom: ``associate(..., tls_args=(client_context(tls, now), tls.server_name))``.

    Raises:
        ConfigError: a file is missing, unreadable, expired, or not what its key says.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = tls.checks_name
    _fill(context, tls.credentials, now)
    return context


def trouble_with(peer: ClientTls, host: str, port: int, now: float, seconds: float = 10) -> str:
    """What keeps TLS to this peer from working, in words; "" is nothing.

    For `check`, and for the reason of a delivery that failed: a refused association does not tell.

    Raises:
        ConfigError: as `client_context`.
    """
    context = client_context(peer, now)
    try:
        plain = socket.create_connection((host, port), seconds)
    except OSError as error:
        return f"no connection: {error.strerror or 'no answer'}"
    try:
        with plain, context.wrap_socket(plain, server_hostname=peer.server_name) as secured:
            _await_alert(secured)
    except ssl.SSLCertVerificationError as error:
        return f"{peer.where}: its certificate: {error.verify_message}"
    except OSError as error:
        reason = _reason(error)
        if reason == "refused by the peer":
            return f"{peer.where}: it refuses our certificate or our ciphers"
        return f"{peer.where}: TLS failed ({reason}): does it listen with TLS on this port?"
    return ""


def _await_alert(secured: ssl.SSLSocket) -> None:
    """With TLS 1.3 a refusal of our certificate comes after the handshake; silence is consent."""
    secured.settimeout(_ALERT_SECONDS)
    with contextlib.suppress(TimeoutError):
        secured.recv(1)


class Reloader:
    """The server's context, built anew when a certificate file has changed.

    A change that cannot be used (half copied, wrong key, expired) keeps the context before it;
    connections that are open keep theirs.
    """

    def __init__(self, settings: NodeTls, clock: Callable[[], float] = time.time) -> None:
        """Build the first context.

        Raises:
            ConfigError: as `server_context`.
        """
        self._settings, self._clock = settings, clock
        self._lock = threading.Lock()
        self._seen = self._state()
        self._context = server_context(settings, clock())
        self._tell_expiry()

    def context(self) -> ssl.SSLContext:
        """The context for the next connection; costs three stat calls."""
        with self._lock:
            state = self._state()
            if state != self._seen:
                self._seen = state  # a broken change is tried and told once
                self._reload()
            return self._context

    def _reload(self) -> None:
        try:
            self._context = server_context(self._settings, self._clock())
        except ConfigError as error:
            metrics.tls_reloads.labels("kept the old one").inc()
            log.error("the changed certificate files cannot be used, the old go on: %s", error)
            return
        metrics.tls_reloads.labels("taken").inc()
        log.info("took the changed certificate files of node.tls")
        self._tell_expiry()

    def _tell_expiry(self) -> None:
        own = certificates(Pem("node.tls.cert", self._settings.cert))[0]
        metrics.tls_certificate_expires.set(own.not_after.timestamp())

    def _state(self) -> list[tuple[int, ...]]:
        """What changes with the content of the files; a link is followed to its file."""
        states: list[tuple[int, ...]] = []
        for path in (self._settings.cert, self._settings.key, self._settings.ca):
            try:
                found = path.stat() if path else None
            except OSError:  # between removal and replacement
                found = None
            states.append((found.st_ino, found.st_size, found.st_mtime_ns) if found else ())
        return states


def wrap(sock: socket.socket, context: ssl.SSLContext, seconds: float) -> ssl.SSLSocket | None:
    """The TLS handshake of a connection that came in, within `seconds` in all.

    It waits for the peer: call it on the connection's own thread, never where connections are
    accepted. None: the peer was refused or went away; that is logged and counted, and the socket
    is closed. The timeout of the returned socket is `seconds`.
    """
    wrapped: socket.socket = sock
    host = "?"
    try:
        host = str(sock.getpeername()[0])
        sock.settimeout(seconds)
        wrapped = tls = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        tls.do_handshake()
    except OSError as error:
        reason = _reason(error)
        metrics.tls_refused.labels(reason).inc()
        level = logging.DEBUG if reason == "closed" else logging.WARNING
        log.log(level, "refused a TLS connection from %s: %s", host, _words(reason, error))
        wrapped.close()
        sock.close()
        return None
    return tls


def warnings(settings: NodeTls, now: float) -> list[str]:
    """What is weak or soon over in node.tls, in words; [] is good.

    Raises:
        ConfigError: a file cannot be read, as `server_context`.
    """
    found = weaknesses(node_credentials(settings), now)
    if not settings.require_client_cert:
        found.append(
            "node.tls.require_client_cert: false lets every program of the network call under any"
            " AE title; set it to true"
        )
    own = certificates(Pem("node.tls.cert", settings.cert))[0]
    if not own.server_auth:
        found.append("node.tls.cert: its extended key usage has no serverAuth; peers will refuse")
    return found


def client_warnings(tls: ClientTls, now: float) -> list[str]:
    """What is weak or soon over in the TLS settings of a peer, in words; [] is good.

    Raises:
        ConfigError: a file cannot be read, as `client_context`.
    """
    found = weaknesses(tls.credentials, now)
    if not tls.checks_name:
        found.append(
            f"{tls.where}: {tls.server_name} is an address, so any certificate of its ca is taken"
            " for this peer; give server_name, or put the peer's own certificate into its ca"
        )
    if tls.credentials.cert is None:
        found.append(f"{tls.where}: we call it without a certificate; give cert and key")
    elif not certificates(tls.credentials.cert)[0].client_auth:
        found.append(
            f"{tls.credentials.cert.where}: its extended key usage has no clientAuth;"
            f" a peer that asks for our certificate ({tls.where}) will refuse it"
        )
    return found


# building


def _fill(context: ssl.SSLContext, credentials: Credentials, now: float) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_SUITES[credentials.profile])
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    # `ca` may hold a peer's own certificate, so that it and no other is trusted
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if credentials.ca is not None:
        certificates(credentials.ca)
        context.load_verify_locations(credentials.ca.path)
    if credentials.cert is not None and credentials.key is not None:
        _load_own(context, credentials.cert, credentials.key, credentials.key_password)
        check_dates(credentials.cert, now)


def _load_own(context: ssl.SSLContext, cert: Pem, key: Pem, password: str | None) -> None:
    def tell_password() -> str:  # without it, OpenSSL asks on the terminal
        if password is None:
            raise ConfigError(f"{key.where}: {key.path}: encrypted; give its key_password")
        return password

    certificates(cert)
    read(key)
    try:
        context.load_cert_chain(cert.path, key.path, tell_password)
    except ssl.SSLError as error:
        reason = error.reason or ""
        if "TOO_SMALL" in reason or "TOO_WEAK" in reason:
            words = "its key or its signature is too weak; use RSA 2048 or P-256 and SHA-256"
            raise ConfigError(f"{cert.where}: {cert.path}: {words}") from error
        if "MISMATCH" in reason or reason == "NO_CERTIFICATE_ASSIGNED":  # another kind of key
            words = f"not the key of {cert.path.name}; give the one it was made with"
        elif password is not None:
            words = "cannot be read as a PEM private key with its key_password"
        else:
            words = "not a PEM private key (-----BEGIN PRIVATE KEY-----)"
        raise ConfigError(f"{key.where}: {key.path}: {words}") from error


# refusing

_REASONS = (
    ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "no certificate"),
    ("CERTIFICATE_VERIFY_FAILED", "certificate"),
    ("_ALERT_", "refused by the peer"),
    ("WRONG_VERSION_NUMBER", "not TLS"),
    ("HTTP_REQUEST", "not TLS"),
    ("UNKNOWN_PROTOCOL", "not TLS"),
    ("UNSUPPORTED_PROTOCOL", "version or cipher"),
    ("NO_SHARED_CIPHER", "version or cipher"),
    ("VERSION_TOO_LOW", "version or cipher"),
)


def _reason(error: OSError) -> str:
    """One of a few words, as a label of a metric."""
    if isinstance(error, TimeoutError):
        return "silent"
    if not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLEOFError):
        return "closed"
    return next((words for part, words in _REASONS if part in (error.reason or "")), "other")


def _words(reason: str, error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{reason}: {error.verify_message}"
    return f"{reason}: {error.reason}" if isinstance(error, ssl.SSLError) else reason
