"""What foreign programs say about a derived series beside its source: one list of findings each.

An empty list is a pass. The programs are named by absolute path; `require` skips, with the name of
what is absent.
"""

import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import Dataset, dcmread

from tests.promises import companion_findings, contract_findings

DCIODVFY = Path("/usr/bin/dciodvfy")
DCENTVFY = Path("/usr/bin/dcentvfy")
DCMDUMP = Path("/usr/bin/dcmdump")
DCM2PNM = Path("/usr/bin/dcm2pnm")
DCMPSCHK = Path("/usr/bin/dcmpschk")
DSRDUMP = Path("/usr/bin/dsrdump")
DCM2NIIX = Path("/usr/bin/dcm2niix")
NODE = Path("/usr/bin/node")
NODE_MODULES = Path(__file__).parents[1] / ".ci" / "node" / "node_modules"
"""Foreign JavaScript libraries, which `.ci/packages` installs."""
SUV_PACKAGE = NODE_MODULES / "@cornerstonejs" / "calculate-suv"
"""What OHIF computes SUV with."""

_TOO_NEW = "</(0008,001c)>"
"""Synthetic Data: newer than Debian's dicom3tools 20220618, the one finding that is excepted."""


def require(*programs: Path) -> None:
    """Skip the test, saying why, where a foreign program is not installed."""
    for program in programs:
        if not program.exists():
            pytest.skip(f"{program} is not installed")


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")


def dciodvfy(files: Iterable[Path]) -> set[str]:
    """Every different error that dciodvfy sees in any of the files."""
    return {
        line
        for path in files
        for line in _lines(DCIODVFY, "-new", path)
        if line.startswith("Error") and _TOO_NEW not in line
    }


def iod_findings(source: Sequence[Path], derived: Sequence[Path]) -> list[str]:
    """Errors of the derived instances that no source instance has (dciodvfy, PS3.3)."""
    return sorted(dciodvfy(derived) - dciodvfy(source))


def entity_findings(source: Sequence[Path], derived: Sequence[Path]) -> list[str]:
    """Where patients, studies, series and frames do not agree between instances (dcentvfy).

    An attribute that differs within the source is no finding: which two values are told of it
    depends on which files are looked at.
    """
    found = _without_files(_lines(DCENTVFY, *source, *derived))
    known = {line.split(" Value ")[0] for line in _without_files(_lines(DCENTVFY, *source))}
    return sorted(
        line for line in found if line.startswith("Error") and line.split(" Value ")[0] not in known
    )


def _without_files(lines: Iterable[str]) -> set[str]:
    """What is said, whichever two files it is said of, and in whichever order."""
    said = {re.sub(r"</[^>]*\.dcm>", "", line) for line in lines}
    return {re.sub(r"<([^<>]*)> versus <([^<>]*)>", _in_order, line) for line in said}


def _in_order(values: re.Match[str]) -> str:
    return " and ".join(sorted(values.groups()))


def name_findings(source: Sequence[Path], derived: Sequence[Path]) -> list[str]:
    """Patient's names that DCMTK shows otherwise than the source's."""
    known = {_name(path) for path in source}
    return [f"{path.name}: another name" for path in derived if _name(path) not in known]


def _name(path: Path) -> tuple[str, ...]:
    """In UTF-8; as it is stored where DCMTK has no tables for the character set."""
    wanted = ("-q", "+P", "0010,0010", path)
    shown = [line for line in _lines(DCMDUMP, "+U8", *wanted) if line.startswith("(")]
    return tuple(shown or _lines(DCMDUMP, *wanted))


def grid_findings(source: Sequence[Path], derived: Sequence[Path]) -> list[str]:
    """What SimpleITK reads as another size, spacing, origin or direction."""
    one, other = _volume(source), _volume(derived)
    pairs = {
        "size": (one.GetSize(), other.GetSize()),
        "spacing": (one.GetSpacing(), other.GetSpacing()),
        "origin": (one.GetOrigin(), other.GetOrigin()),
        "direction": (one.GetDirection(), other.GetDirection()),
    }
    return [f"{what}: {a} is now {b}" for what, (a, b) in pairs.items() if a != b]


