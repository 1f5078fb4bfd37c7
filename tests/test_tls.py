"""DICOM TLS against DCMTK: the right peers get in, the others do not, and nobody stops the rest."""

import contextlib
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY
from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from dicomnode import tls, x509
from dicomnode.cli import main
from dicomnode.config import NodeConfig, config_from_mapping
from dicomnode.credentials import ClientTls, NodeTls, PeerTls, Pem, client_tls
from dicomnode.errors import ConfigError
from dicomnode.upper_layer import Limits, Listener
from tests.certificates import OPENSSL, Authority, Pair, encrypted
from tests.fuzz.receiver import IDENTITY, Folder
from tests.peers import ECHOSCU, STORESCP, free_port, needs, storescp, wait_for

pytestmark = [pytest.mark.network, needs(OPENSSL)]
DAY = 86400.0
ARTIM_SECONDS = 5.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "ours").create()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A certificate of an authority that nobody here trusts."""
    folder = tmp_path_factory.mktemp("pki") / "foreign"
    return Authority(folder, "foreign").create().sign("stranger")


@pytest.fixture(scope="module")
def node(authority: Authority) -> Pair:
    return authority.sign("node", key="RSA 2048")


@pytest.fixture(scope="module")
def scanner(authority: Authority) -> Pair:
    return authority.sign("scanner")


@pytest.fixture(scope="module")
def settings(authority: Authority, node: Pair) -> NodeTls:
    return NodeTls(node.cert, node.key, authority.cert)


@contextlib.contextmanager
def listening(folder: Path, context: Callable[[], ssl.SSLContext] | None) -> Iterator[int]:
    """Our own acceptor on a free port, with TLS where a context is given."""
    limits = Limits(max_pdu_bytes=16384, artim_seconds=ARTIM_SECONDS)
    listener = Listener(
        ("127.0.0.1", 0),
        Folder(folder),
        identity=IDENTITY,
        limits=limits,
        max_associations=20,
        secure=None if context is None else lambda one: tls.wrap(one, context(), ARTIM_SECONDS),
    )
    listener.start()
    try:
        yield listener.port
    finally:
        listener.drain(1)


@pytest.fixture(scope="module")
def port(settings: NodeTls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A node that asks for client certificates."""
    reloader = tls.Reloader(settings)
    with listening(tmp_path_factory.mktemp("received"), reloader.context) as port:
        yield port


def echo(port: int, *options: object) -> bool:
    """Does DCMTK's C-ECHO get Success?"""
    command = [ECHOSCU, "-to", "5", "-ta", "5", "-td", "5", *map(str, options)]
    done = subprocess.run(
        [*command, "localhost", str(port)], capture_output=True, timeout=30, check=False
    )
    return done.returncode == 0


def as_peer(pair: Pair, authority: Authority) -> tuple[object, ...]:
    return "+tls", pair.key, pair.cert, "+cf", authority.cert


# DCMTK calls us

AUTHENTICATED: dict[str, tuple[str, ...]] = {
    "default profile": (),
    "BCP 195": ("+px",),
    "BCP 195 extended": ("+pz",),
}


@needs(ECHOSCU)
@pytest.mark.parametrize("options", AUTHENTICATED.values(), ids=AUTHENTICATED)
def test_a_peer_with_a_certificate_of_our_ca_gets_in(
    port: int, scanner: Pair, authority: Authority, options: tuple[str, ...]
) -> None:
    assert echo(port, *as_peer(scanner, authority), *options)


@pytest.fixture
def refused(
    port: int, scanner: Pair, stranger: Pair, authority: Authority
) -> dict[str, tuple[object, ...]]:
    expired = authority.sign("expired", days=-1)
    server_only = authority.sign("server", extensions="extendedKeyUsage=serverAuth")
    good = as_peer(scanner, authority)
    return {
        "anonymous": ("+tla", "+cf", authority.cert),
        "another ca": as_peer(stranger, authority),
        "expired": as_peer(expired, authority),
        "a server's certificate": as_peer(server_only, authority),
        "plain": (),
        "retired profile": (*good, "+pa"),
        "no encryption": (*good, "+pn"),
        "it does not know our ca": ("+tls", scanner.key, scanner.cert, "+cf", stranger.cert),
    }


