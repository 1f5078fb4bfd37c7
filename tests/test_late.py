"""Late slices: the earlier result is withdrawn, the whole series made anew, never two valid ones.

The node runs as a process and Orthanc is the PACS, except where something must be broken.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread

from tests import judges
from tests.factories import changed, ct_series, write_series
from tests.peers import (
    ORTHANC,
    STORESCP,
    STORESCU,
    Archive,
    Node,
    free_port,
    needs,
    node_settings,
    orthanc,
    running_node,
    send,
    storescp,
    wait_for,
)
from tests.test_walk import series_uid

pytestmark = [pytest.mark.network, pytest.mark.peers, needs(STORESCU, STORESCP, ORTHANC)]
QUALITY = ("113001", "DCM")


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with orthanc(tmp_path / "orthanc") as peer:
        yield peer


@pytest.fixture
def both(tmp_path: Path, models_dir: Path, archive: Archive) -> Iterator[tuple[Node, Archive]]:
    """A node with all companions, and Orthanc as its destination."""
    settings = node_settings(models_dir, [archive], companions=True)
    with running_node(tmp_path / "node", settings) as node:
        yield node, archive


def jobs_of(node: Node, files: list[Path], count: int) -> list[dict[str, Any]]:
    """The jobs of a series, once there are so many and nothing more happens."""

    def settled() -> Any:
        found = node.wait_settled(series_uid(files))["jobs"]
        return found if len(found) == count else None

    jobs: list[dict[str, Any]] = wait_for(settled, f"{count} jobs", 120)
    return jobs


def everything(archive: Archive, folder: Path) -> dict[str, list[Dataset]]:
    """What the archive has, by SeriesInstanceUID, without pixels."""
    found: dict[str, list[Dataset]] = {}
    for series in archive.series():
        for path in archive.fetch(series, folder / series["ID"]):
            dataset = dcmread(path, stop_before_pixels=True)
            found.setdefault(str(dataset.SeriesInstanceUID), []).append(dataset)
    return found


def images(found: dict[str, list[Dataset]]) -> list[list[Dataset]]:
    return sorted((s for s in found.values() if s[0].Modality == "CT"), key=len)


def companions_of(found: dict[str, list[Dataset]], derived: list[Dataset]) -> list[Dataset]:
    """The presentation states and reports that refer to a derived series."""
    uid = derived[0].SeriesInstanceUID
    others = [ds for series in found.values() for ds in series if ds.Modality in ("PR", "SR")]
    return [ds for ds in others if uid in str(ds)]


def withdrawals(found: dict[str, list[Dataset]]) -> list[Dataset]:
    return [ds for series in found.values() for ds in series if ds.Modality == "KO"]


def referenced(note: Dataset) -> set[str]:
    """SOP Instance UIDs that a Key Object Selection refers to, in content and evidence alike."""
    content = {
        str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        for item in note.ContentSequence
        if "ReferencedSOPSequence" in item
    }
    evidence = {
        str(item.ReferencedSOPInstanceUID)
        for study in note.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert content == evidence
    return content


def uids(datasets: list[Dataset]) -> set[str]:
    return {str(ds.SOPInstanceUID) for ds in datasets}


def test_late_slices_withdraw_the_earlier_result_and_make_a_new_one(
    both: tuple[Node, Archive], tmp_path: Path
) -> None:
    node, archive = both
    files = sorted(write_series(ct_series(20, 32, 32), tmp_path / "source"))
    assert send(STORESCU, files[:17], node.port).returncode == 0
    jobs_of(node, files, 1)
    before = everything(archive, tmp_path / "a")
    (old,) = images(before)
    assert len(old) == 17

    assert send(STORESCU, files[17:19], node.port).returncode == 0
    jobs = jobs_of(node, files, 3)
    assert [job["state"] for job in jobs] == ["superseded", "done", "done"]
    assert sorted((job["generation"], job["retracts"]) for job in jobs if job["retracts"]) == [
        (2, jobs[0]["id"])
    ]
    after = everything(archive, tmp_path / "b")
    (note,) = withdrawals(after)
    assert referenced(note) == uids(old) | uids(companions_of(before, old))
    assert len(referenced(note)) == 17 + 2
    title = note.ConceptNameCodeSequence[0]
    assert (title.CodeValue, title.CodingSchemeDesignator) == QUALITY
    same, new = images(after)
    assert (uids(same), len(new)) == (uids(old), 19)
    assert not uids(new) & uids(old)
    assert new[0].SeriesInstanceUID != old[0].SeriesInstanceUID
    path = archive.fetch(
        next(s for s in archive.series() if s["MainDicomTags"]["Modality"] == "KO"), tmp_path / "ko"
    )
    assert judges.iod_findings(files[:1], path) == []

    assert send(STORESCU, files[19:], node.port).returncode == 0
    jobs_of(node, files, 5)
    last = everything(archive, tmp_path / "c")
    notes = withdrawals(last)
    assert len(notes) == 2
    refused = set().union(*map(referenced, notes))
    valid = [series for series in images(last) if not uids(series) & refused]
    assert [len(series) for series in valid] == [20]
    assert refused == uids(old) | uids(new) | {
        uid for series in (old, new) for uid in uids(companions_of(last, series))
    }
    words = "\n".join(e["text"] for e in node.status(series_uid(files))["timeline"])
    assert "withdraws what job 1 made from orthanc; only then is generation 2 sent" in words

    count = archive.count()
    assert send(STORESCU, files, node.port).returncode == 0  # unchanged: adds nothing
    assert len(node.wait_settled(series_uid(files))["jobs"]) == 5
    assert archive.count() == count


def test_the_withdrawal_arrives_before_the_new_series(
    both: tuple[Node, Archive], tmp_path: Path
) -> None:
    node, archive = both
    files = sorted(write_series(ct_series(8, 32, 32), tmp_path / "source"))
    assert send(STORESCU, files[:6], node.port).returncode == 0
    jobs_of(node, files, 1)
    before = archive.get("changes?limit=1000")["Last"]
    assert send(STORESCU, files[6:], node.port).returncode == 0
    jobs_of(node, files, 3)
    changes = archive.get(f"changes?since={before}&limit=1000")["Changes"]
    new = [change["Path"] for change in changes if change["ChangeType"] == "NewSeries"]
    assert archive.get(new[0].lstrip("/"))["MainDicomTags"]["Modality"] == "KO"
    assert len(new) == 4


def test_a_site_may_keep_both(tmp_path: Path, models_dir: Path, archive: Archive) -> None:
    settings = node_settings(models_dir, [archive], on_superseded="keep")
    with running_node(tmp_path / "node", settings) as node:
        files = sorted(write_series(ct_series(8, 32, 32), tmp_path / "source"))
        assert send(STORESCU, files[:6], node.port).returncode == 0
        jobs_of(node, files, 1)
        assert send(STORESCU, files[6:], node.port).returncode == 0
        jobs = jobs_of(node, files, 2)
        assert [job["state"] for job in jobs] == ["done", "done"]
        assert archive.count() == 14
        assert "both will be there" in node.run("status", series_uid(files)).stdout


def test_killed_anywhere_the_withdrawal_and_the_new_series_arrive_once(
    tmp_path: Path, models_dir: Path
) -> None:
    """The PACS is away while late slices come; the node is killed twice on the way."""
    port, files = free_port(), sorted(write_series(ct_series(9, 32, 32), tmp_path / "source"))
    uid, folder = series_uid(files), tmp_path / "orthanc"
    node = Node(tmp_path / "node", node_settings(models_dir, [Archive("ORTHANC", port)]))
    try:
        node.start()
        with orthanc(folder, port=port):
            assert send(STORESCU, files[:6], node.port).returncode == 0
            jobs_of(node, files, 1)
        assert send(STORESCU, files[6:], node.port).returncode == 0
        wait_for(lambda: "superseded" in _states(node, uid), "the new generation")
        node.kill()
        node.start()
        wait_for(lambda: _tried(node, uid), "an attempt to withdraw")
        node.kill()
        node.start()
        with orthanc(folder, port=port) as archive:
            jobs = jobs_of(node, files, 3)
            assert [job["state"] for job in jobs] == ["superseded", "done", "done"]
            found = everything(archive, tmp_path / "found")
            old, new = images(found)
            (note,) = withdrawals(found)
            assert referenced(note) == uids(old)
            assert (len(old), len(new)) == (6, 9)
    finally:
        node.kill()


def _states(node: Node, uid: str) -> set[str]:
    return {job["state"] for job in node.status(uid)["jobs"]}


def _tried(node: Node, uid: str) -> bool:
    jobs = [job for job in node.status(uid)["jobs"] if job["retracts"]]
    return any(delivery["attempts"] for job in jobs for delivery in job["deliveries"])


def test_a_result_whose_files_are_gone_is_withdrawn_all_the_same(
    both: tuple[Node, Archive], tmp_path: Path
) -> None:
    node, archive = both
    files = sorted(write_series(ct_series(8, 32, 32), tmp_path / "source"))
    assert send(STORESCU, files[:6], node.port).returncode == 0
    jobs_of(node, files, 1)
    for path in (node.folder / "data" / "results").glob("*/*.dcm"):
        path.unlink()
    assert send(STORESCU, files[6:], node.port).returncode == 0
    jobs_of(node, files, 3)
    found = everything(archive, tmp_path / "found")
    (note,) = withdrawals(found)
    old, _ = images(found)
    assert referenced(note) == uids(old)
    assert note.PatientID == old[0].PatientID
    assert note.CurrentRequestedProcedureEvidenceSequence[0].StudyInstanceUID == (
        old[0].StudyInstanceUID
    )


def two_kernels(slices: int) -> list[Dataset]:
    """Two reconstructions under one SeriesInstanceUID: STANDARD, and one slice less of BONE."""
    first = ct_series(slices, 32, 32, seed=1)
    same = {
        keyword: first[0][keyword].value
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    }
    second = changed(ct_series(slices, 32, 32, seed=2)[:-1], **same)
    standard = changed(first, ConvolutionKernel="STANDARD")
    return [*standard, *changed(second, ConvolutionKernel="BONE", InstanceNumber=None)]


def test_each_stack_of_a_series_becomes_a_derived_series_of_its_own(
    both: tuple[Node, Archive], tmp_path: Path
) -> None:
    node, archive = both
    files = sorted(write_series(two_kernels(5), tmp_path / "source"))
    assert send(STORESCU, files, node.port).returncode == 0
    (job,) = jobs_of(node, files, 1)
    assert job["state"] == "done"
    found = everything(archive, tmp_path / "found")
    small, large = images(found)
    assert (len(small), len(large)) == (4, 5)
    assert {ds.ConvolutionKernel for ds in small} == {"BONE"}
    assert {ds.ConvolutionKernel for ds in large} == {"STANDARD"}
    assert small[0].SeriesNumber == 10000 * large[0].SeriesNumber + 10
    assert "BONE" in small[0].SeriesDescription
    assert "STANDARD" in large[0].SeriesDescription
    assert len({series[0].SeriesNumber for series in found.values()}) == len(found) == 6
    assert [one["instances"] for one in job["derived"]] == [5 + 2, 4 + 2]
    assert [(s["slices"], s["refusal"]) for s in job["stacks"]] == [(5, ""), (4, "")]
    told = node.run("status", series_uid(files)).stdout
    assert "stack 2 of 2 (ConvolutionKernel BONE), 4 slices: derived series" in told


def test_a_refused_stack_does_not_harm_the_others(
    both: tuple[Node, Archive], tmp_path: Path
) -> None:
    node, archive = both
    datasets = two_kernels(6)
    files = sorted(write_series([*datasets[:6], datasets[6]], tmp_path / "source"))
    assert send(STORESCU, files, node.port).returncode == 0
    (job,) = jobs_of(node, files, 1)
    assert job["state"] == "done"
    assert [(s["slices"], s["refusal"]) for s in job["stacks"]] == [(6, ""), (1, "SINGLE_SLICE")]
    assert [len(s) for s in images(everything(archive, tmp_path / "found"))] == [6]


def test_a_pacs_that_takes_no_withdrawal_gets_no_second_valid_result(
    tmp_path: Path, models_dir: Path
) -> None:
    port = free_port()
    settings = node_settings(models_dir, [Archive("ORTHANC", port)])
    only_ct = tmp_path / "only_ct.cfg"
    only_ct.write_text(
        "[[TransferSyntaxes]]\n[Plain]\nTransferSyntax1 = LittleEndianExplicit\n"
        "[[PresentationContexts]]\n[CT]\nPresentationContext1 = CTImageStorage\\Plain\n"
        "[[Profiles]]\n[Default]\nPresentationContexts = CT\n"
    )
    with (
        storescp(tmp_path / "pacs", "ORTHANC", port, "-xf", str(only_ct), "Default") as pacs,
        running_node(tmp_path / "node", settings) as node,
    ):
        files = sorted(write_series(ct_series(8, 32, 32), tmp_path / "source"))
        assert send(STORESCU, files[:6], node.port).returncode == 0
        jobs_of(node, files, 1)
        assert send(STORESCU, files[6:], node.port).returncode == 0

        def parked() -> Any:
            jobs = node.status(series_uid(files))["jobs"]
            owed = [d for job in jobs if job["retracts"] for d in job["deliveries"]]
            made = [job for job in jobs if job["state"] == "sending" and not job["retracts"]]
            return made and [d for d in owed if d["state"] == "parked"]

        wait_for(parked, "the withdrawal to be parked")
        assert pacs.count() == 6
        withdrawal = next(j for j in node.status(series_uid(files))["jobs"] if j["retracts"])
        done = node.run("discard", f"job-{withdrawal['id']}", "--why", "deleted by hand")
        assert done.returncode == 0, done.stderr
        node.wait_settled(series_uid(files))
        assert pacs.count() == 6 + 8