def value_findings(
    derived: Sequence[Path], expected: NDArray[np.float32], native: NDArray[np.bool_] | bool = True
) -> list[str]:
    """Voxels that SimpleITK reads farther from the model's than half a rescale quantum.

    Args:
        derived: files in slice order.
        expected: (slices, rows, columns), float32, HU.
        native: (slices, rows, columns), bool: where to look; True for everywhere.
    """
    findings = []
    masks = np.broadcast_to(np.asarray(native), expected.shape)
    for path, plane, mask in zip(derived, expected, masks, strict=True):
        read = sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkFloat64))[0]
        half = abs(float(dcmread(path, stop_before_pixels=True).get("RescaleSlope", 1))) / 2
        worst = np.abs(read - plane)[mask].max(initial=0)
        if worst > half * (1 + 1e-6) + 1e-6 * np.abs(plane).max():
            findings.append(f"{path.name}: off by {worst:.4f}, half a quantum is {half:.4f}")
    return findings


def picture_findings(derived: Sequence[Path]) -> list[str]:
    """Files that DCMTK does not render with the window they carry."""
    findings = []
    for path in derived:
        window = ["+Wi", "1"] if "WindowCenter" in _header(path) else ["+Wm"]
        done = subprocess.run([str(DCM2PNM), *window, str(path)], capture_output=True, check=False)
        if done.returncode or not done.stdout.startswith(b"P"):
            findings.append(f"{path.name}: not rendered")
    return findings


def nifti_findings(source: Sequence[Path], derived: Sequence[Path]) -> list[str]:
    """Where dcm2niix makes volumes of another matrix or with another affine."""
    modalities = {_header(path).Modality for path in (source[0], derived[0])}
    if len(modalities) > 1 and _sheared(derived):
        raise NotComparable("the stack is sheared, and dcm2niix mends that of CT only")
    one, other, close = _niftis(source), _niftis(derived), 1e-3
    if len(modalities) > 1:  # it stores sagittal and coronal 3D MR in another order of axes, and
        one, other, close = _canonical(one), _canonical(other), 2e-2  # straightens rounded CT
    if not other or len(one) != len(other):
        return [f"{len(one)} volumes of the source, {len(other)} of the derived series"]
    return [
        f"{a} is now {b}"
        for a, b in zip(one, other, strict=True)
        if not np.allclose(a, b, atol=close)
    ]


def _niftis(files: Sequence[Path]) -> list[tuple[float, ...]]:
    """Matrix and affine of every volume that dcm2niix makes (NIfTI-1: dim at 40, srow at 280)."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given"), Path(folder, "made")
        given.mkdir()
        made.mkdir()
        for index, path in enumerate(files):
            ds = dcmread(path)
            if ds.file_meta.TransferSyntaxUID.is_encapsulated:
                ds.decompress(generate_instance_uid=False)  # dcm2niix has no JPEG-LS
            ds.save_as(given / f"{index:05}.dcm")
        _lines(DCM2NIIX, "-b", "n", "-z", "n", "-f", "%s_%d", "-o", made, given)
        headers = [path.read_bytes()[:348] for path in made.glob("*.nii")]
    grids = [
        struct.unpack_from("<4h", h, 40)[1:] + struct.unpack_from("<12f", h, 280) for h in headers
    ]
    return sorted(grids)


def _canonical(grids: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The same voxels with each axis along the nearest of the patient's, in its direction."""
    found = []
    for grid in grids:
        size, affine = np.array(grid[:3]), np.array(grid[3:]).reshape(3, 4)
        steps, origin = affine[:, :3], affine[:, 3]
        order = np.argsort(np.abs(steps).argmax(axis=0), kind="stable")
        size, steps = size[order], steps[:, order]
        for axis in np.flatnonzero(np.diag(steps) < 0):
            origin = origin + steps[:, axis] * (size[axis] - 1)
            steps[:, axis] *= -1
        found.append((*size.tolist(), *np.column_stack([steps, origin]).ravel().tolist()))
    return sorted(found)


