"""A study with CT, MR and PET, sent at once: each takes its own route and overlays its source."""

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import Dataset, dcmread

from tests import judges
from tests.peers import ORTHANC, STORESCU, Archive, needs, orthanc, running_node, send
from tests.test_shared_dicom import Run, findings, folders, settings_for, write_packages

pytestmark = [
    pytest.mark.network,
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    needs(STORESCU, ORTHANC, *map(str, (judges.DCIODVFY, judges.DCENTVFY, judges.DCMDUMP))),
]
STUDIES = ("STS_002", "STS_003", "STS_008")
ROUTES = {"CT": "syn_mr", "MR": "syn_ct", "PT": "delayed_pet"}
MADE = {"syn_mr": "MR", "syn_ct": "CT", "delayed_pet": "PT"}


def settings(models: Path, archive: Archive) -> dict[str, Any]:
    """Three routes: of the CT a synthetic MR, of the MR a synthetic CT, of the PET a later one."""
    given = settings_for(models, archive)
    given["routes"] = [r for r in given["routes"] if r["name"] in ROUTES.values()]
    for route in given["routes"]:
        route["match"].pop("CallingAETitle", None)
    return given


def volume(paths: list[Path]) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in judges.in_slice_order(paths)])
    return reader.Execute()


def grid(image: sitk.Image) -> tuple[Any, ...]:
    """Size, spacing, origin and direction as ITK reads them."""
    return image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()


def place(ds: Dataset) -> tuple[str, ...]:
    """Where an image lies, in the very digits."""
    keywords = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    return (str(ds.FrameOfReferenceUID), *(str(ds[k].value) for k in keywords), str(ds.Rows))


def test_ct_mr_and_pet_of_a_study_take_their_routes_and_overlay_their_sources(
    tmp_path: Path, real_dicom: Path
) -> None:
    models = write_packages(tmp_path / "models")
    with ExitStack() as stack:
        archive = stack.enter_context(orthanc(tmp_path / "orthanc"))
        node = stack.enter_context(
            running_node(tmp_path / "node", settings(tmp_path / "models", archive))
        )
        parts = folders(real_dicom / "paired_mr_ct_pet", tmp_path / "copies")
        for name in STUDIES:  # one association each, with the structure sets too
            files = [path for part in parts if part.name.startswith(name) for path in part.files]
            sent = send(STORESCU, files, node.port, "CT1", "-v")
            assert sent.returncode == 0, sent.stderr
            assert (sent.stdout + sent.stderr).count("Requesting Association") == 1
        for part in parts:
            for uid in {
                str(dcmread(p, stop_before_pixels=True).SeriesInstanceUID) for p in part.files
            }:
                part.series[uid] = node.wait_settled(uid, 400, every=0.5)
        run = Run(node, archive, models, parts, tmp_path / "fetched")
        taken = check_overlays(run)
        assert taken == {name: set(MADE) for name in STUDIES}
        assert check_studies(archive) == len(STUDIES)


def check_overlays(run: Run) -> dict[str, set[str]]:
    """Each derived series lies on its source; which routes were taken, by study."""
    taken: dict[str, set[str]] = defaultdict(set)
    for part in run.folders:
        if "/" not in part.name:  # the structure sets
            assert [s["outcome"] for s in part.series.values()] == ["ignored: no route matches"] * 3
            continue
        ((route, images, beside),) = run.arrived(part)
        taken[part.name.split("/")[0]].add(route)
        assert {dcmread(p, stop_before_pixels=True).Modality for p in images} == {MADE[route]}
        source, derived = volume(part.files), volume(images)
        assert grid(derived) == grid(source)
        at = [place(dcmread(p, stop_before_pixels=True)) for p in judges.in_slice_order(part.files)]
        assert [place(dcmread(p, stop_before_pixels=True)) for p in images] == at
        assert findings(run.model(route), part.files, images, beside) == {}
        bodies = [sitk.GetArrayFromImage(image).astype(float) for image in (source, derived)]
        correlation = np.corrcoef(*(body.ravel() for body in bodies))[0, 1]
        assert correlation > 0.8, (part.name, correlation)  # the same anatomy at the same voxels
    return taken


def check_studies(archive: Archive) -> int:
    """Orthanc has each study once, with three derived series in one frame of reference."""
    studies = archive.get("studies?expand")
    for study in studies:
        series = [archive.get(f"series/{key}") for key in study["Series"]]
        made = [one for one in series if one["MainDicomTags"]["Modality"] in MADE.values()]
        assert sorted(one["MainDicomTags"]["Modality"] for one in made) == ["CT", "MR", "PT"]
        frames = {
            archive.get(f"instances/{one['Instances'][0]}/simplified-tags")["FrameOfReferenceUID"]
            for one in made
        }
        assert len(frames) == 1
    return len(studies)
