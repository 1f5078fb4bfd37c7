"""Every folder of real images, sent to one node: a derived series that passes, or a named refusal.

A table of docs/CONFORMANCE.md is what is expected; ``python tests/test_shared_dicom.py`` prints it
as it is now. Every folder is sent and translated whole. In the default run the judges look at one
derived series per folder and route: foreign ones at `SAMPLE` neighbouring slices, our own contract
at every slice. With ``DICOMNODE_LONG=1`` every judge looks at every slice of every series.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.uid import UID, CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage
from pynetdicom import AE

sys.path.insert(0, str(Path(__file__).parents[1]))
from dicomnode.cli import main
from dicomnode.imaging.frames import slices_of
from dicomnode.imaging.inference import Model, load_model, predict
from dicomnode.imaging.package import read_package
from dicomnode.imaging.volume import volume_from_datasets
from tests import judges
from tests.factories import write_series
from tests.peers import (
    DCMSEND,
    ORTHANC,
    ROOT,
    Archive,
    Node,
    needs,
    orthanc,
    running_node,
    send,
    shared_data,
)
from tests.promises import contract_findings
from tests.tasks import KINDS, package_for
from tests.test_percentiles import TO_CT
from tests.test_percentiles import write as write_percentiles

pytestmark = [
    pytest.mark.network,
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    needs(DCMSEND, ORTHANC, *map(str, (judges.DCIODVFY, judges.DCENTVFY, judges.DCMDUMP))),
]
LONG = bool(os.environ.get("DICOMNODE_LONG"))
SAMPLE = 2
CONFORMANCE = ROOT / "docs" / "CONFORMANCE.md"
BESIDE = {"PR", "SR", "KO"}
TASKS = {  # task -> Modality of its source, and the calling AE title that asks for it
    "denoise": ("CT", ""),
    "ce_ct": ("CT", "CE_CT"),
    "syn_mr": ("CT", "SYN_MR"),
    "syn_ct": ("MR", ""),
    "delayed_pet": ("PT", ""),
}
CALLERS = {  # folders that are sent by a caller of their own; the others by CT1
    "ct/same_patient_contrast_vs_noncontrast_slices/A002304": "CE_CT",
    "ct/siim_single_slices_contrast_label": "CE_CT",
    "ct/brain_gantry_tilt_18.5deg_GE": "SYN_MR",
    "codecs/nema_wg04/RLE": "SYN_MR",
}
ONE_SERIES_IN_FIVE_CODECS = "codecs/nema_wg04"
CLASSIC = {
    "CT": CTImageStorage,
    "MR": MRImageStorage,
    "PT": PositronEmissionTomographyImageStorage,
}
NOT_OF_DCMTK = {UID("1.2.840.10008.1.2.4.201"), UID("1.2.840.10008.1.2.4.203")}  # HTJ2K


def write_packages(models: Path) -> dict[str, Path]:
    """A tiny deterministic package per task, honest in its name; MR by percentiles."""
    made = {task: package_for(kind, models).path for task, kind in KINDS.items() if task in TASKS}
    shutil.rmtree(made["syn_ct"])
    made["syn_ct"] = write_percentiles(models / TO_CT.name, TO_CT)
    return made


def settings_for(models: Path, archive: Archive) -> dict[str, Any]:
    """A route per task, by modality and caller; everything goes to the archive, companions too."""
    routes = []
    for task, (modality, caller) in TASKS.items():
        match = {"Modality": modality, **({"CallingAETitle": caller} if caller else {})}
        model = f"affine-{task.replace('_', '-')}"
        routes.append({"name": task, "match": match, "model": model, "send_to": ["pacs"]})
    return {
        "node": {"unknown_callers": "accept"},
        "peers": {
            "pacs": {"ae_title": archive.ae_title, "host": "127.0.0.1", "port": archive.port}
        },
        "series": {
            "quiet_seconds": 5,
            "quiet_seconds_if_released": 0.5,
            "hold_incomplete_seconds": 2,
        },
        "device": "cpu",
        "models_dir": str(models),
        "routes": routes,
    }


@dataclass
class Folder:
    """A folder of real images, or the copy that was sent, and what became of it."""

    name: str
    files: list[Path]
    statuses: Counter[str] = field(default_factory=Counter)
    series: dict[str, dict[str, Any]] = field(default_factory=dict)
    """SeriesInstanceUID -> the node's own account; those of which an instance was stored."""