@needs(ECHOSCU)
@pytest.mark.parametrize(
    "kind",
    [
        "anonymous",
        "another ca",
        "expired",
        "a server's certificate",
        "plain",
        "retired profile",
        "no encryption",
        "it does not know our ca",
    ],
)
def test_another_peer_is_refused_and_the_next_good_one_served(
    port: int, scanner: Pair, authority: Authority, refused: dict[str, Any], kind: str
) -> None:
    assert not echo(port, *refused[kind])
    assert echo(port, *as_peer(scanner, authority))


@needs(ECHOSCU)
def test_without_required_certificates_an_anonymous_peer_gets_in(
    tmp_path: Path, node: Pair, authority: Authority
) -> None:
    open_to_all = NodeTls(node.cert, node.key, require_client_cert=False)
    with listening(tmp_path, tls.Reloader(open_to_all).context) as port:
        assert echo(port, "+tla", "+cf", authority.cert)
        assert not echo(port)


@needs(ECHOSCU)
def test_the_extended_profile_refuses_128_bits(
    tmp_path: Path, node: Pair, scanner: Pair, authority: Authority
) -> None:
    strict = NodeTls(node.cert, node.key, authority.cert, profile="bcp195-extended")
    client = tls_1_2(python_client(authority, scanner), "ECDHE-RSA-AES128-GCM-SHA256")
    with listening(tmp_path, tls.Reloader(strict).context) as port:
        assert echo(port, *as_peer(scanner, authority), "+pz")
        with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
            handshake(port, client)


@needs(ECHOSCU)
def test_a_tls_peer_at_a_plain_port_fails_and_harms_nobody(
    tmp_path: Path, scanner: Pair, authority: Authority
) -> None:
    with listening(tmp_path, None) as port:
        assert not echo(port, *as_peer(scanner, authority))
        assert echo(port)


@needs(ECHOSCU)
def test_silent_tls_connections_stop_nobody(port: int, scanner: Pair, authority: Authority) -> None:
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    try:
        for connection in held[::2]:
            connection.sendall(b"\x16\x03\x01")  # half a record
        began = time.monotonic()
        assert echo(port, *as_peer(scanner, authority))
        assert time.monotonic() - began < 2
    finally:
        for connection in held:
            connection.close()


# versions


def secured(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    """A connection of the standard library's client, its handshake done."""
    plain = socket.create_connection(("127.0.0.1", port), 10)
    try:
        return context.wrap_socket(plain, server_hostname="localhost")
    except OSError:
        plain.close()
        raise


def handshake(port: int, context: ssl.SSLContext) -> str | None:
    """The TLS version that a client of the standard library agrees on with us."""
    with secured(port, context) as connection:
        return connection.version()


def python_client(authority: Authority, pair: Pair | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.cert))
    if pair is not None:
        context.load_cert_chain(pair.cert, pair.key)
    return context


def test_tls_1_3_is_preferred_and_1_2_accepted(
    port: int, scanner: Pair, authority: Authority
) -> None:
    context = python_client(authority, scanner)
    assert handshake(port, context) == "TLSv1.3"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(port, context) == "TLSv1.2"


def tls_1_2(context: ssl.SSLContext, ciphers: str) -> ssl.SSLContext:
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ciphers)
    return context


@pytest.mark.parametrize("cipher", ["ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES256-GCM-SHA384"])
def test_each_suite_of_the_profile_is_taken(
    port: int, scanner: Pair, authority: Authority, cipher: str
) -> None:
    assert handshake(port, tls_1_2(python_client(authority, scanner), cipher)) == "TLSv1.2"


