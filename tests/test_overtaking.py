"""The whole node: what overtakes, what is inferred ahead, a codec that crashes the worker."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom import Dataset
from pydicom.uid import JPEGLSLossless

from dicomnode.imaging.manifest import GeneratorSpec, Tiling
from tests.factories import changed, ct_series, write_series
from tests.peers import (
    STORESCP,
    STORESCU,
    Archive,
    Node,
    identity_package,
    needs,
    node_settings,
    running_node,
    send,
    storescp,
    wait_for,
)
from tests.test_package import DENOISER, write

pytestmark = [pytest.mark.network, pytest.mark.peers, needs(STORESCU, STORESCP)]


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with storescp(tmp_path / "dcmtk") as peer:
        yield peer


def written(datasets: list[Dataset], folder: Path) -> tuple[str, list[Path]]:
    return str(datasets[0].SeriesInstanceUID), sorted(write_series(datasets, folder))


def metric(node: Node, name: str) -> float:
    """The sum over all labels."""
    lines = node.get("metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.mark.slow
def test_a_stat_series_is_sent_before_a_routine_one_that_began_first(
    archive: Archive, tmp_path: Path
) -> None:
    options = {"width": 64, "blocks": 8}
    generator = GeneratorSpec("residual_denoiser", options)
    write(
        tmp_path / "models" / "slow",
        replace(DENOISER, name="slow", generator=generator, tiling=Tiling()),
    )
    settings = node_settings(tmp_path / "models", [archive], model="slow")
    (routine,) = settings["routes"]
    stat = {**routine, "name": "stat", "match": {"BodyPartExamined": "HEAD"}, "priority": "stat"}
    settings["routes"] = [{**stat, "final": True, "qa": "off"}, {**routine, "qa": "off"}]
    settings["worker"] = {"speculative": False}
    long, files = written(ct_series(100, 192, 192, seed=1), tmp_path / "long")
    short, urgent = written(
        changed(ct_series(3, 192, 192, seed=2), BodyPartExamined="HEAD"), tmp_path / "short"
    )
    with running_node(tmp_path / "node", settings) as node:
        assert send(STORESCU, files, node.port).returncode == 0

        def translating() -> bool:
            jobs = node.get(f"api/v1/series/{long}")[1]["jobs"]
            return any(job["state"] == "translating" for job in jobs)

        wait_for(translating, "the long job to begin")
        assert send(STORESCU, urgent, node.port).returncode == 0
        done = node.wait_settled(short)
        assert [job["state"] for job in done["jobs"]] == ["done"]
        assert translating()  # still: it waited between two batches
        settled = node.wait_settled(long, 200)
        assert [(job["state"], job["attempts"]) for job in settled["jobs"]] == [("done", 1)]
    assert archive.count() == 103


def test_slices_are_inferred_while_their_series_arrives_and_nothing_is_sent_before_it_is_whole(
    archive: Archive, tmp_path: Path
) -> None:
    """Two associations; between them the worker has all the time it wants."""
    write(tmp_path / "models" / "m", replace(DENOISER, name="m"))
    settings = node_settings(
        tmp_path / "models", [archive], model="m", quiet_seconds=30, quiet_seconds_if_released=3
    )
    settings["routes"][0]["qa"] = "off"
    uid, files = written(ct_series(11, 64, 70), tmp_path / "in")
    with running_node(tmp_path / "node", settings) as node:
        wait_for(lambda: node.get("readyz")[0] == 200, "the model to be loaded", 120)
        assert send(STORESCU, files[:4] + files[6:], node.port).returncode == 0
        assert archive.count() == 0  # with its gap it stays open
        assert send(STORESCU, files[4:6], node.port).returncode == 0
        settled = node.wait_settled(uid)
        assert [job["state"] for job in settled["jobs"]] == ["done"]
        assert archive.count() == 11
        assert 0 < metric(node, "dicomnode_slices_ahead_total") <= 11


CRASHING = """
import ctypes, importlib.util, os, sys
from importlib.machinery import PathFinder
from pathlib import Path

here = os.path.dirname(__file__)
spec = PathFinder.find_spec("jpeg_ls", [folder for folder in sys.path if folder != here])
real = importlib.util.module_from_spec(spec)
sys.modules["jpeg_ls"] = real
spec.loader.exec_module(real)
left, decode = Path({left!r}), real.decode_pixel_data

def crash(*args, **more):
    count = int(left.read_text())
    if count:
        left.write_text(str(count - 1))
        ctypes.string_at(0)  # a segmentation fault
    return decode(*args, **more)

real.decode_pixel_data = crash
"""
"""In the place of the JPEG-LS codec: it ends its process as often as a file says."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("speculative", "crashes", "attempts"),
    [(False, 1, 2), (True, 1, 1), (True, 2, 2)],
    ids=["in the job", "ahead of the job", "in both"],
)
def test_a_codec_that_crashes_costs_an_attempt_and_not_the_node(
    speculative: bool,
    crashes: int,
    attempts: int,
    archive: Archive,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant, left = tmp_path / "plant", tmp_path / "left"
    plant.mkdir()
    left.write_text(str(crashes))
    (plant / "jpeg_ls.py").write_text(CRASHING.format(left=str(left)))
    monkeypatch.setenv("PYTHONPATH", f"{plant}:{os.environ.get('PYTHONPATH', '')}")
    identity_package(tmp_path / "models")
    settings = node_settings(
        tmp_path / "models", [archive], quiet_seconds=60, quiet_seconds_if_released=6
    )
    settings["worker"] = {"speculative": speculative}
    uid, files = written(ct_series(5, 64, 70, syntax=JPEGLSLossless), tmp_path / "in")
    with running_node(tmp_path / "node", settings) as node:
        pid = node.pid
        wait_for(lambda: node.get("readyz")[0] == 200, "the model to be loaded", 120)
        assert send(STORESCU, files, node.port, "CT1", "-xt").returncode == 0
        settled = node.wait_settled(uid, 120)
        assert [(job["state"], job["attempts"]) for job in settled["jobs"]] == [("done", attempts)]
        assert metric(node, "dicomnode_workers_lost_total") == crashes
        assert node.pid == pid
        assert left.read_text() == "0"
        assert list((node.folder / "data" / "results").glob(".draft-*")) == []
    assert archive.count() == 5