def folders(root: Path, copies: Path) -> list[Folder]:
    """Every folder with images, in order; copies where several folders hold one series."""
    files = defaultdict(list)
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            files[str(path.parent.relative_to(root))].append(path)
    found = []
    for name, paths in sorted(files.items()):
        if name.startswith(ONE_SERIES_IN_FIVE_CODECS):
            paths = [_in_a_series_of_its_own(path, copies / name) for path in paths]
        found.append(Folder(name, paths))
    return found


def _in_a_series_of_its_own(path: Path, folder: Path) -> Path:
    """A copy whose Series Instance UID names its codec too; nothing else is changed."""
    folder.mkdir(parents=True, exist_ok=True)
    ds = dcmread(path)
    ds.SeriesInstanceUID = UID(f"{ds.SeriesInstanceUID}.{sum(folder.name.encode())}")
    ds.save_as(folder / path.name)
    return folder / path.name


def send_folder(folder: Folder, port: int) -> None:
    """C-STORE each file with its own transfer syntax; the statuses are counted."""
    caller = CALLERS.get(folder.name, "CT1")
    ours = [p for p in folder.files if _header(p).file_meta.TransferSyntaxUID in NOT_OF_DCMTK]
    theirs = [path for path in folder.files if path not in ours]
    if theirs:
        sent = send(DCMSEND, theirs, port, caller, "-v", "-dn", "-nh", "-nuc")
        said = re.findall(r"Received C-STORE Response \((.*)\)", sent.stdout + sent.stderr)
        assert len(said) == len(theirs), (folder.name, sent.stdout + sent.stderr)
        folder.statuses.update(map(_status, said))
    for path in ours:
        folder.statuses[_sent_by_pynetdicom(path, port, caller)] += 1


def _status(words: str) -> str:
    found = re.search(r"0x([0-9a-fA-F]+)", words)
    return f"0x{int(found[1], 16):04X}" if found else _WORDS.get(words, words)


_WORDS = {"Success": "0x0000"}


def _sent_by_pynetdicom(path: Path, port: int, caller: str) -> str:
    ds = dcmread(path)
    ae = AE(caller)
    ae.add_requested_context(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID)
    association = ae.associate("127.0.0.1", port, ae_title="DICOMNODE")
    try:
        return f"0x{association.send_c_store(ds).Status:04X}"
    finally:
        association.release()


def wait_until_settled(folder: Folder, node: Node) -> None:
    """Wait for every series of which something was stored; others are not known to the node."""
    uids = dict.fromkeys(_header(path).get("SeriesInstanceUID") for path in folder.files)
    for uid in filter(None, uids):
        if node.get(f"api/v1/series/{uid}")[0] == 200:
            folder.series[uid] = node.wait_settled(uid, 400, every=0.5)


