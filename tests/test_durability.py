"""Success is answered only after the disk has everything: seen in the system calls themselves."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.factories import ct_series, write_series
from tests.peers import STORESCU, Node, needs, node_settings, send, wait_for

STRACE = "/usr/bin/strace"
pytestmark = [pytest.mark.network, pytest.mark.peers, needs(STORESCU, STRACE)]

_RESPONSE = re.compile(r'send(to|msg)\(\d+<[^>]*>, [^"]*"\\4\\0')
"""A P-DATA-TF PDU goes out: the C-STORE response."""


@pytest.fixture
def node(tmp_path: Path, models_dir: Path) -> Iterator[Node]:
    under_test = Node(tmp_path / "node", node_settings(models_dir, []))
    yield under_test.start()
    under_test.kill()


def test_file_folder_and_journal_are_synced_before_each_response(
    node: Node, tmp_path: Path
) -> None:
    files = write_series(ct_series(6, 64, 64), tmp_path / "source")
    trace = tmp_path / "trace"
    watched = "trace=fsync,fdatasync,link,linkat,sendto,sendmsg"
    with _traced(node, "-y", "-e", watched, "-o", str(trace)):
        assert send(STORESCU, files, node.port).returncode == 0
        wait_for(lambda: len(_RESPONSE.findall(trace.read_text())) >= 6, "six responses", 20)

    calls: list[str] = []
    responses = 0
    for line in trace.read_text().splitlines():
        if _RESPONSE.search(line):
            responses += 1
            assert calls[-4:] == ["name", "file", "folder", "journal"], (responses, calls)
            calls = []
        elif (what := _what(line)) and (not calls or calls[-1] != what):
            calls.append(what)
    assert responses == 6


def test_an_instance_that_the_disk_does_not_take_is_refused_and_leaves_nothing(
    node: Node, tmp_path: Path
) -> None:
    files = write_series(ct_series(3, 64, 64), tmp_path / "source")
    assert send(STORESCU, files[:1], node.port).returncode == 0  # its folder is there
    faults = ("-e", "trace=fsync", "-e", "inject=fsync:error=EIO")
    with _traced(node, *faults, "-o", str(tmp_path / "trace")):
        refused = send(STORESCU, files[1:], node.port, "CT1", "-v")
    assert "Refused: OutOfResources" in refused.stdout + refused.stderr
    data = node.folder / "data"
    assert len(list(data.glob("received/*/*"))) == 1
    assert not list(data.glob("incoming/*"))
    assert "could not store the instance" in node.log
    assert send(STORESCU, files, node.port).returncode == 0
    assert len(list(data.glob("received/*/*.dcm"))) == 3


def test_what_was_not_acknowledged_before_a_stop_is_gone_and_can_be_sent_again(
    node: Node, tmp_path: Path
) -> None:
    """As a power failure leaves it: names without rows, and files whose end never got there."""
    files = write_series(ct_series(4, 64, 64), tmp_path / "source")
    assert send(STORESCU, files[:2], node.port).returncode == 0
    node.kill()
    received, incoming = node.folder / "data" / "received", node.folder / "data" / "incoming"
    folder = next(received.iterdir())
    acknowledged = sorted(folder.glob("*.dcm"))
    os.link(acknowledged[0], incoming / "0.part")  # its response was under way
    for number, (path, cut) in enumerate(((files[2], None), (files[3], 700)), start=1):
        part = incoming / f"{number}.part"
        part.write_bytes(path.read_bytes()[:cut])
        os.link(part, folder / f"1.2.3.{number}.dcm")
    (incoming / "9.part").write_bytes(b"half")
    node.start()
    assert sorted(folder.glob("*.dcm")) == acknowledged
    assert not list(incoming.iterdir())
    assert "removed 2 instances that the stop kept from being acknowledged" in node.log
    assert send(STORESCU, files, node.port).returncode == 0
    assert len(list(folder.glob("*.dcm"))) == 4
    assert node.run("check", "--storage").returncode == 0


@contextmanager
def _traced(node: Node, *options: str) -> Iterator[None]:
    """strace is attached to every thread of the node."""
    command = [STRACE, "-f", *options, "-p", str(node.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
        assert tracer.stderr is not None
        if b"attached" not in tracer.stderr.readline():
            pytest.skip("strace may not attach to processes here")
        try:
            yield
        finally:  # else a failure within would wait for it for ever
            tracer.send_signal(signal.SIGINT)
            tracer.wait(20)


def _what(line: str) -> str | None:
    """What a system call makes durable, or names."""
    if "resumed" in line:
        return None
    if "link" in line and "/incoming/" in line:
        return "name"
    if "sync(" not in line:
        return None
    if ".db" in line:
        return "journal"
    if "/incoming/" in line or ".dcm" in line:
        return "file"
    return "folder" if "/received/" in line else None
