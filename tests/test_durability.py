"""Success is answered only after the disk has everything: seen in the system calls themselves."""

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.factories import ct_series, write_series
from tests.peers import STORESCU, Node, needs, node_settings, send, wait_for

STRACE = "/usr/bin/strace"
pytestmark = [pytest.mark.network, pytest.mark.peers, needs(STORESCU, STRACE)]

_RESPONSE = re.compile(r'sendto\(\d+<[^>]*>, "\\4\\0')
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
    watched = "trace=fsync,fdatasync,link,linkat,sendto"
    command = [STRACE, "-f", "-y", "-e", watched, "-o", str(trace), "-p", str(node.pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert tracer.stderr is not None
    if b"attached" not in tracer.stderr.readline():
        pytest.skip("strace may not attach to processes here")
    assert send(STORESCU, files, node.port).returncode == 0
    wait_for(lambda: len(_RESPONSE.findall(trace.read_text())) >= 6, "six responses", 20)
    tracer.send_signal(signal.SIGINT)
    tracer.wait(20)

    calls: list[str] = []
    responses = 0
    for line in trace.read_text().splitlines():
        if _RESPONSE.search(line):
            responses += 1
            assert calls[-4:] == ["file", "name", "folder", "journal"], (responses, calls)
            calls = []
        elif (what := _what(line)) and (not calls or calls[-1] != what):
            calls.append(what)
    assert responses == 6


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