@pytest.mark.parametrize(
    "cipher",
    [
        "AES128-GCM-SHA256",  # no forward secrecy
        "ECDHE-RSA-AES256-SHA384",  # no authenticated encryption
        "AES128-SHA",
        "NULL-SHA256:@SECLEVEL=0",
    ],
)
def test_a_suite_outside_the_profile_is_refused(
    port: int, scanner: Pair, authority: Authority, cipher: str
) -> None:
    with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
        handshake(port, tls_1_2(python_client(authority, scanner), cipher))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_1_1_is_refused(port: int, scanner: Pair, authority: Authority) -> None:
    context = python_client(authority, scanner)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1_1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(port, context)


def test_neither_side_offers_less_than_tls_1_2(settings: NodeTls) -> None:
    now, peer = time.time(), client_tls("pacs", True, "localhost", settings)
    for context in (tls.server_context(settings, now), tls.client_context(peer, now)):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_no_session_is_resumed_past_the_certificate(
    port: int, scanner: Pair, authority: Authority
) -> None:
    context = python_client(authority, scanner)
    with secured(port, context) as connection:
        connection.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            connection.recv(1)  # where a ticket would come
        assert connection.session is None or not connection.session.has_ticket


# the handshake on the connection's own thread


class Door:
    """A listening socket whose connections go through `tls.wrap`, each on its own thread."""

    def __init__(self, context: ssl.SSLContext, seconds: float) -> None:
        self.results: list[bool] = []
        self._context, self._seconds = context, seconds
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        secured = tls.wrap(connection, self._context, self._seconds)
        self.results.append(secured is not None)
        if secured is not None:
            secured.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def door(settings: NodeTls) -> Iterator[Door]:
    door = Door(tls.server_context(settings, time.time()), 0.7)
    yield door
    door.close()


def count(reason: str) -> float:
    return REGISTRY.get_sample_value("dicomnode_tls_refused_total", {"reason": reason}) or 0.0


def _silent(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        assert plain.recv(1) == b""


def _drips(port: int) -> None:
    """A byte now and then keeps no connection open: the time is for the whole handshake."""
    plain = socket.create_connection(("127.0.0.1", port), 10)
    with plain, contextlib.suppress(ConnectionError):
        for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60):
            plain.sendall(bytes([byte]))
            time.sleep(0.05)


def _plain_dicom(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        plain.sendall(b"\x01\x00\x00\x00\x00\xcd\x00\x01" + bytes(200))
        with contextlib.suppress(ConnectionError):
            while plain.recv(100):
                pass


def _closes(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), 10).close()


