"""The judges find what is planted beside the ten of judge_selftest.py."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread

from tests.factories import ct_series, write_series
from tests.judges import (
    DCENTVFY,
    DCIODVFY,
    DCMDUMP,
    DCMPSCHK,
    DSRDUMP,
    every_verdict,
    files_in,
    in_slice_order,
    judge,
    require,
)
from tests.tasks import KINDS, make_all
from tests.test_derived import derive

HANGUL = "\\ISO 2022 IR 149"


def _all_moved(ds: Dataset) -> None:
    x, y, z = ds.ImagePositionPatient
    ds.ImagePositionPatient = [x, float(y) + 5, z]


def _steeper(ds: Dataset) -> None:
    ds.RescaleSlope = 1.01


def _unmarked(ds: Dataset) -> None:
    del ds.SyntheticData


def _same_uid(ds: Dataset) -> None:
    ds.SOPInstanceUID = ds.SourceImageSequence[0].ReferencedSOPInstanceUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID


FAULTS: list[tuple[Callable[[Dataset], None], bool, set[str]]] = [
    # fault, in every slice or in the middle one only, judges that must see it
    (_all_moved, True, {"SimpleITK grid", "contract"}),
    (_steeper, True, {"values"}),
    (_unmarked, False, {"contract"}),
    (_same_uid, False, {"contract"}),
]


@pytest.mark.parametrize(
    ("fault", "everywhere", "seen_by"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS]
)
def test_a_planted_fault_is_found(
    fault: Callable[[Dataset], None], everywhere: bool, seen_by: set[str], tmp_path: Path
) -> None:
    require(DCIODVFY, DCENTVFY, DCMDUMP)
    series = ct_series(3, character_set=HANGUL)
    _, prediction, derived = derive(series, 0.25)
    source = write_series(series, tmp_path / "source")
    paths = write_series(derived, tmp_path / "derived")
    assert judge(source, paths, prediction.voxels) == {}
    for path in paths if everywhere else paths[1:2]:
        ds = dcmread(path)
        fault(ds)
        ds.save_as(path)
    assert seen_by <= judge(source, paths, prediction.voxels).keys()


def test_a_value_off_by_more_than_half_a_quantum_is_found_by_place(tmp_path: Path) -> None:
    require(DCIODVFY, DCENTVFY, DCMDUMP)
    series = ct_series(3)
    _, prediction, derived = derive(series)
    expected = prediction.voxels.copy()
    expected[2, 4, 5] += 0.6
    source = write_series(series, tmp_path / "source")
    paths = write_series(derived, tmp_path / "derived")
    assert list(judge(source, paths, expected)) == ["values"]
    native = np.ones(expected.shape, bool)
    native[2, 4, 5] = False
    assert judge(source, paths, expected, native) == {}


def _other_patient(ds: Dataset) -> None:
    ds.PatientName = "Somebody^Else"


def _other_image(ds: Dataset) -> None:
    next(e for e in ds.iterall() if e.keyword == "ReferencedSOPInstanceUID").value = "1.2.3"


def _not_marked(ds: Dataset) -> None:
    del ds.SyntheticData


def _no_digest(ds: Dataset) -> None:
    for item in ds.iterall():
        if item.keyword == "TextValue" and "sha256" in item.value:
            item.value = "sha256=0"


def _no_creation_date(ds: Dataset) -> None:
    del ds.PresentationCreationDate


COMPANION_FAULTS: list[tuple[Callable[[Dataset], None], str, set[str]]] = [
    (_other_patient, "PR", {"dcentvfy", "dcmtk text", "companions"}),
    (_other_image, "SR", {"companions"}),
    (_not_marked, "SR", {"companions"}),
    (_no_digest, "SR", {"dsrdump"}),
    (_no_creation_date, "PR", {"dcmpschk"}),
]


def test_a_fault_planted_in_a_companion_is_found(tmp_path: Path) -> None:
    require(DCIODVFY, DCENTVFY, DCMDUMP, DCMPSCHK, DSRDUMP)
    source, derived, beside = make_all(KINDS["ce_ct"], ct_series(2), tmp_path)
    files = files_in(source), in_slice_order(derived.glob("*.dcm"))
    for fault, modality, seen_by in COMPANION_FAULTS:
        planted = [dcmread(path) for path in files_in(beside)]
        for ds in planted:
            if ds.Modality == modality:
                fault(ds)
        paths = write_series(planted, tmp_path / fault.__name__)
        found = {v.name for v in every_verdict(*files, paths) if v.findings}
        assert seen_by <= found, fault.__name__
