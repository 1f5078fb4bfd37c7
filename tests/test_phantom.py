"""The generated chest is a CT series that scanners could have made, and nobody's."""

import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.imaging.anatomy import chest
from dicomnode.imaging.marks import is_synthetic
from dicomnode.imaging.phantom import phantom_heights, phantom_series, phantom_volume
from dicomnode.imaging.phantoms import early_pet, thigh_ct, thigh_mr
from dicomnode.imaging.units import Unit
from dicomnode.imaging.volume import volume_from_datasets
from tests import judges


@pytest.fixture(scope="module")
def clean() -> NDArray[np.float32]:
    return phantom_volume(3, photons=math.inf)


@pytest.fixture(scope="module")
def series() -> list[Dataset]:
    return phantom_series(3)


def test_the_same_seed_gives_the_same_bytes(series: list[Dataset]) -> None:
    again = phantom_series(3)
    assert again == series


def test_another_seed_gives_another_patient_study_and_image(series: list[Dataset]) -> None:
    other = phantom_series(1, seed=2)[0]
    for keyword in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        assert other[keyword].value != series[0][keyword].value
    vessels = [phantom_volume(1, seed, photons=math.inf) > -500 for seed in (1, 2)]
    assert (vessels[0] != vessels[1]).sum() > 500


def test_fresh_uids_give_a_new_study_each_time() -> None:
    studies = {
        phantom_series(1, photons=math.inf, fresh_uids=True)[0].StudyInstanceUID for _ in range(2)
    }
    assert len(studies) == 2


def test_tissues_have_the_hu_of_a_chest(clean: NDArray[np.float32]) -> None:
    size = clean[0].size
    share = {
        "air": np.mean(clean == -1000),
        "lung": np.mean((clean > -950) & (clean < -750)),
        "fat": np.mean((clean > -130) & (clean < -70)),
        "soft": np.mean((clean > 20) & (clean < 90)),
        "bone": np.mean(clean > 150),
    }
    assert 0.2 < share["air"] < 0.6, share
    assert 0.08 < share["lung"] < 0.3, share
    assert 0.03 < share["fat"] < 0.2, share
    assert 0.08 < share["soft"] < 0.3, share
    assert 0.004 < share["bone"] < 0.05, share
    assert clean.max() > 500
    assert size == 512 * 512


def test_the_liver_dome_is_right_and_the_heart_left() -> None:
    image = chest([-30.0], 128, 2.8, seed=1)[0]
    soft = np.abs(image - 55) < 30
    right, left = soft[40:80, 20:56].mean(), soft[40:80, 72:108].mean()
    assert right > left + 0.15  # columns run to the patient's left: the liver lies in low columns


def test_low_dose_noise_is_strong_and_without_bias(clean: NDArray[np.float32]) -> None:
    noise = phantom_volume(3) - clean
    soft = (clean > 20) & (clean < 90)
    assert 35 < noise[soft].std() < 65
    assert abs(noise[soft].mean()) < 1.5


def test_the_series_reads_back_as_the_volume_it_shows(series: list[Dataset]) -> None:
    volume, ordered = volume_from_datasets(series)
    assert np.array_equal(volume.voxels, phantom_volume(3))
    assert np.allclose(volume.spacing_mm, (2.5, 0.7, 0.7))
    assert [d.ImagePositionPatient[2] for d in ordered] == phantom_heights(3)


def test_the_shipped_route_would_take_the_phantom(series: list[Dataset]) -> None:
    for dataset in series:
        assert (dataset.Modality, dataset.BodyPartExamined) == ("CT", "CHEST")
        assert "ContrastBolusAgent" not in dataset
        assert dataset.SliceThickness <= 3
        assert not is_synthetic(dataset)


@pytest.mark.peers
def test_foreign_validators_find_nothing(series: list[Dataset], tmp_path: Path) -> None:
    judges.require(judges.DCIODVFY, judges.DCENTVFY)
    files = []
    for number, dataset in enumerate(series):
        files.append(tmp_path / f"{number}.dcm")
        dataset.save_as(files[-1], enforce_file_format=True)
    assert judges.dciodvfy(files) == set()
    assert judges.entity_findings([], files) == []


@pytest.mark.parametrize("drawn", [thigh_ct, thigh_mr, early_pet])
def test_further_phantoms_are_valid_and_made_again_from_their_seed(
    drawn: Callable[[int], list[Dataset]], tmp_path: Path
) -> None:
    series, again, other = drawn(1), drawn(1), drawn(2)
    assert [one.PixelData for one in series] == [one.PixelData for one in again]
    assert series[5].SOPInstanceUID == again[5].SOPInstanceUID != other[5].SOPInstanceUID
    assert len({one.SOPInstanceUID for one in series}) == len(series)
    units: dict[str, Unit] = {"CT": "HU", "MR": "AU", "PT": "SUV"}
    unit = units[series[0].Modality]
    volume, _ = volume_from_datasets(series, unit)
    assert 0.1 < (volume.voxels > 0.15 if unit == "SUV" else volume.voxels > 30).mean() < 0.6
    if not Path("/usr/bin/dciodvfy").exists():
        pytest.skip("dicom3tools is not installed")
    series[7].save_as(tmp_path / "one.dcm", enforce_file_format=True)
    said = subprocess.run(
        ["/usr/bin/dciodvfy", str(tmp_path / "one.dcm")],
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    assert "Error" not in said
