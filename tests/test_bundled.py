"""Every package in models/: it verifies, serves a series in its bounds, and refuses one outside."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from pydicom import Dataset

from dicomnode import offline
from dicomnode.config import load_config
from dicomnode.errors import SeriesRefused
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.package import read_package
from dicomnode.imaging.phantom import phantom_series
from dicomnode.imaging.phantoms import early_pet, thigh_ct, thigh_mr
from dicomnode.qa import check_headers
from tests.factories import changed, write_series

MODELS = Path("models")
NAMES = sorted(path.name for path in MODELS.iterdir() if (path / "manifest.yaml").exists())
SOURCES: dict[str, Callable[[], list[Dataset]]] = {
    "denoise": lambda: phantom_series(3),
    "ce_ct": lambda: phantom_series(3),
    "syn_ct": thigh_mr,
    "syn_mr": thigh_ct,
    "delayed_pet": early_pet,
}
OUTSIDE = {
    "denoise": {"ConvolutionKernel": "BONE"},
    "ce_ct": {"BodyPartExamined": "HEAD"},
    "syn_ct": {"BodyPartExamined": "BRAIN"},
    "syn_mr": {"BodyPartExamined": "CHEST"},
    "delayed_pet": {"AcquisitionTime": "102500"},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_package_is_whole_small_and_says_what_it_is(name: str) -> None:
    package = read_package(MODELS / name)
    model = load_model(package)  # its self-test is within tolerance
    assert model.package.name == name
    size = sum(path.stat().st_size for path in (MODELS / name).iterdir())
    assert size <= 12_000_000
    card = (MODELS / name / "MODEL_CARD.md").read_text()
    assert "must not" in card[:900] or "do not use" in card[:900]
    assert "CC BY" in package.manifest.licence


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_package_serves_a_series(name: str, tmp_path: Path) -> None:
    package = read_package(MODELS / name)
    source = SOURCES[package.manifest.task]()
    write_series(source, tmp_path / "in")
    outcomes = offline.run(
        [tmp_path / "in"], name, tmp_path / "out", load_config(Path("config.yaml"))
    )
    assert len(outcomes) == 1
    made = [pydicom.dcmread(path) for path in sorted((tmp_path / "out").rglob("*.dcm"))]
    images = [dataset for dataset in made if "PixelData" in dataset]
    assert len(images) == len(source)
    marked = f"{name} {package.manifest.dicom.remark}".strip()
    assert all(marked in image.SeriesDescription for image in images)
    assert all(image.SyntheticData == "YES" for image in images)
    if shutil.which("dciodvfy") is None:
        pytest.skip("dicom3tools is not installed: the derived images were not judged")
    image = images[len(images) // 2]
    image.save_as(tmp_path / "judged.dcm")
    said = subprocess.run(
        ["/usr/bin/dciodvfy", str(tmp_path / "judged.dcm")],
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    errors = [line for line in said.splitlines() if line.startswith("Error")]
    assert [line for line in errors if "(0x0008,0x001c)" not in line.lower()] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_package_refuses_what_is_outside_its_bounds(name: str) -> None:
    package = read_package(MODELS / name)
    task = package.manifest.task
    source = SOURCES[task]()
    check_headers(source, package)
    with pytest.raises(SeriesRefused) as refusal:
        check_headers(changed(source, **OUTSIDE[task]), package)
    assert refusal.value.code == "OUT_OF_BOUNDS"
