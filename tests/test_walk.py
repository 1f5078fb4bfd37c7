"""The main job, from outside: DCMTK sends, the node translates, Orthanc and DCMTK receive.

Every test runs `dicomnode serve` as a process and talks to it over the network only.
"""

import json
import random
import subprocess
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread

from tests import judges
from tests.factories import ct_series, localizer, write_series
from tests.peers import (
    DCMSEND,
    ECHOSCU,
    ORTHANC,
    STORESCP,
    STORESCU,
    Archive,
    Node,
    node_settings,
    orthanc,
    running_node,
    send,
    storescp,
    wait_for,
)

pytestmark = [pytest.mark.network, pytest.mark.peers]
if missing := [p for p in (STORESCU, DCMSEND, STORESCP, ORTHANC) if not Path(p).exists()]:
    pytest.skip(f"not installed: {', '.join(missing)}", allow_module_level=True)

LIDC = "ct/chest_contrast_LIDC-IDRI-0001_jpegls"
RICORD = "ct/noncontrast_chest_RICORD-1A-001012_jpeglossless"


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with orthanc(tmp_path / "orthanc") as peer:
        yield peer


@pytest.fixture
def files_peer(tmp_path: Path) -> Iterator[Archive]:
    with storescp(tmp_path / "dcmtk") as peer:
        yield peer


def series_uid(files: list[Path]) -> str:
    return str(dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)


def source_instances(files: list[Path]) -> set[str]:
    return {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in files}


def translated_sources(derived: list[Path]) -> list[str]:
    """Which source instance each derived file says it was made from."""
    return sorted(
        str(dcmread(p, stop_before_pixels=True).SourceImageSequence[0].ReferencedSOPInstanceUID)
        for p in derived
    )


def voxels_by_source(files: list[Path]) -> dict[str, str]:
    """A digest of the HU of each instance, under the SOP Instance UID of its source."""
    found = {}
    for dataset in map(dcmread, files):
        sources = dataset.get("SourceImageSequence")
        uid = sources[0].ReferencedSOPInstanceUID if sources else dataset.SOPInstanceUID
        slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
        hu = dataset.pixel_array.astype("float64") * slope + intercept
        found[str(uid)] = sha256(hu.tobytes()).hexdigest()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "program", "options"),
    [
        (LIDC, STORESCU, ("-xt",)),
        (LIDC, DCMSEND, ()),
        (RICORD, STORESCU, ("-xs",)),
        (RICORD, DCMSEND, ()),
    ],
    ids=["jpegls-storescu", "jpegls-dcmsend", "jpegll-storescu", "jpegll-dcmsend"],
)
def test_a_compressed_series_comes_back_once_at_every_destination(
    folder: str,
    program: str,
    options: tuple[str, ...],
    tmp_path: Path,
    models_dir: Path,
    real_dicom: Path,
    archive: Archive,
    files_peer: Archive,
) -> None:
    source = sorted((real_dicom / folder).glob("*.dcm"))
    settings = node_settings(models_dir, [archive, files_peer])
    with running_node(tmp_path / "node", settings) as node:
        sent = send(program, source, node.port, "CT1", *options)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        settled = node.wait_settled(series_uid(source), 200)
        assert [job["state"] for job in settled["jobs"]] == ["done"]

        (derived_series,) = archive.derived_series()
        derived = archive.fetch(derived_series, tmp_path / "derived")
        assert translated_sources(derived) == sorted(source_instances(source))
        assert archive.count() == files_peer.count() == len(source)
        studies = {dcmread(p, stop_before_pixels=True).StudyInstanceUID for p in source + derived}
        assert len(studies) == 1
        assert judges.entity_findings(source, derived) == []
        assert judges.iod_findings(source[:5], derived[:5]) == []
        assert judges.grid_findings(source, derived) == []
        assert judges.contract_findings(source, derived) == []
        assert voxels_by_source(derived) == voxels_by_source(source)  # the identity model

        assert send(program, source, node.port, "CT1", *options).returncode == 0
        node.wait_settled(series_uid(source), 60)
        assert archive.count() == len(source)
        assert len(node.status(series_uid(source))["jobs"]) == 1


@pytest.fixture
def both(tmp_path: Path, models_dir: Path, archive: Archive) -> Iterator[tuple[Node, Archive]]:
    """A node with the identity model, and Orthanc as its destination."""
    with running_node(tmp_path / "node", node_settings(models_dir, [archive])) as node:
        yield node, archive


def written(datasets: list[Dataset], folder: Path) -> list[Path]:
    return sorted(write_series(datasets, folder))


