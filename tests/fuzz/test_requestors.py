"""Foreign requestors against our acceptor: DCMTK, pynetdicom, Odil, CTN and dcmjs-dimse."""

import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import JPEGLosslessSV1, RLELossless
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage, Verification

from dicomnode.spool import dataset_digest
from dicomnode.upper_layer import Listener
from tests.factories import JPEG_TOOL, ct_series, write_series
from tests.fuzz.receiver import IDENTITY, Folder, listening
from tests.judges import NODE_MODULES
from tests.peers import DCMSEND, ECHOSCU, STORESCU, needs, send, wait_for

pytestmark = [pytest.mark.network, pytest.mark.peers]
ODIL, SEND_IMAGE, DICOM_ECHO = "/usr/bin/odil", "/usr/bin/send_image", "/usr/bin/dicom_echo"
OPENSSL = "/usr/bin/openssl"
DCMJS = Path(os.environ.get("DICOMNODE_DCMJS", NODE_MODULES))
"""A node_modules folder with dcmjs-dimse: ``make packages`` makes one."""


@pytest.fixture
def handler(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "kept")


@pytest.fixture
def listener(handler: Folder) -> Iterator[Listener]:
    listener = listening(handler)
    yield listener
    listener.drain(0)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_series(ct_series(5, 64, 64), tmp_path / "sent")