class NotComparable(Exception):
    """A judge cannot look at this source, and why."""


def suv_findings(source: Sequence[Path], derived: Sequence[Path]) -> list[str]:
    """Slices for which a viewer computes another SUV factor than for their source."""
    by_uid = {str(ds.SOPInstanceUID): ds for ds in map(_header, source)}
    outputs = list(map(_header, derived))
    pairs = [by_uid[ds.SourceImageSequence[0].ReferencedSOPInstanceUID] for ds in outputs]
    try:
        one = suv_factors(pairs)
    except subprocess.CalledProcessError as error:
        reason = [line for line in error.stderr.splitlines() if line.startswith("Error")]
        raise NotComparable(f"calculate-suv refuses the source: {reason}") from error
    other = suv_factors(outputs)
    return [f"SUV factor {a} is now {b}" for a, b in zip(one, other, strict=True) if a != b]


def suv_factors(datasets: Sequence[Dataset]) -> list[float]:
    """SUVbw per Bq/ml of each slice as @cornerstonejs/calculate-suv tells (not of GML, CNTS)."""
    keywords = ["SeriesDate", "SeriesTime", "AcquisitionDate", "AcquisitionTime", "PatientWeight"]
    keywords += ["DecayCorrection", "FrameReferenceTime", "ActualFrameDuration", "PatientSex"]
    instances = []
    for ds in datasets:
        tracer = ds.RadiopharmaceuticalInformationSequence[0]
        known = {keyword: ds.get(keyword) for keyword in keywords}
        for keyword in ("TotalDose", "HalfLife"):
            known[f"Radionuclide{keyword}"] = float(tracer[f"Radionuclide{keyword}"].value)
        known["Units"] = "BQML"  # which the derived are, whatever the source is
        known["CorrectedImage"] = list(ds.CorrectedImage)
        known["RadiopharmaceuticalStartTime"] = tracer.RadiopharmaceuticalStartTime
        known["RadiopharmaceuticalStartDateTime"] = tracer.get("RadiopharmaceuticalStartDateTime")
        for keyword in ("PatientWeight", "FrameReferenceTime", "ActualFrameDuration"):
            known[keyword] = None if known[keyword] in (None, "") else float(known[keyword])
        instances.append({k: v for k, v in known.items() if v is not None})
    script = (
        f"const s=require({json.dumps(str(SUV_PACKAGE))});let t='';process.stdin.on('data',d=>t+=d)"
        ".on('end',()=>console.log(JSON.stringify(s.calculateSUVScalingFactors(JSON.parse(t)))))"
    )
    done = subprocess.run(
        [str(NODE), "-e", script],
        input=json.dumps(instances, default=str),
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(factor["suvbw"]) for factor in json.loads(done.stdout)]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one judge says: what it looked at, and what it found; `skipped`: why it did not."""

    name: str
    looked_at: str
    findings: list[str]
    skipped: str = ""


def judge(
    source: Sequence[Path],
    derived: Sequence[Path],
    expected: NDArray[np.float32],
    native: NDArray[np.bool_] | bool = True,
) -> dict[str, list[str]]:
    """Every judge that finds something, with what it finds; empty if all pass.

    Args:
        source, derived: files; `derived` in slice order.
        expected: (slices, rows, columns), float32, what the model gave, in the derived unit.
        native: as in `value_findings`.
    """
    require(DCIODVFY, DCENTVFY, DCMDUMP)
    judges: dict[str, Callable[[], list[str]]] = {
        "dciodvfy": lambda: iod_findings(source, derived),
        "dcentvfy": lambda: entity_findings(source, derived),
        "dcmtk text": lambda: name_findings(source, derived),
        "SimpleITK grid": lambda: grid_findings(source, derived),
        "values": lambda: value_findings(derived, expected, native),
        "contract": lambda: contract_findings(source, derived),
    }
    verdicts = {name: findings() for name, findings in judges.items()}
    return {name: findings for name, findings in verdicts.items() if findings}


def every_verdict(
    source: Sequence[Path],
    derived: Sequence[Path],
    companions: Sequence[Path] = (),
    expected: NDArray[np.float32] | None = None,
) -> list[Verdict]:
    """What every judge says, the slow ones too.

    Args:
        derived: files in slice order.
        companions: GSPS, SR and KO that go with them.
        expected: (slices, rows, columns), float32, what the model gave; NaN: not to be looked at.
    """
    whole = [*derived, *companions]
    counts = f"{len(source)}+{len(derived)}+{len(companions)} objects"
    known = expected is not None
    native = np.isfinite(expected) if known else True
    values = expected if expected is not None else _pydicom_values(derived)
    how = "|read - model|" if known else "|SimpleITK - pydicom|, the model's values are not known"
    judges: list[tuple[str, tuple[Path, ...], str, Callable[[], list[str]]]] = [
        ("dciodvfy", (DCIODVFY,), f"{len(whole)} objects", lambda: iod_findings(source, whole)),
        ("dcentvfy", (DCENTVFY,), counts, lambda: entity_findings(source, whole)),
        ("dcmtk text", (DCMDUMP,), "(0010,0010) PN", lambda: name_findings(source, whole)),
        ("dcm2pnm", (DCM2PNM,), f"{len(derived)} rendered", lambda: picture_findings(derived)),
        ("SimpleITK grid", (), _grid(derived), lambda: grid_findings(source, derived)),
        (
            "values",
            (),
            f"max {how} {_worst(derived, values, native):.6g} <= quantum/2 {_half(derived):.6g}",
            lambda: value_findings(derived, values, native),
        ),
        ("dcm2niix grid", (DCM2NIIX,), "same", lambda: nifti_findings(source, derived)),
        ("contract", (), f"{len(derived)} instances", lambda: contract_findings(source, derived)),
    ]
    if _header(derived[0]).Modality == "PT":
        judges.append(
            ("SUV factor", (NODE, SUV_PACKAGE), "same", lambda: suv_findings(source, derived))
        )
    judges += _companion_judges(derived, companions) if companions else []
    return [_verdict(*one) for one in judges]


Judge = tuple[str, tuple[Path, ...], str, Callable[[], list[str]]]


def _companion_judges(derived: Sequence[Path], companions: Sequence[Path]) -> list[Judge]:
    states = [path for path in companions if _header(path).Modality == "PR"]
    reports = [path for path in companions if _header(path).Modality == "SR"]
    count = f"{len(states)} presentation states, {len(reports)} reports"
    return [
        ("dcmpschk", (DCMPSCHK,), "Test passed", lambda: presentation_findings(states)),
        ("dsrdump", (DSRDUMP,), "model named, unverified", lambda: report_findings(reports)),
        ("companions", (), count, lambda: companion_findings(derived, companions)),
    ]


def presentation_findings(states: Sequence[Path]) -> list[str]:
    """Presentation states of which dcmpschk does not say `Test passed.`

    It is asked of a copy without the source's name and StudyID, which may be too long (and DCMTK
    3.6.7 does not read UTF-8), without an age that is none, and without what it takes for wrong
    and PS3.5 6.2 has: UTC as +0000.
    """
    findings = []
    with tempfile.TemporaryDirectory() as folder:
        for path in states:
            ds, copy = dcmread(path), Path(folder, path.name)
            ds.PatientName = ds.StudyID = "1"
            if not re.fullmatch(r"\d{3}[DWMY]", str(ds.get("PatientAge"))):
                ds.pop("PatientAge", None)
            for item in ds.ContributingEquipmentSequence:
                if when := item.get("ContributionDateTime"):
                    item.ContributionDateTime = re.sub(r"\+00\d\d$", "+0100", str(when))
            ds.save_as(copy)
            said = "; ".join(_lines(DCMPSCHK, copy))
            findings += [] if "Test passed." in said else [f"{path.name}: {said}"]
    return findings


def report_findings(reports: Sequence[Path]) -> list[str]:
    """Reports of which DCMTK does not show which model made them, and that nobody read them."""
    findings = []
    for path in reports:
        text = "\n".join(_lines(DSRDUMP, "+Pl", path))
        wanted = ["Algorithm Name", "Algorithm Version", "UNVERIFIED", "PRELIMINARY"]
        findings += [f"{path.name}: no {word}" for word in wanted if word not in text]
        if not re.search(r"sha256=[0-9a-f]{64}\b", text):
            findings.append(f"{path.name}: no sha256")
    return findings


def _verdict(
    name: str, programs: Sequence[Path], looked_at: str, findings: Callable[[], list[str]]
) -> Verdict:
    missing = [str(program) for program in programs if not program.exists()]
    if missing:
        return Verdict(name, looked_at, [], f"{', '.join(missing)} is not installed")
    try:
        return Verdict(name, looked_at, findings())
    except NotComparable as reason:
        return Verdict(name, looked_at, [], str(reason))


def _header(path: Path) -> Dataset:
    return dcmread(path, stop_before_pixels=True)


def _half(derived: Sequence[Path]) -> float:
    """The largest half rescale quantum of the files."""
    return max(abs(float(_header(path).get("RescaleSlope", 1))) for path in derived) / 2


def _worst(derived: Sequence[Path], expected: NDArray[Any], native: NDArray[Any] | bool) -> float:
    read = [sitk.GetArrayFromImage(sitk.ReadImage(str(p), sitk.sitkFloat64))[0] for p in derived]
    difference = np.abs(np.stack(read) - expected)
    return float(difference[np.broadcast_to(native, difference.shape)].max(initial=0))


def _pydicom_values(derived: Sequence[Path]) -> NDArray[np.float32]:
    planes = []
    for path in derived:
        ds = dcmread(path)
        slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
        planes.append(ds.pixel_array * slope + intercept)
    return np.asarray(planes, np.float32)


def _grid(files: Sequence[Path]) -> str:
    volume = _volume(files)
    return f"size {volume.GetSize()} spacing {tuple(round(s, 4) for s in volume.GetSpacing())}"


def in_slice_order(files: Iterable[Path]) -> list[Path]:
    """Files of one stack, the smallest projection on the slice normal first."""
    found = {}
    for path in files:
        ds = _header(path)
        directions = np.asarray(ds.ImageOrientationPatient, dtype=np.float64)
        normal = np.cross(directions[:3], directions[3:])
        found[path] = float(np.dot(np.asarray(ds.ImagePositionPatient, dtype=float), normal))
    return sorted(found, key=lambda path: found[path])


def _sheared(files: Sequence[Path]) -> bool:
    """Whether the slices of a stack do not lie above one another."""
    first, last = _header(files[0]), _header(files[-1])
    step = np.subtract(last.ImagePositionPatient, first.ImagePositionPatient, dtype=float)
    axes = np.asarray(first.ImageOrientationPatient, dtype=float).reshape(2, 3)
    return bool(np.abs(axes @ step).max() > 0.5)


def _volume(files: Sequence[Path]) -> sitk.Image:
    """As ITK reads a series: sorted by position, geometry of the first and last slice."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in in_slice_order(files)])
    return reader.Execute()


def _lines(program: Path, *arguments: object) -> list[str]:
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, errors="replace"
    )
    return [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