def expect_derived(node: Node, archive: Archive, files: list[Path], folder: Path) -> None:
    """One derived series for the series of `files`, one instance for each of them."""
    settled = node.wait_settled(series_uid(files))
    assert [job["state"] for job in settled["jobs"]] == ["done"], settled
    sources = source_instances(files)
    made = []
    for series in archive.derived_series():
        derived = archive.fetch(series, folder / series["ID"])
        if set(translated_sources(derived)) & sources:
            made.append(derived)
    assert len(made) == 1
    assert translated_sources(made[0]) == sorted(sources)


def test_shuffled_instances_make_the_same_series(
    both: tuple[Node, Archive], tmp_path: Path
) -> None:
    node, archive = both
    files = written(ct_series(slices=12), tmp_path / "source")
    random.Random(7).shuffle(files)
    assert send(STORESCU, files, node.port).returncode == 0
    expect_derived(node, archive, files, tmp_path / "derived")


def test_two_interleaved_series_stay_apart(both: tuple[Node, Archive], tmp_path: Path) -> None:
    node, archive = both
    first = written(ct_series(slices=8, seed=1), tmp_path / "first")
    second = written(ct_series(slices=8, seed=2), tmp_path / "second")
    mixed = [path for pair in zip(first, second, strict=True) for path in pair]
    assert send(STORESCU, mixed, node.port).returncode == 0
    expect_derived(node, archive, first, tmp_path / "derived1")
    expect_derived(node, archive, second, tmp_path / "derived2")
    assert archive.count() == 16


def test_two_associations_for_one_series_make_one_result(
    both: tuple[Node, Archive], tmp_path: Path
) -> None:
    """Every second slice comes on the first association: its gaps keep the series open."""
    node, archive = both
    files = written(ct_series(slices=11), tmp_path / "source")
    assert send(STORESCU, files[:4] + files[6:], node.port).returncode == 0
    time.sleep(1.5)  # longer than quiet_seconds_if_released: only the gap holds it
    assert node.get(f"api/v1/series/{series_uid(files)}")[1]["open"]
    assert send(STORESCU, files[4:6], node.port).returncode == 0
    expect_derived(node, archive, files, tmp_path / "derived")
    assert archive.count() == 11


def test_what_cannot_be_translated_says_why_and_is_kept(
    both: tuple[Node, Archive], tmp_path: Path
) -> None:
    node, archive = both
    other = ct_series(slices=4, seed=3)
    for dataset in other:
        dataset.Modality = "MR"
    whole = ct_series(slices=9, seed=4)
    cases = {
        "ignored: no route matches": other,
        "LOCALIZER": [localizer(ct_series(slices=3, seed=5)[0])],
        "MISSING_SLICES": whole[:4] + whole[5:],
        "SINGLE_SLICE": ct_series(slices=1, seed=6),
    }
    sent = {}
    for reason, datasets in cases.items():
        sent[reason] = written(datasets, tmp_path / f"case{len(sent)}")
        assert send(STORESCU, sent[reason], node.port).returncode == 0
    for reason, files in sent.items():
        uid = series_uid(files)
        node.wait_settled(uid)
        assert reason in node.run("status", uid).stdout
        kept = node.folder / "data" / "received" / uid
        assert len(list(kept.glob("*.dcm"))) == len(files)
    assert archive.count() == 0


def test_the_real_odd_series_are_refused_with_a_reason(
    both: tuple[Node, Archive], real_dicom: Path
) -> None:
    node, archive = both
    cases = {
        "odd/ct_inconsistent_slice_increment_GE": "MISSING_SLICES",
        "odd/ct_same_position_bolus_monitoring": "SINGLE_SLICE",
        "mr/brain_FLAIR_REMBRANDT_HF0990": "Modality is MR, not CT",
    }
    for folder in cases:
        sent = send(DCMSEND, sorted((real_dicom / folder).glob("*.dcm")), node.port)
        assert sent.returncode == 0, sent.stderr
    for folder, reason in cases.items():
        uid = series_uid(sorted((real_dicom / folder).glob("*.dcm")))
        node.wait_settled(uid)
        assert reason in node.run("status", uid).stdout
    assert archive.count() == 0


def test_status_tells_what_runs_a_model_wherever_it_is_asked(both: tuple[Node, Archive]) -> None:
    node, _ = both
    models = node.get("api/v1/status")[1]["models"]
    one = models["identity"]
    assert one["engine"].startswith(("openvino", "torch"))
    assert (one["precision"], one["device"], one["refused"]) == ("fp32", "cpu", [])
    assert one["self_test"] == "0 HU at most, allowed 0.05"
    assert json.loads(node.run("status", "--json").stdout)["models"] == models
    assert f'engine="{one["engine"]}",model="identity"' in node.get("metrics")[1]