def _run(*command: object) -> str:
    """What a foreign program prints; it must exit with 0."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _same(files: list[Path], handler: Folder) -> bool:
    """Is each data set kept once, byte for byte?"""
    return sorted(dataset_digest(p)[0] for p in files) == sorted(
        dataset_digest(p)[0] for p in handler.kept()
    )


@needs(ECHOSCU, STORESCU, DCMSEND)
@pytest.mark.parametrize("program", [STORESCU, DCMSEND])
def test_dcmtk_stores(program: str, listener: Listener, handler: Folder, files: list[Path]) -> None:
    _run(ECHOSCU, "--repeat", 5, "127.0.0.1", listener.port)
    assert send(program, files, listener.port).returncode == 0
    assert _same(files, handler)
    wait_for(lambda: ("CT1", "released") in handler.ends, "the release", 5)


@needs(STORESCU, str(JPEG_TOOL))
@pytest.mark.parametrize(
    ("syntax", "option"), [(JPEGLosslessSV1, "--propose-lossless"), (RLELossless, "--propose-rle")]
)
def test_compressed_images_stay_compressed(
    listener: Listener, handler: Folder, tmp_path: Path, syntax: str, option: str
) -> None:
    files = write_series(ct_series(3, 64, 64, syntax=syntax), tmp_path / "sent")  # type: ignore[arg-type]
    assert send(STORESCU, files, listener.port, "CT1", option).returncode == 0
    assert {dcmread(path).file_meta.TransferSyntaxUID for path in handler.kept()} == {syntax}
    assert all((dcmread(path).pixel_array > 0).any() for path in handler.kept())


@needs(STORESCU)
@pytest.mark.parametrize("option", ["--abort", "--max-send-pdu 4096", "--max-pdu 4096"])
def test_dcmtk_with_its_oddities(
    listener: Listener, handler: Folder, files: list[Path], option: str
) -> None:
    send(STORESCU, files, listener.port, "CT1", *option.split())
    assert _same(files, handler)
    how = "aborted" if option == "--abort" else "released"
    wait_for(lambda: handler.ends == [("CT1", how)], "the end", 5)


def test_pynetdicom_stores(listener: Listener, handler: Folder, files: list[Path]) -> None:
    ae = AE("PYNETDICOM")
    ae.add_requested_context(CTImageStorage)
    ae.add_requested_context(Verification)
    association = ae.associate("127.0.0.1", listener.port, ae_title="DICOMNODE")
    assert association.acceptor.implementation_class_uid == IDENTITY.implementation_class_uid
    assert association.send_c_echo().Status == 0
    for path in files:
        assert association.send_c_store(dcmread(path)).Status == 0
    association.release()
    assert len(handler.kept()) == len(files)


def test_four_associations_at_once_keep_apart(
    listener: Listener, handler: Folder, tmp_path: Path
) -> None:
    folders = [write_series(ct_series(8, seed=seed), tmp_path / str(seed)) for seed in range(4)]
    senders = [
        subprocess.Popen(
            [STORESCU, "-aet", f"CT{n}", "127.0.0.1", str(listener.port), *map(str, f)]
        )
        for n, f in enumerate(folders)
    ]
    assert [sender.wait(60) for sender in senders] == [0] * 4
    assert _same([path for folder in folders for path in folder], handler)
    for requestor, received in handler.received:
        number = int(requestor.calling_ae.removeprefix("CT"))
        assert received.sop_instance_uid in {dcmread(p).SOPInstanceUID for p in folders[number]}


@needs(ODIL)
def test_odil_echoes_and_stores(listener: Listener, handler: Folder, files: list[Path]) -> None:
    _run(ODIL, "echo", "127.0.0.1", listener.port, "ODIL", "DICOMNODE")
    _run(ODIL, "store", "127.0.0.1", listener.port, "ODIL", "DICOMNODE", *files)
    assert len(handler.kept()) == len(files)
    assert _pixels(handler.kept()) == _pixels(files)


@needs(SEND_IMAGE, DICOM_ECHO)
def test_ctn_echoes_and_stores(listener: Listener, handler: Folder, files: list[Path]) -> None:
    _run(DICOM_ECHO, "-r", 3, "127.0.0.1", listener.port)
    _run(SEND_IMAGE, "-r", "-a", "CTN", "-c", "DICOMNODE", "127.0.0.1", listener.port, *files)
    assert _pixels(handler.kept()) == _pixels(files)


@pytest.mark.skipif(
    not (DCMJS / "dcmjs-dimse").is_dir() or shutil.which("node") is None,
    reason="not installed: node and dcmjs-dimse (DICOMNODE_DCMJS names its node_modules)",
)
def test_dcmjs_echoes_and_stores(
    listener: Listener, handler: Folder, files: list[Path], tmp_path: Path
) -> None:
    script = tmp_path / "send.cjs"
    script.write_text(_DCMJS)
    node = str(shutil.which("node"))
    assert "answered 6" in _run(node, script, DCMJS / "dcmjs-dimse", listener.port, *files)
    assert _pixels(handler.kept()) == _pixels(files)


_DCMJS = """
const [library, port, ...files] = process.argv.slice(2);
const { Client, requests } = require(library);
const client = new Client();
let answered = 0;
const stores = files.map((file) => new requests.CStoreRequest(file));
for (const one of [new requests.CEchoRequest(), ...stores]) {
  one.on('response', (r) => { if (r.getStatus() === 0) answered++; });
  client.addRequest(one);
}
client.on('networkError', (e) => { console.log(e); process.exit(1); });
client.on('closed', () => { console.log('answered', answered); process.exit(0); });
client.send('127.0.0.1', Number(port), 'DCMJS', 'DICOMNODE');
"""


@needs(STORESCU, OPENSSL)
def test_tls_carries_the_same(handler: Folder, files: list[Path], tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-days", "1", "-nodes", "-newkey", "rsa:2048"]
    _run(OPENSSL, "req", "-x509", "-keyout", key, "-out", cert, *subject)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    listener = listening(handler, secure=lambda s: context.wrap_socket(s, server_side=True))
    options = ["--anonymous-tls", "--add-cert-file", str(cert)]
    assert send(STORESCU, files, listener.port, "CT1", *options).returncode == 0
    assert send(STORESCU, files, listener.port).returncode != 0  # no TLS, no association
    listener.drain(0)
    assert _same(files, handler)


def _pixels(files: list[Path]) -> dict[str, bytes]:
    datasets: list[Dataset] = [dcmread(path) for path in files]
    return {str(ds.SOPInstanceUID): ds.pixel_array.tobytes() for ds in datasets}
