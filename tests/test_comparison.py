"""The judge of the demo sees every way in which a derived series can be wrong."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.uid import CTImageStorage, generate_uid

from dicomnode.comparison import compare, write_picture
from dicomnode.errors import DicomNodeError
from tests.factories import ct_series, mr_series, pet_series

SLICES = 4


@pytest.fixture
def source() -> list[Dataset]:
    return ct_series(SLICES, 64, 64)


@pytest.fixture
def derived(source: list[Dataset]) -> list[Dataset]:
    """What a node that adds 10 stored units would give back, in another order."""
    series_uid, results = generate_uid(), []
    for original in source:
        result = copy.deepcopy(original)
        item = Dataset()
        item.ReferencedSOPInstanceUID = original.SOPInstanceUID
        result.SourceImageSequence = [item]
        result.SOPInstanceUID = generate_uid()
        result.SeriesInstanceUID = series_uid
        result.SyntheticData = "YES"
        result.SoftwareVersions = ["0.1.0", "add-ten 1.0.0"]
        pixels = original.pixel_array + 10
        result.PixelData = pixels.astype(original.pixel_array.dtype).tobytes()
        results.append(result)
    return results[::-1]


def test_what_was_added_is_what_is_measured(source: list[Dataset], derived: list[Dataset]) -> None:
    comparison = compare(source, derived)
    slope = float(source[0].RescaleSlope)
    assert comparison.mean_change == pytest.approx(10 * slope)
    assert comparison.mean_absolute_change == pytest.approx(10 * slope)
    assert comparison.noise_before_hu == pytest.approx(comparison.noise_after_hu)
    assert comparison.noise_before_hu > 0
    assert comparison.model == "add-ten 1.0.0"


def _lose_one(derived: list[Dataset]) -> None:
    derived.pop()


def _split(derived: list[Dataset]) -> None:
    derived[0].SeriesInstanceUID = generate_uid()


def _move_study(derived: list[Dataset]) -> None:
    for dataset in derived:
        dataset.StudyInstanceUID = generate_uid()


def _unmark(derived: list[Dataset]) -> None:
    del derived[1].SyntheticData


def _shift(derived: list[Dataset]) -> None:
    for dataset in derived:
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x + 1, y, z]


def _swap_sources(derived: list[Dataset]) -> None:
    first, second = derived[:2]
    first.SourceImageSequence, second.SourceImageSequence = (
        second.SourceImageSequence,
        first.SourceImageSequence,
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_lose_one, "4 instances sent, 3 derived"),
        (_split, "not one new series"),
        (_move_study, "not in the study"),
        (_unmark, "Synthetic Data"),
        (_shift, "another geometry"),
        (_swap_sources, "does not name"),
    ],
)
def test_a_wrong_derived_series_is_named(
    source: list[Dataset],
    derived: list[Dataset],
    spoil: Callable[[list[Dataset]], None],
    words: str,
) -> None:
    spoil(derived)
    with pytest.raises(DicomNodeError, match=words):
        compare(source, derived)


def test_the_source_itself_is_not_a_derived_series(source: list[Dataset]) -> None:
    with pytest.raises(DicomNodeError, match="not one new series"):
        compare(source, source)


def test_the_picture_shows_three_panels_and_marks_the_result(
    source: list[Dataset], derived: list[Dataset], tmp_path: Path
) -> None:
    write_picture(compare(source, derived), tmp_path / "picture.png")
    pixels = np.asarray(Image.open(tmp_path / "picture.png")).astype(int)
    amber = (np.abs(pixels - (255, 190, 60)) < 30).all(axis=2)
    thirds = [third.sum() for third in np.array_split(amber, 3, axis=1)]
    assert amber[:30].sum() > 100  # the heading
    assert amber[58:].sum() > 100  # on the image itself
    assert thirds[0] == thirds[2] == 0
    middle = pixels[pixels.shape[0] // 3]
    assert len(np.unique(middle[: middle.shape[0] // 3, 0])) > 5  # an image, not a blank


def _made_of(original: Dataset, series_uid: str, **attributes: object) -> Dataset:
    result = copy.deepcopy(original)
    item = Dataset()
    item.ReferencedSOPInstanceUID = original.SOPInstanceUID
    result.SourceImageSequence = [item]
    result.SOPInstanceUID, result.SeriesInstanceUID = generate_uid(), series_uid
    result.SyntheticData, result.SoftwareVersions = "YES", ["0.1.0", "made 1.0.0"]
    for keyword, value in attributes.items():
        setattr(result, keyword, value)
    return result


def test_ct_of_mr_has_no_difference_but_is_shown_in_turn(tmp_path: Path) -> None:
    mr, uid = mr_series(SLICES, 64, 64), generate_uid()
    slope = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
    ct = [_made_of(one, uid, Modality="CT", SOPClassUID=CTImageStorage, **slope) for one in mr]
    comparison = compare(mr, ct)
    assert np.isnan(comparison.mean_change)
    assert "went from AU to HU" in comparison.sentences()[-1]
    write_picture(comparison, tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").width > 1000


def test_pet_is_compared_in_suv() -> None:
    pet, uid = pet_series(SLICES, 32, 32), generate_uid()
    doubled = [_made_of(one, uid, RescaleSlope=str(2 * float(one.RescaleSlope))) for one in pet]
    comparison = compare(pet, doubled)
    assert comparison.source.unit == "SUV"
    before = comparison.source.voxels
    assert comparison.mean_change == pytest.approx(before[before > 0.2].mean(), rel=1e-4)
    assert "in the body the SUV changed by" in comparison.sentences()[-1]