def outcomes(series: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Route, derived SeriesInstanceUID or "", refusal or "": of every stack of every job."""
    for job in series["jobs"]:
        for stack in job["stacks"]:
            yield job["route"], stack["derived_uid"], stack["refusal"]
        if not job["stacks"]:
            made = job["derived"][0]["series_uid"] if job["state"] == "done" else ""
            yield job["route"], made, "" if made else job["code"] or job["state"]


@dataclass
class Run:
    """All folders sent to one node, and where everything went."""

    node: Node
    archive: Archive
    models: dict[str, Path]
    folders: list[Folder]
    scratch: Path

    def __post_init__(self) -> None:
        self._loaded: dict[str, Model] = {}
        self._companions: dict[str, list[Path]] = {}
        self._kept = {
            str(series["MainDicomTags"]["SeriesInstanceUID"]): series
            for series in self.archive.get("series?expand")
        }

    def model(self, task: str) -> Model:
        """The package of a task, loaded once."""
        if task not in self._loaded:
            self._loaded[task] = load_model(read_package(self.models[task]))
        return self._loaded[task]

    def row(self, folder: Folder) -> str:
        """The line of a folder in the table: what was answered, and what came of each series."""
        answers = [f"{count} x {status}" for status, count in sorted(folder.statuses.items())]
        became = Counter(
            cell
            for series in folder.series.values()
            for cell in self._cells(series) or ["no route"]
        )
        cells = [f"{count} x {cell}" if count > 1 else cell for cell, count in became.items()]
        result = "; ".join(sorted(cells)) or "nothing stored"
        return f"| {folder.name} | {', '.join(answers)} | {result} |"

    def _cells(self, series: dict[str, Any]) -> list[str]:
        cells = [
            f"{route}: {self._count(made) if made else refusal}"
            for route, made, refusal in outcomes(series)
        ]
        return cells or ["no route"]

    def _count(self, derived_uid: str) -> str:
        return f"{len(self._kept[derived_uid]['Instances'])} derived"

    def arrived(self, folder: Folder) -> Iterator[tuple[str, list[Path], list[Path]]]:
        """Task, images and companions of each series that the folder gave, as Orthanc has them.

        Images are in slice order; companions are the GSPS and SR of the study that refer to them.
        """
        for series in folder.series.values():
            for route, made, _ in outcomes(series):
                if made:
                    images = self.archive.fetch(self._kept[made], self.scratch / made)
                    yield route, judges.in_slice_order(images), self._beside(made)

    def _beside(self, derived_uid: str) -> list[Path]:
        study = self._kept[derived_uid]["ParentStudy"]
        for uid, series in self._kept.items():
            companion = series["MainDicomTags"]["Modality"] in BESIDE
            if companion and series["ParentStudy"] == study and uid not in self._companions:
                self._companions[uid] = self.archive.fetch(series, self.scratch / uid)
        found = [
            path
            for uid, paths in self._companions.items()
            if self._kept[uid]["ParentStudy"] == study
            for path in paths
        ]
        return [path for path in found if derived_uid in _referred(dcmread(path))]


def _referred(ds: Dataset) -> set[str]:
    return {str(e.value) for e in ds.iterall() if e.keyword == "SeriesInstanceUID"} - {
        str(ds.SeriesInstanceUID)
    }


def findings(
    model: Model, sources: Sequence[Path], images: Sequence[Path], beside: Sequence[Path]
) -> dict[str, list[str]]:
    """Every judge that finds something in a derived series, with what it finds.

    Args:
        sources: the files of its source series.
        images: its files in slice order.
        beside: its companions.
    """
    used = _used(sources, images)
    middle = max(0, len(images) - SAMPLE) // 2
    part = slice(None) if LONG else slice(middle, middle + SAMPLE)
    shown = list(images[part])
    here = _used(sources, shown)
    first = [] if images[0] in shown else _used(sources, images[:1])
    told = [*shown, *beside]
    with tempfile.TemporaryDirectory() as folder:
        as_classic = here
        if any("NumberOfFrames" in _header(path) for path in here):
            as_classic = write_series(map(_classic, _slices(here, shown)), Path(folder))
        said = {
            "contract, every slice": contract_findings(used, images),
            "dciodvfy": judges.iod_findings(here, told),
            "dcentvfy": judges.entity_findings([*first, *here], told),
            "dcmtk text": judges.name_findings(here, told),
            "dcm2pnm": judges.picture_findings(shown),
            "SimpleITK grid": judges.grid_findings(as_classic, shown),
            "values": judges.value_findings(shown, *_expected(model, used, images, part)),
            "dcm2niix grid": _unless_not_comparable(judges.nifti_findings, as_classic, shown),
            "companions": judges.companion_findings(images, beside),
            "dcmpschk": judges.presentation_findings(_of(beside, "PR")),
            "dsrdump": judges.report_findings(_of(beside, "SR")),
        }
        if _header(shown[0]).Modality == "PT" and judges.SUV_PACKAGE.exists():
            said["SUV factor"] = _unless_not_comparable(judges.suv_findings, here, shown)
    if sorted(_header(path).Modality for path in beside) != ["PR", "SR"]:
        said["companions, which"] = [f"{len(beside)} of a GSPS and a report"]
    return {name: found for name, found in said.items() if found}


def _classic(frame: Dataset) -> Dataset:
    """A frame that a reader takes for a classic image: for its geometry and nothing else."""
    frame.SOPClassUID = CLASSIC[frame.Modality]
    frame.SOPInstanceUID = f"{frame.SOPInstanceUID}.{frame.ReferencedFrameNumber}"
    return frame


def _unless_not_comparable(judge: Any, source: list[Path], derived: list[Path]) -> list[str]:
    try:
        found: list[str] = judge(source, derived)
    except judges.NotComparable:
        return []
    return found


def _used(sources: Sequence[Path], images: Sequence[Path]) -> list[Path]:
    """The source files that the images were made of."""
    wanted = {_source_of(path)[0] for path in images}
    return [path for path in sources if _header(path).SOPInstanceUID in wanted]


def _source_of(path: Path) -> tuple[str, int | None]:
    item = _header(path).SourceImageSequence[0]
    return str(item.ReferencedSOPInstanceUID), item.get("ReferencedFrameNumber")


def _slices(used: Sequence[Path], images: Sequence[Path]) -> list[Dataset]:
    """The source slices, or frames, of the images, in the same order."""
    wanted = {_source_of(path)[0] for path in images}
    slices, _ = slices_of([dcmread(p) for p in used if _header(p).SOPInstanceUID in wanted])
    by_key = {(str(s.SOPInstanceUID), s.get("ReferencedFrameNumber")): s for s in slices}
    return [by_key[_source_of(path)] for path in images]


def _expected(
    model: Model, used: Sequence[Path], images: Sequence[Path], part: slice
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """What the package makes of the source here, and where it is no padding: of `part`."""
    manifest = model.package.manifest
    whole = manifest.input.modality == "MR"  # percentiles are of all slices
    given = _slices(used, images if whole else images[part])
    source, _ = volume_from_datasets(given, manifest.input.unit, min_slices=1)
    voxels = predict(model, source).voxels
    padding = np.zeros(voxels.shape, np.bool_) if source.padding is None else source.padding
    shown = part if whole else slice(None)
    return voxels[shown], ~padding[shown]


@cache
def _header(path: Path) -> Dataset:
    return dcmread(path, stop_before_pixels=True)


def _of(paths: Sequence[Path], modality: str) -> list[Path]:
    return [path for path in paths if _header(path).Modality == modality]


def send_all(stack: ExitStack, root: Path, scratch: Path) -> Run:
    """Start Orthanc and a node, send every folder, and wait until nothing more happens."""
    models = write_packages(scratch / "models")
    archive = stack.enter_context(orthanc(scratch / "orthanc"))
    settings = settings_for(scratch / "models", archive)
    node = stack.enter_context(running_node(scratch / "node", settings))
    sent = folders(root, scratch / "copies")
    for folder in sent:
        send_folder(folder, node.port)
    for folder in sent:
        wait_until_settled(folder, node)
    return Run(node, archive, models, sent, scratch / "fetched")


def documented(table: str) -> list[str]:
    """The lines of one table of docs/CONFORMANCE.md, which stand below a comment with its name."""
    text = CONFORMANCE.read_text("utf-8").split(f"<!-- {table} -->\n")[1].split("<!-- end -->")[0]
    return [line for line in text.splitlines() if line.startswith("|")][2:]


def judged(run: Run) -> dict[str, dict[str, list[str]]]:
    """What judges find, by folder and route; in the default run in one series of each."""
    found = {}
    for folder in run.folders:
        if folder.name.startswith("paired") and not LONG:
            continue  # test_whole_study.py judges them
        seen: Counter[str] = Counter()
        for route, images, beside in run.arrived(folder):
            seen[route] += 1
            if LONG or seen[route] == 1:
                name = f"{folder.name}, {route} {seen[route]}"
                found[name] = findings(run.model(route), folder.files, images, beside)
    return found


def test_every_folder_comes_back_translated_and_passes_or_is_refused_by_name(
    tmp_path: Path, real_dicom: Path
) -> None:
    with ExitStack() as stack:
        run = send_all(stack, real_dicom, tmp_path)
        assert [run.row(folder) for folder in run.folders] == documented("every folder")
        found = judged(run)
        assert {name: said for name, said in found.items() if said} == {}
        assert len(found) > 20
        assert run.node.get("healthz")[0] == 200
        assert run.node.starts == 1
        assert run.node.stop() == 0


OFFLINE = {  # folders -> the package that `dicomnode run` is given
    "codecs/nema_wg04": "denoise",
    "codecs/one_ct_slice_all_syntaxes": "denoise",
    "ct/same_patient": "denoise",
    "ct/siim": "ce_ct",
    "odd/ct": "denoise",
    "odd/enhanced_ct": "denoise",
    "codecs/mr_mosaic": "syn_ct",
    "odd/enhanced_mr": "syn_ct",
    "odd/mr": "syn_ct",
    "paired_mr_ct_pet/STS_008/PET": "delayed_pet",
}


def test_run_does_the_same_without_a_network_and_explain_names_every_series(
    tmp_path: Path, real_dicom: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_packages(tmp_path / "models")
    settings = settings_for(tmp_path / "models", Archive("ORTHANC", 104))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    table = {line.split("|")[1].strip(): line.split("|")[3] for line in documented("every folder")}
    main(["explain", "--json", "--config", str(config), str(real_dicom)])
    explained = {one["series_uid"]: one for one in json.loads(capsys.readouterr().out)}
    assert all(one["stacks"] or one["refusal"] or one["ignored"] for one in explained.values())
    for name in table:
        task = next((of for part, of in OFFLINE.items() if name.startswith(part)), None)
        if task is None:
            continue
        model = f"affine-{task.replace('_', '-')}"
        options = ["--json", "--model", model, "--out", str(tmp_path / name), "--config"]
        main(["run", *options, str(config), str(real_dicom / name)])
        text = capsys.readouterr().out
        outcomes = json.loads(text) if text else {}
        assert outcomes.keys() <= explained.keys()
        assert _offline_cells(task, outcomes.values()) == _cells_of(table[name], task), name


def _offline_cells(task: str, outcomes: Iterable[dict[str, Any]]) -> Counter[str]:
    cells: Counter[str] = Counter()
    for outcome in outcomes:
        made = {one["uid"]: f"{len(one['instances'])} derived" for one in outcome["series"]}
        for stack in outcome["stacks"]:
            cells[f"{task}: {stack['refusal'] or made[stack['derived_uid']]}"] += 1
        if not outcome["stacks"]:
            cells[f"{task}: {outcome['refusal'] or outcome['broken']}"] += 1
    return cells


def _cells_of(result: str, task: str) -> Counter[str]:
    """What a line of the table says of one route."""
    cells: Counter[str] = Counter()
    for cell in map(str.strip, result.split(";")):
        count, what = re.fullmatch(r"(?:(\d+) x )?(.*)", cell).groups()  # type: ignore[union-attr]
        if what.startswith(f"{task}: "):
            cells[what] += int(count or 1)
    return cells


if __name__ == "__main__":
    with ExitStack() as peers:
        scratch = Path(peers.enter_context(tempfile.TemporaryDirectory()))
        done = send_all(peers, shared_data() / "dicom", scratch)
        print("\n".join(done.row(one) for one in done.folders))
        for one, said in judged(done).items():
            print(one, said or "passes", flush=True)