REFUSALS: dict[str, tuple[Callable[[int], None], bool]] = {
    "silent": (_silent, True),
    "not TLS": (_plain_dicom, True),
    "closed": (_closes, False),  # health checks: not worth a line each
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_a_refused_handshake_is_counted_and_told(
    door: Door, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    act, told = REFUSALS[reason]
    before = count(reason)
    act(door.port)
    wait_for(lambda: door.results == [False], "the handshake to be refused", 5)
    assert count(reason) == before + 1
    lines = [r.getMessage() for r in caplog.records if r.name == tls.__name__]
    assert lines == (
        [line for line in lines if line.startswith("refused a TLS connection from 127.0.0.1: ")]
    )
    assert len(lines) == told


def test_a_client_that_drips_bytes_is_refused_in_time(door: Door) -> None:
    began = time.monotonic()
    _drips(door.port)
    wait_for(lambda: door.results == [False], "the handshake to be refused", 5)
    assert time.monotonic() - began < 5
    assert count("silent") >= 1


def test_a_wrong_certificate_is_counted_with_the_reason(
    door: Door, stranger: Pair, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    before = count("certificate")
    with contextlib.suppress(OSError):
        handshake(door.port, python_client(authority, stranger))
    wait_for(lambda: door.results == [False], "the handshake to be refused", 5)
    assert count("certificate") == before + 1
    assert "certificate: unable to get local issuer certificate" in caplog.text
    before = count("no certificate")
    with contextlib.suppress(OSError):
        handshake(door.port, python_client(authority, None))
    wait_for(lambda: len(door.results) == 2, "the handshake to be refused", 5)
    assert count("no certificate") == before + 1


def test_a_silent_connection_does_not_hold_a_good_one(
    door: Door, scanner: Pair, authority: Authority
) -> None:
    with socket.create_connection(("127.0.0.1", door.port), 10):
        assert handshake(door.port, python_client(authority, scanner)) == "TLSv1.3"
        wait_for(lambda: door.results == [True], "the good handshake to end", 0.5)


# changed files


@pytest.fixture
def own(tmp_path: Path, node: Pair, authority: Authority) -> NodeTls:
    """node.tls with files that the test may change."""
    for source, name in ((node.cert, "cert"), (node.key, "key"), (authority.cert, "ca")):
        shutil.copy(source, tmp_path / name)
    return NodeTls(tmp_path / "cert", tmp_path / "key", tmp_path / "ca")


def put(pair: Pair, settings: NodeTls) -> None:
    """Replace certificate and key, each by a rename, as an administrator's script does."""
    for source, target in ((pair.cert, settings.cert), (pair.key, settings.key)):
        beside = target.with_suffix(".new")
        shutil.copy(source, beside)
        beside.rename(target)


def serial(port: int, client: ssl.SSLContext) -> str:
    with secured(port, client) as connection:
        found: Any = connection.getpeercert()
        return str(found["serialNumber"])


def test_a_renewed_certificate_is_served_without_a_restart(
    tmp_path: Path, own: NodeTls, scanner: Pair, authority: Authority
) -> None:
    client, reloader = python_client(authority, scanner), tls.Reloader(own)
    with listening(tmp_path / "received", reloader.context) as port:
        before = serial(port, client)
        put(authority.sign("renewed", days=50), own)
        assert serial(port, client) != before
    expires = REGISTRY.get_sample_value("dicomnode_tls_certificate_expires_timestamp_seconds")
    assert expires == pytest.approx(time.time() + 50 * DAY, abs=3600)


def test_an_authority_that_is_taken_away_is_trusted_no_more(
    own: NodeTls, authority: Authority, stranger: Pair
) -> None:
    reloader = tls.Reloader(own)
    assert own.ca is not None
    shutil.copy(stranger.cert.with_name("ca.pem"), own.ca)
    [trusted] = reloader.context().get_ca_certs()
    assert trusted["subject"] == ((("commonName", "foreign"),),)


def test_unchanged_files_keep_the_context(own: NodeTls) -> None:
    reloader = tls.Reloader(own)
    assert reloader.context() is reloader.context()


BROKEN: dict[str, Callable[[NodeTls, Authority, Pair], object]] = {
    "half a certificate": lambda own, _, __: own.cert.write_text(own.cert.read_text()[:300]),
    "another key": lambda own, _, stranger: shutil.copy(stranger.key, own.key),
    "no file": lambda own, _, __: own.key.unlink(),
    "expired": lambda own, authority, _: put(authority.sign("old", days=-1), own),
    "an empty ca": lambda own, _, __: Path(str(own.ca)).write_text(""),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_broken_change_keeps_the_old_files_at_work_and_is_told_once(
    own: NodeTls,
    authority: Authority,
    stranger: Pair,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[NodeTls, Authority, Pair], object],
) -> None:
    reloader = tls.Reloader(own)
    before = reloader.context()
    change(own, authority, stranger)
    assert [reloader.context() for _ in range(3)] == [before] * 3
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1
    assert told[0].startswith("the changed certificate files cannot be used, the old go on: node.")
    put(authority.sign("mended"), own)
    shutil.copy(authority.cert, Path(str(own.ca)))
    assert reloader.context() is not before


# what is wrong with the files, in words


def problem(settings: NodeTls, now: float | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        tls.server_context(settings, time.time() if now is None else now)
    return str(caught.value)


def test_each_wrong_file_is_named_with_its_key_and_a_remedy(
    tmp_path: Path, node: Pair, stranger: Pair, authority: Authority
) -> None:
    ca, absent, der = authority.cert, tmp_path / "absent", tmp_path / "der"
    der.write_bytes(ssl.PEM_cert_to_DER_cert(node.cert.read_text()))
    damaged = tmp_path / "damaged"
    lines = node.cert.read_text().splitlines()
    damaged.write_text("\n".join([lines[0], lines[2], *lines[4:]]))
    locked = encrypted(node, "secret")
    wrong: list[tuple[NodeTls, str]] = [
        (NodeTls(absent, node.key, ca), f"node.tls.cert: {absent}: No such file or directory; rel"),
        (NodeTls(node.cert, absent, ca), f"node.tls.key: {absent}: No such file or directory; rel"),
        (NodeTls(node.cert, node.key, absent), f"node.tls.ca: {absent}: No such file or directory"),
        (NodeTls(tmp_path, node.key, ca), f"node.tls.cert: {tmp_path}: Is a directory; relative"),
        (NodeTls(der, node.key, ca), f"node.tls.cert: {der}: no PEM certificate in it; `openssl"),
        (NodeTls(damaged, node.key, ca), f"node.tls.cert: {damaged}: a certificate is damaged"),
        (NodeTls(node.cert, stranger.key, ca), f"node.tls.key: {stranger.key}: not the key of nod"),
        (NodeTls(node.cert, node.cert, ca), f"node.tls.key: {node.cert}: not a PEM private key"),
        (NodeTls(node.cert, locked.key, ca), f"node.tls.key: {locked.key}: encrypted; give its ke"),
        (
            NodeTls(node.cert, locked.key, ca, key_password="wrong"),  # noqa: S106
            f"node.tls.key: {locked.key}: cannot be read as a PEM private key with its key_pass",
        ),
        (NodeTls(node.cert, node.key, None), "node.tls.ca: missing; name who signs"),
    ]
    for settings, words in wrong:
        assert problem(settings).startswith(words)
        assert "secret" not in problem(settings)


def test_an_unreadable_key_says_who_must_read_it(
    settings: NodeTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)  # tests may run as root, who reads anything
    assert problem(settings).endswith("not readable; give the user who runs dicomnode read access")


def test_an_expired_or_future_certificate_starts_no_node(settings: NodeTls) -> None:
    assert ": expired on 20" in problem(settings, time.time() + 61 * DAY)
    assert ": valid only from 20" in problem(settings, time.time() - 1 * DAY)


def test_a_short_key_starts_no_node(authority: Authority) -> None:
    short = authority.sign("short", key="RSA 1024")
    assert problem(NodeTls(short.cert, short.key, authority.cert)).endswith(
        "its key or its signature is too weak; use RSA 2048 or P-256 and SHA-256"
    )


def test_the_password_opens_an_encrypted_key(node: Pair, authority: Authority) -> None:
    locked = encrypted(node, "secret")
    tls.server_context(NodeTls(node.cert, locked.key, authority.cert, "secret"), time.time())


# what is weak, in words


def test_good_settings_are_not_warned_about(settings: NodeTls) -> None:
    settings.key.chmod(0o600)
    assert tls.warnings(settings, time.time()) == []


def test_each_weakness_is_warned_about(tmp_path: Path, node: Pair, authority: Authority) -> None:
    old = authority.sign("old-root-child", digest="sha1", key="RSA 1024", days=20)
    ca = tmp_path / "ca.pem"
    ca.write_text(authority.cert.read_text() * 20 + old.cert.read_text())
    node.key.chmod(0o644)
    weak = NodeTls(node.cert, node.key, ca, require_client_cert=False)
    found = tls.warnings(weak, time.time())
    which = f"node.tls.ca: certificate 21 of {ca}: "
    expected = [
        f"{which}expires in 19 days",
        f"{which}RSA 1024 bits",
        f"{which}signed with SHA-1",
        f"node.tls.ca: {ca}: more than 20 authorities",
        f"node.tls.key: {node.key}: others can read or change it; chmod 600",
        "node.tls.require_client_cert: false lets every program",
    ]
    assert [line[: len(e)] for line, e in zip(found, expected, strict=True)] == expected


def test_a_certificate_for_the_wrong_purpose_is_warned_about(
    authority: Authority, settings: NodeTls
) -> None:
    usage = "subjectAltName=DNS:localhost\nextendedKeyUsage="
    client = authority.sign("client-only", extensions=f"{usage}clientAuth")
    server = authority.sign("server-only", extensions=f"{usage}serverAuth")
    both = authority.sign("both", extensions=f"{usage}serverAuth,clientAuth")

    def warned(pair: Pair) -> tuple[list[str], list[str]]:
        pair.key.chmod(0o600)
        node = NodeTls(pair.cert, pair.key, authority.cert)
        peer = client_tls("pacs", True, "localhost", node)
        return tls.warnings(node, time.time()), tls.client_warnings(peer, time.time())

    assert ["serverAuth" in line for line in warned(client)[0]] == [True]
    assert ["clientAuth" in line for line in warned(server)[1]] == [True]
    assert warned(both) == ([], [])


def test_a_peer_at_an_address_is_warned_about(settings: NodeTls) -> None:
    settings.key.chmod(0o600)
    peer = client_tls("pacs", True, "10.0.0.9", settings)
    [line] = tls.client_warnings(peer, time.time())
    assert line.startswith("peers.pacs.tls: 10.0.0.9 is an address, so any certificate of its ca")
    named = client_tls("pacs", PeerTls(server_name="pacs.example"), "10.0.0.9", settings)
    assert tls.client_warnings(named, time.time()) == []


# we call DCMTK


@pytest.fixture(scope="module")
def pacs(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """DCMTK's storescp with TLS, which asks for our certificate; it is named localhost."""
    pair = authority.sign("pacs", key="RSA 2048")
    options = ("+tls", str(pair.key), str(pair.cert), "+cf", str(authority.cert))
    with storescp(tmp_path_factory.mktemp("pacs"), "PACS", 0, *options) as archive:
        yield archive.port


def we_echo(port: int, peer: ClientTls, host: str = "localhost") -> bool:
    entity = AE("DICOMNODE")
    entity.connection_timeout = entity.acse_timeout = entity.network_timeout = 5
    entity.add_requested_context(Verification)
    arguments: Any = (tls.client_context(peer, time.time()), peer.server_name)
    association = entity.associate(host, port, tls_args=arguments)
    if not association.is_established:
        return False
    status = association.send_c_echo()
    association.release()
    return bool(status.get("Status") == 0)


@needs(STORESCP)
def test_we_call_a_peer_by_its_name(pacs: int, settings: NodeTls) -> None:
    assert we_echo(pacs, client_tls("pacs", True, "localhost", settings))


@needs(STORESCP)
def test_at_an_address_the_ca_decides_alone(pacs: int, settings: NodeTls, stranger: Pair) -> None:
    assert we_echo(pacs, client_tls("pacs", True, "127.0.0.1", settings), "127.0.0.1")
    foreign = client_tls("pacs", PeerTls(ca=stranger.cert), "127.0.0.1", settings)
    assert not we_echo(pacs, foreign, "127.0.0.1")


@needs(STORESCP)
def test_a_peer_with_another_name_is_not_the_one_we_meant(pacs: int, settings: NodeTls) -> None:
    other = client_tls("pacs", PeerTls(server_name="pacs.example"), "127.0.0.1", settings)
    assert not we_echo(pacs, other, "127.0.0.1")
    same = client_tls("pacs", PeerTls(server_name="localhost"), "127.0.0.1", settings)
    assert we_echo(pacs, same, "127.0.0.1")


@needs(STORESCP)
def test_an_address_given_as_name_must_be_in_the_certificate(
    authority: Authority, settings: NodeTls, tmp_path: Path
) -> None:
    pair = authority.sign("numbered", extensions="subjectAltName=IP:127.0.0.1")
    options = ("+tls", str(pair.key), str(pair.cert), "+cf", str(authority.cert))
    with storescp(tmp_path, "PACS", 0, *options) as archive:
        for name, right in (("127.0.0.1", True), ("127.0.0.2", False)):
            peer = client_tls("pacs", PeerTls(server_name=name), "127.0.0.1", settings)
            assert we_echo(archive.port, peer, "127.0.0.1") == right


@needs(STORESCP)
def test_the_peers_own_certificate_as_ca_trusts_it_and_no_other(
    pacs: int, settings: NodeTls, authority: Authority, scanner: Pair
) -> None:
    pinned = client_tls("pacs", PeerTls(ca=authority.folder / "pacs.pem"), "127.0.0.1", settings)
    assert we_echo(pacs, pinned, "127.0.0.1")
    another = client_tls("pacs", PeerTls(ca=scanner.cert), "127.0.0.1", settings)
    assert not we_echo(pacs, another, "127.0.0.1")


@needs(STORESCP)
def test_a_peer_that_asks_for_a_certificate_refuses_us_without_one(
    pacs: int, authority: Authority
) -> None:
    nameless = client_tls("pacs", PeerTls(ca=authority.cert), "localhost", None)
    assert not we_echo(pacs, nameless)
    assert any("without a certificate" in w for w in tls.client_warnings(nameless, time.time()))


@needs(STORESCP)
def test_what_keeps_tls_from_working_is_told_in_words(
    pacs: int, settings: NodeTls, stranger: Pair, authority: Authority, tmp_path: Path
) -> None:
    foreign = PeerTls(cert=stranger.cert, key=stranger.key)
    cases: list[tuple[bool | PeerTls, int, str]] = [
        (True, pacs, ""),
        (PeerTls(server_name="other.example"), pacs, "peers.pacs.tls: its certificate: Hostname m"),
        (PeerTls(ca=stranger.cert), pacs, "peers.pacs.tls: its certificate: self-signed"),
        (foreign, pacs, "peers.pacs.tls: it refuses our certificate or our ciphers"),
        (True, free_port(), "no connection: Connection refused"),
    ]
    for wanted, port, words in cases:
        peer = client_tls("pacs", wanted, "localhost", settings)
        found = tls.trouble_with(peer, "127.0.0.1", port, time.time())
        assert found.startswith(words)
        assert bool(found) == bool(words)
    peer = client_tls("pacs", True, "localhost", settings)
    with storescp(tmp_path, "PLAIN") as archive:
        found = tls.trouble_with(peer, "127.0.0.1", archive.port, time.time(), 2)
        assert found.endswith("does it listen with TLS on this port?")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = tls.trouble_with(peer, "127.0.0.1", silent.getsockname()[1], time.time(), 0.3)
        assert found.startswith("peers.pacs.tls: TLS failed (silent): does it listen with TLS")


@needs(STORESCP)
def test_a_plain_peer_is_never_called_in_clear(settings: NodeTls, tmp_path: Path) -> None:
    with storescp(tmp_path, "PLAIN") as archive:
        assert not we_echo(archive.port, client_tls("pacs", True, "localhost", settings))


# the set-up that docs/SECURITY.md shows


@needs(ECHOSCU)
def test_the_documented_set_up_works(tmp_path: Path) -> None:
    document = (Path(__file__).parents[1] / "docs" / "SECURITY.md").read_text("utf-8")
    commands = document.split("```sh\n")[1].split("```")[0]
    section = yaml.safe_load(document.split("```yaml\n")[1].split("```")[0])
    bash = ["/bin/bash", "-ec", commands.replace("rsa:3072", "rsa:2048")]
    subprocess.run(bash, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    config = config_from_mapping(section, tmp_path)
    assert config.node.tls is not None
    assert tls.warnings(config.node.tls, time.time()) == []
    pacs = config.peers["pacs"]
    peer = client_tls("pacs", pacs.tls, str(pacs.host), config.node.tls)
    assert tls.client_warnings(peer, time.time()) == []
    folder = tmp_path / "tls"
    ct1 = ("+tls", folder / "ct1.key", folder / "ct1.pem", "+cf", folder / "ca.pem")
    with listening(tmp_path / "received", tls.Reloader(config.node.tls).context) as port:
        assert echo(port, *ct1)


# the keys of config.yaml


@needs(STORESCP)
def test_doctor_calls_our_own_port_with_tls(
    settings: NodeTls, port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"cert": str(settings.cert), "key": str(settings.key), "ca": str(settings.ca)}
    with storescp(tmp_path / "pacs") as pacs:
        peer = {"ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port}
        node = {"bind": "127.0.0.1", "port": port, "tls": files}
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump({"node": node, "peers": {"pacs": peer}}))
        assert main(["doctor", "pacs", "--config", str(config)]) == 0
    assert f"our node takes calls by the AE title {pacs.ae_title}" in capsys.readouterr().out


def configured(data: dict[str, Any]) -> NodeConfig:
    return config_from_mapping(data, Path("/etc/dicomnode"))


def test_relative_files_start_at_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_PASSWORD_OF_TEST", "s3cret")
    node = {
        "cert": "n.pem",
        "key": "/k/n.key",
        "ca": "ca",
        "key_password": "${KEY_PASSWORD_OF_TEST}",
    }
    peers = {
        "one": {"ae_title": "A", "host": "a", "port": 1, "tls": True},
        "two": {"ae_title": "B", "host": "b", "port": 1, "tls": {"ca": "b.pem"}},
        "three": {"ae_title": "C", "host": "c", "port": 1},
    }
    config = configured({"node": {"tls": node}, "peers": peers})
    folder = Path("/etc/dicomnode")
    assert config.node.tls == NodeTls(folder / "n.pem", Path("/k/n.key"), folder / "ca", "s3cret")
    wanted = [peer.tls for peer in config.peers.values()]
    assert wanted == [True, PeerTls(ca=folder / "b.pem"), False]
    two = client_tls("two", wanted[1], "b", config.node.tls).credentials
    assert two.ca == Pem("peers.two.tls.ca", folder / "b.pem")
    assert "s3cret" not in repr(two)
    assert two.cert == Pem("node.tls.cert", folder / "n.pem")


PEER = {"ae_title": "A", "host": "a", "port": 1}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"node": {"tls": {"key": "k", "ca": "c"}}}, "node.tls.cert: missing"),
    ({"node": {"tls": {"cert": "c", "key": "k"}}}, "node.tls.ca: missing; name who signs"),
    ({"node": {"tls": {"cert": "c", "key": "k", "chiphers": "x"}}}, "node.tls.chiphers: unknown"),
    (
        {"node": {"tls": {"cert": "c", "key": "k", "ca": "c", "profile": "ssl"}}},
        "node.tls.profile: must be bcp195 or bcp195-extended",
    ),
    ({"peers": {"a": {**PEER, "tls": True}}}, "peers.a.tls.ca: missing, and node.tls.ca too"),
    ({"peers": {"a": {**PEER, "tls": {"ca": "c", "key": "k"}}}}, "peers.a.tls: cert and key go"),
    ({"peers": {"a": {**PEER, "sop_classes": ["CTX"]}}}, "peers.a.sop_classes: 'CTX' is no SOP"),
    ({"peers": {"a": {**PEER, "sop_classes": []}}}, "peers.a.sop_classes: names nothing"),
    ({"peers": {"a": {**PEER, "max_instances_per_second": -1}}}, "peers.a.max_instances_per_sec"),
]


@pytest.mark.parametrize(("data", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_wrong_key_is_named(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(data)
    assert any(line.startswith(words) for line in str(caught.value).splitlines())


def test_a_damaged_certificate_is_an_error_and_never_a_crash(node: Pair) -> None:
    der = ssl.PEM_cert_to_DER_cert(node.cert.read_text())
    for at in range(200):
        for wrong in (0x00, 0x80, 0xFF):
            broken = bytearray(der)
            broken[at] = wrong
            with contextlib.suppress(ValueError):
                x509.read_pem(ssl.DER_cert_to_PEM_cert(bytes(broken)))
