"""Foreign programs read every output type as it was meant (derived.md 6, 1 to 4 and 13)."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydicom import dcmread

from tests.factories import ct_series, write_series
from tests.judge_dicom import judge_folders
from tests.judge_selftest import FAULTS, self_test
from tests.judges import (
    DCENTVFY,
    DCIODVFY,
    DCM2NIIX,
    DCMDUMP,
    DCMPSCHK,
    DSRDUMP,
    NODE,
    SUV_PACKAGE,
    dciodvfy,
    entity_findings,
    files_in,
    judge,
    require,
)
from tests.peers import ORTHANC, ROOT, STORESCU, needs, orthanc, send
from tests.tasks import KINDS, SOURCES, ge_pet, make_all, make_series
from tests.test_derived import as_task, derive

HANGUL = "\\ISO 2022 IR 149"
KOREAN = "Hong^Gildong=洪^吉洞=홍^길동"


@pytest.mark.parametrize("task", KINDS)
def test_every_judge_accepts_every_output_type(task: str, tmp_path: Path) -> None:
    require(DCIODVFY, DCENTVFY, DCMDUMP, DCM2NIIX, DCMPSCHK, DSRDUMP)
    require(*([NODE, SUV_PACKAGE] if "pet" in task else []))
    source, derived, companions = make_all(KINDS[task], SOURCES[task](), tmp_path)
    code, text = judge_folders(source, derived, [companions])
    assert code == 0, text
    names = [line.split(":")[0] for line in text.splitlines()]
    expected = "dciodvfy,dcentvfy,dcmtk text,dcm2pnm,SimpleITK grid,values,dcm2niix grid,contract"
    assert names[:8] == [f"PASS {name}" for name in expected.split(",")]
    assert {"PASS dcmpschk", "PASS dsrdump", "PASS companions"} <= set(names)
    assert names[-1] == "JUDGES ALL PASS"
    assert ("PASS SUV factor" in names) == ("pet" in task)
    assert dciodvfy([*derived.glob("*.dcm"), *companions.glob("*.dcm")]) == set()


def test_the_judges_run_as_a_command_and_say_what_they_find(tmp_path: Path) -> None:
    require(DCIODVFY, DCENTVFY, DCMDUMP)
    source, derived = make_series(KINDS["ce_ct"], SOURCES["ce_ct"](), tmp_path)
    ds = dcmread(derived / "0002.dcm")
    ds.ContrastBolusAgent = "Iomeprol"
    ds.save_as(derived / "0002.dcm")
    done = subprocess.run(
        [sys.executable, "tests/judge_dicom.py", str(source), str(derived)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert "FAIL contract" in done.stdout
    assert done.stdout.splitlines()[-1] == "JUDGES FAIL: contract"


def test_the_judges_catch_ten_planted_faults() -> None:
    require(DCIODVFY, DCENTVFY, DCMDUMP)
    caught, lines = self_test()
    assert caught == len(FAULTS) == 10, lines


@pytest.mark.parametrize("character_set", [HANGUL, "ISO_IR 192", "ISO_IR 100"])
@pytest.mark.parametrize("task", ["ce_ct", "syn_mr"])
def test_patients_and_studies_are_the_same_to_dcentvfy_and_dcmtk(
    task: str, character_set: str, tmp_path: Path
) -> None:
    require(DCENTVFY, DCMDUMP)
    series = ct_series(3, character_set=character_set)
    source, derived = make_series(KINDS[task], series, tmp_path)
    files = files_in(source), sorted(derived.glob("*.dcm"))
    assert entity_findings(*files) == []
    if character_set != "ISO_IR 100":
        for path in [*files[0], *files[1]]:
            command = [str(DCMDUMP), "-q", "+U8", "+P", "PatientName", str(path)]
            assert f"[{KOREAN}]" in subprocess.check_output(command, text=True)


@pytest.mark.peers
@needs(STORESCU, ORTHANC)
def test_orthanc_keeps_every_instance_as_sent_and_nothing_twice(tmp_path: Path) -> None:
    sent: dict[str, Path] = {}
    for task in KINDS:
        for folder in make_all(KINDS[task], SOURCES[task](), tmp_path / task):
            for path in folder.glob("*.dcm"):
                sent[str(dcmread(path, stop_before_pixels=True).SOPInstanceUID)] = path
    with orthanc(tmp_path / "orthanc") as archive:
        for _ in range(2):
            done = send(STORESCU, list(sent.values()), archive.port)
            assert done.returncode == 0, done.stderr
            assert archive.count() == len(sent)
        found = [
            path
            for key in archive.get("series")
            for path in archive.fetch(archive.get(f"series/{key}"), tmp_path / "back")
        ]
        assert len(found) == len(sent)
        for path in found:
            ds = dcmread(path)
            original = dcmread(sent[ds.SOPInstanceUID])
            original.pop("DataSetTrailingPadding", None)  # of MR_small; nobody need keep it
            assert ds == original


@pytest.mark.parametrize(
    ("folder", "task"),
    [
        ("mr/brain_FLAIR_REMBRANDT_HF0990", "syn_ct"),
        ("ct/brain_gantry_tilt_18.5deg_GE", "syn_mr"),
        ("ct/noncontrast_chest_RICORD-1A-001012_jpeglossless", "ce_ct"),
        ("pet/fdg_wholebody_STS_001_GE_BQML", "delayed_pet"),
        ("paired_mr_ct_pet/STS_003/PET", "delayed_pet"),
        ("paired_mr_ct_pet/STS_003/MR_T1", "syn_ct"),
    ],
)
def test_every_judge_accepts_what_is_made_of_real_series(
    folder: str, task: str, real_dicom: Path, tmp_path: Path
) -> None:
    require(DCIODVFY, DCENTVFY, DCMDUMP)
    files = [p for p in (real_dicom / folder).rglob("*") if p.is_file() and p.suffix != ".md"]
    series = sorted(map(dcmread, files), key=lambda ds: float(ds.ImagePositionPatient[2]))
    source, derived, companions = make_all(KINDS[task], series[10:13], tmp_path)
    code, text = judge_folders(source, derived, [companions])
    assert code == 0, text


def test_a_shuffled_series_is_judged_like_an_ordered_one(tmp_path: Path) -> None:
    require(DCIODVFY, DCENTVFY, DCMDUMP)
    series = ge_pet(4)
    _, prediction, derived = derive(
        [series[2], series[0], series[3], series[1]],
        3.0,
        as_task("delayed_pet"),
        unit="BQML",
        to="BQML",
    )
    source = write_series(series, tmp_path / "source")
    paths = write_series(derived, tmp_path / "derived")
    assert judge(source, paths, prediction.voxels) == {}