def test_our_own_result_is_not_translated_again(both: tuple[Node, Archive], tmp_path: Path) -> None:
    node, archive = both
    files = written(ct_series(slices=5), tmp_path / "source")
    assert send(STORESCU, files, node.port).returncode == 0
    node.wait_settled(series_uid(files))
    derived = archive.fetch(archive.derived_series()[0], tmp_path / "derived")
    assert send(STORESCU, derived, node.port).returncode == 0
    settled = node.wait_settled(series_uid(derived))
    assert settled["jobs"] == []
    assert any("ALREADY_SYNTHETIC" in event["text"] for event in settled["timeline"])
    assert archive.count() == 5


def test_a_refused_or_absent_destination_gets_everything_later(
    tmp_path: Path, models_dir: Path
) -> None:
    """First nobody listens, then every association is rejected, then all arrives, once."""
    with storescp(tmp_path / "first") as peer:
        port = peer.port
    files = written(ct_series(slices=6), tmp_path / "source")
    absent = Archive("DCMTK", port)
    with running_node(tmp_path / "node", node_settings(models_dir, [absent])) as node:
        assert send(STORESCU, files, node.port).returncode == 0

        def attempts() -> int:
            jobs = node.get(f"api/v1/series/{series_uid(files)}")[1]["jobs"]
            return sum(d["attempts"] for job in jobs for d in job["deliveries"])

        wait_for(lambda: attempts() >= 1, "an attempt at the absent destination")
        with storescp(tmp_path / "refusing", "DCMTK", port, "--refuse"):
            before = attempts()
            wait_for(lambda: attempts() > before, "an attempt at the refusing destination")
        with storescp(tmp_path / "there", "DCMTK", port) as there:
            settled = node.wait_settled(series_uid(files))
            assert there.count() == 6
    assert [job["state"] for job in settled["jobs"]] == ["done"]
    assert len(settled["jobs"]) == 1  # the translation was never repeated


def test_only_known_callers_may_send(both: tuple[Node, Archive], tmp_path: Path) -> None:
    node, _ = both
    files = written(ct_series(slices=2), tmp_path / "source")
    stranger = send(STORESCU, files, node.port, "STRANGER", "-v")
    assert stranger.returncode != 0
    assert "Calling AE Title Not Recognized" in stranger.stdout + stranger.stderr
    known = subprocess.run(
        [ECHOSCU, "-v", "-aet", "CT1", "-aec", "WRONG", "127.0.0.1", str(node.port)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Called AE Title Not Recognized" in known.stdout + known.stderr
    metrics = node.get("metrics")[1]
    assert 'associations_rejected_total{reason="calling AE title not recognised"} 1.0' in metrics
    right = subprocess.run(
        [ECHOSCU, "-aet", "CT1", "-aec", "DICOMNODE", "127.0.0.1", str(node.port)], check=False
    )
    assert right.returncode == 0


def test_the_log_names_no_patient(both: tuple[Node, Archive], tmp_path: Path) -> None:
    node, _ = both
    datasets = ct_series(slices=3)
    canaries = {
        "PatientName": "CANARY^NAME",
        "PatientID": "CANARYID",
        "AccessionNumber": "CANARYACC",
        "SeriesDescription": "CANARYDESC",
        "PatientBirthDate": "19010203",
    }
    for dataset in datasets:
        for keyword, value in canaries.items():
            setattr(dataset, keyword, value)
    files = written(datasets, tmp_path / "source")
    assert send(STORESCU, files, node.port).returncode == 0
    node.wait_settled(series_uid(files))
    told = node.log + node.run("status", series_uid(files)).stdout + str(node.get("metrics")[1])
    assert "CANARY" not in told
    assert "19010203" not in told


def test_an_identity_model_gives_back_every_hounsfield_unit(
    both: tuple[Node, Archive], tmp_path: Path
) -> None:
    """Through the network, the worker and back: DESIGN 1.6, for every kind of stored encoding."""
    node, archive = both
    encodings: list[dict[str, Any]] = [
        {"slope": "1", "intercept": "-1024", "signed": False, "bits_stored": 12},
        {"slope": "0.5", "intercept": "-1000.5", "signed": False, "bits_stored": 16},
        {"slope": "2.25", "intercept": "10", "signed": True, "bits_stored": 16},
        {"slope": "1", "intercept": "-8192", "signed": False, "bits_stored": 14},
        {"slope": "1", "intercept": "0", "signed": True, "bits_stored": 16, "padding": -2000},
    ]
    for number, encoding in enumerate(encodings):
        datasets = ct_series(slices=4, seed=50 + number, **encoding)
        files = written(datasets, tmp_path / f"source{number}")
        assert send(STORESCU, files, node.port).returncode == 0
        expect_derived(node, archive, files, tmp_path / f"derived{number}")
        derived = sorted((tmp_path / f"derived{number}").glob("*/*.dcm"))
        mine = {k: v for k, v in voxels_by_source(derived).items() if k in source_instances(files)}
        assert mine == voxels_by_source(files), encoding
