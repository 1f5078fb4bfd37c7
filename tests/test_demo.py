"""The demo as a user runs it: a node of its own, a result that was checked, nothing left behind."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from PIL import Image

from tests.factories import ct_series
from tests.peers import ROOT, wait_for

pytestmark = pytest.mark.network


@pytest.fixture
def hospital() -> Iterator[socket.socket]:
    """A PACS of the user's, to which the demo must not talk."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        yield listener


@pytest.fixture
def config(tmp_path: Path, models_dir: Path, hospital: socket.socket) -> Path:
    """The shipped config.yaml, with that PACS and a model that returns its input."""
    text = (ROOT / "config.yaml").read_text("utf-8")
    changes = {
        "port: 4242": f"port: {hospital.getsockname()[1]}",
        "models_dir: models": f"models_dir: {models_dir}",
        "model: ldct-denoise": "model: identity",
    }
    for shipped, ours in changes.items():
        assert text.count(shipped) == 1
        text = text.replace(shipped, ours)
    path = tmp_path / "config.yaml"
    path.write_text(text, "utf-8")
    return path


def _start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    out = config.parent / "out"
    command = [sys.executable, "-m", "dicomnode", "demo", "--config", str(config)]
    return subprocess.Popen(
        [*command, "--out", str(out), *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _node_pid(out: Path) -> int:
    found = re.search(r"'pid': (\d+)", (out / "node.log").read_text("utf-8"))
    assert found is not None
    return int(found[1])


def _is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_the_demo_shows_and_checks_a_derived_series(config: Path, hospital: socket.socket) -> None:
    demo = _start(config)
    printed, errors = demo.communicate(timeout=240)
    out = config.parent / "out"
    assert demo.returncode == 0, printed + errors
    derived = [pydicom.dcmread(path) for path in sorted((out / "derived").glob("*.dcm"))]
    assert len(derived) == len(list((out / "source").glob("*.dcm"))) == 24
    assert {(d.SyntheticData, d.SeriesNumber) for d in derived} == {("YES", 1002)}
    beside = [pydicom.dcmread(path) for path in sorted((out / "companions").glob("*.dcm"))]
    assert sorted((d.Modality, d.SeriesNumber) for d in beside) == [
        ("PR", 10020001),
        ("SR", 10020002),
    ]
    assert "came Comprehensive SR and Grayscale Softcopy Presentation State" in printed
    assert Image.open(out / "before-after.png").width > 1000
    assert "timeline" in printed
    assert "noise in soft tissue" in printed
    assert not _is_running(_node_pid(out))
    with pytest.raises(BlockingIOError):
        hospital.accept()


def test_a_series_that_no_route_takes_ends_with_the_reason(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, dataset in enumerate(ct_series(3)):
        dataset.BodyPartExamined = "FOOT"
        dataset.save_as(folder / f"{number}", enforce_file_format=True)
    demo = _start(config, "--dicom", str(folder))
    printed, errors = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert "BodyPartExamined is" in printed
    assert "demo failed: no derived series" in errors
    assert not _is_running(_node_pid(config.parent / "out"))


def test_a_model_that_was_asked_for_runs_on_a_route_of_its_own_name(
    config: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, dataset in enumerate(ct_series(3)):
        dataset.Modality = "MR"
        dataset.save_as(folder / f"{number}", enforce_file_format=True)
    demo = _start(config, "--dicom", str(folder), "--model", "identity")
    printed, _ = demo.communicate(timeout=120)
    assert "route 'identity'" in printed
    assert "low-dose chest CT" not in printed


def test_a_folder_without_dicom_is_an_error_in_plain_words(config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    demo = _start(config, "--dicom", str(tmp_path / "empty"))
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert errors.startswith("demo failed: ")
    assert "no DICOM instances" in errors


def test_a_configuration_that_is_wrong_is_named(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, dataset in enumerate(ct_series(2)):
        dataset.save_as(folder / f"{number}", enforce_file_format=True)
    damaged = tmp_path / "config.yaml"
    text = config.read_text().replace("  received_hours: ", "  kept_hours: ")
    damaged.write_text(text)
    demo = _start(damaged, "--dicom", str(folder))
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "kept_hours" in errors


def test_a_model_that_is_not_there_is_named_with_those_that_are(config: Path) -> None:
    demo = _start(config, "--model", "absent")
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "no model package absent" in errors
    assert "identity" in errors


def test_a_demo_that_is_told_to_stop_takes_its_node_along(config: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "mine", config.parent / "out"
    folder.mkdir()
    for number, dataset in enumerate(ct_series(3)):
        dataset.BodyPartExamined = "CHEST"
        dataset.save_as(folder / f"{number}", enforce_file_format=True)
    demo = _start(config, "--dicom", str(folder))
    log = out / "node.log"
    wait_for(lambda: log.exists() and "'pid'" in log.read_text("utf-8"), "the node starts")
    os.kill(demo.pid, signal.SIGTERM)
    demo.communicate(timeout=30)
    assert demo.returncode == 1
    assert not _is_running(_node_pid(out))
