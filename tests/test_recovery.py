"""kill -9 at random moments: what was acknowledged is never lost, what is sent is sent once."""

import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread

from tests.factories import ct_series, write_series
from tests.peers import (
    ORTHANC,
    STORESCU,
    Archive,
    Node,
    needs,
    node_settings,
    orthanc,
    send,
    wait_for,
)
from tests.test_walk import series_uid, source_instances, translated_sources

pytestmark = [pytest.mark.network, pytest.mark.peers, needs(STORESCU, ORTHANC)]

KILLS = int(os.environ.get("DICOMNODE_KILLS", "10"))
SLICES = 30


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with orthanc(tmp_path / "orthanc") as peer:
        yield peer


@pytest.fixture
def node(tmp_path: Path, models_dir: Path, archive: Archive) -> Iterator[Node]:
    settings = node_settings(models_dir, [archive], quiet_seconds=4, hold_incomplete_seconds=60)
    under_test = Node(tmp_path / "node", settings)
    yield under_test.start()
    under_test.kill()
    print(under_test.log[-8000:])


class Sender(threading.Thread):
    """DCMTK's storescu on a thread; knows afterwards which instances were acknowledged."""

    def __init__(self, files: list[Path], port: int) -> None:
        super().__init__()
        self._files, self._port = files, port
        self.result: subprocess.CompletedProcess[str] | None = None

    def run(self) -> None:
        self.result = send(STORESCU, self._files, self._port, "CT1", "-v")

    def acknowledged(self) -> set[str]:
        """SOP Instance UIDs that were answered with Success."""
        self.join(60)
        assert self.result is not None
        told, current = set(), ""
        for line in (self.result.stdout + self.result.stderr).splitlines():
            if found := re.search(r"Sending file: (.*)$", line):
                current = found[1]
            elif "Received Store Response (Success)" in line:
                told.add(str(dcmread(current, stop_before_pixels=True).SOPInstanceUID))
        return told


def stored(node: Node) -> set[str]:
    return {path.stem for path in (node.folder / "data" / "received").glob("*/*.dcm")}


def derived_of(archive: Archive, sources: set[str], folder: Path) -> list[list[str]]:
    """The source instances of each derived series at the destination that comes from `sources`."""
    found = []
    for series in archive.derived_series():
        made_of = translated_sources(archive.fetch(series, folder / series["ID"]))
        if set(made_of) & sources:
            found.append(made_of)
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_node_loses_nothing_and_sends_nothing_twice(
    node: Node, archive: Archive, tmp_path: Path
) -> None:
    """The whole tree, at random moments between the first byte and the last delivery."""
    warm_up = sorted(write_series(ct_series(SLICES, 64, 64, seed=1000), tmp_path / "warm"))
    began = time.monotonic()
    assert Sender(warm_up, node.port).run() is None
    node.wait_settled(series_uid(warm_up))
    whole_run = time.monotonic() - began

    seed = random.SystemRandom().randrange(10**6)
    moments = random.Random(seed)
    for number in range(KILLS):
        files = sorted(write_series(ct_series(SLICES, 64, 64, seed=number), tmp_path / "source"))
        sources = source_instances(files)
        moment = moments.uniform(0.0, whole_run)
        print(f"kill {number} of seed {seed} after {moment:.2f} s of {whole_run:.2f} s")
        sender = Sender(files, node.port)
        sender.start()
        time.sleep(moment)  # the moment is the experiment, not a wait for a result
        node.kill()
        acknowledged = sender.acknowledged()
        node.start()
        assert acknowledged <= stored(node)
        assert send(STORESCU, files, node.port).returncode == 0  # every sender tries again
        settled = node.wait_settled(series_uid(files))
        assert [job["state"] for job in settled["jobs"]] == ["done"], settled
        made_of = derived_of(archive, sources, tmp_path / f"derived{number}")
        assert made_of == [sorted(sources)]
    assert archive.count() == SLICES * (KILLS + 1)


def test_a_killed_worker_costs_one_attempt_and_not_the_node(
    node: Node, archive: Archive, tmp_path: Path
) -> None:
    files = sorted(write_series(ct_series(SLICES, 256, 256, seed=5), tmp_path / "source"))
    assert send(STORESCU, files, node.port).returncode == 0
    uid = series_uid(files)

    def translating() -> bool:
        jobs = node.get(f"api/v1/series/{uid}")[1]["jobs"]
        return any(job["state"] == "translating" for job in jobs)

    wait_for(translating, "the translation to begin")
    node.kill_one(next(pid for what, pid in node.children() if what == "worker"))
    settled = node.wait_settled(uid)
    assert [(job["state"], job["attempts"]) for job in settled["jobs"]] == [("done", 2)]
    assert archive.count() == SLICES


def test_sigterm_drains_and_the_rest_goes_on_after_the_start(
    node: Node, archive: Archive, tmp_path: Path
) -> None:
    """A stop in the middle of a transfer takes what is under way and exits with 0."""
    files = sorted(write_series(ct_series(SLICES, 128, 128, seed=6), tmp_path / "source"))
    sender = Sender(files, node.port)
    sender.start()
    wait_for(lambda: len(stored(node)) > 2, "the transfer to begin")
    assert node.stop() == 0
    assert len(sender.acknowledged()) == SLICES
    node.start()
    settled = node.wait_settled(series_uid(files))
    assert [job["state"] for job in settled["jobs"]] == ["done"]
    assert archive.count() == SLICES
