"""What foreign programs say about a derived series beside its source: one list of findings each.

An empty list is a pass. The programs are named by absolute path; `require` skips, with the name of
what is absent.
"""

import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import Dataset, dcmread

DCIODVFY = Path("/usr/bin/dciodvfy")
DCENTVFY = Path("/usr/bin/dcentvfy")
DCMDUMP = Path("/usr/bin/dcmdump")

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
    """Where patients, studies, series and frames do not agree between instances (dcentvfy)."""
    found = set(_lines(DCENTVFY, *source, *derived)) - set(_lines(DCENTVFY, *source))
    return sorted(line for line in found if line.startswith("Error"))


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
        half = abs(float(dcmread(path, stop_before_pixels=True).RescaleSlope)) / 2
        worst = np.abs(read - plane)[mask].max(initial=0)
        if worst > half * (1 + 1e-6) + 1e-6 * np.abs(plane).max():
            findings.append(f"{path.name}: off by {worst:.4f}, half a quantum is {half:.4f}")
    return findings


def contract_findings(source: Sequence[Path], derived: Sequence[Path]) -> list[str]:
    """What DESIGN 1.6 promises of every derived instance and no foreign program looks for."""
    by_uid = {str(ds.SOPInstanceUID): ds for ds in map(dcmread, source)}
    outputs = [dcmread(path) for path in derived]
    findings = []
    if len({ds.SOPInstanceUID for ds in outputs} - by_uid.keys()) != len(outputs):
        findings.append("SOP Instance UIDs are not new and unique")
    if len({ds.SeriesInstanceUID for ds in outputs}) != 1:
        findings.append("not one series")
    for ds in outputs:
        reference = str(ds.SourceImageSequence[0].ReferencedSOPInstanceUID)
        if reference not in by_uid:
            findings.append("references an image that is not in the source")
            continue
        findings += _promises(by_uid[reference], ds)
    return findings


def judge(
    source: Sequence[Path],
    derived: Sequence[Path],
    expected: NDArray[np.float32],
    native: NDArray[np.bool_] | bool = True,
) -> dict[str, list[str]]:
    """Every judge that finds something, with what it finds; empty if all pass.

    Args:
        source, derived: files; `derived` in slice order.
        expected: (slices, rows, columns), float32, HU, what the model gave.
        native: as in `value_findings`.
    """
    require(DCIODVFY, DCENTVFY, DCMDUMP)
    judges: dict[str, Callable[[], list[str]]] = {
        "dciodvfy": lambda: iod_findings(source, derived),
        "dcentvfy": lambda: entity_findings(source, derived),
        "names": lambda: name_findings(source, derived),
        "grid": lambda: grid_findings(source, derived),
        "values": lambda: value_findings(derived, expected, native),
        "contract": lambda: contract_findings(source, derived),
    }
    verdicts = {name: findings() for name, findings in judges.items()}
    return {name: findings for name, findings in verdicts.items() if findings}


def _promises(source: Dataset, ds: Dataset) -> list[str]:
    findings = []
    same = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "PatientPosition")
    same += ("StudyInstanceUID", "FrameOfReferenceUID", "SpecificCharacterSet")
    for keyword in same:
        if keyword in source and _written(ds, keyword) != _written(source, keyword):
            findings.append(f"{keyword} is not the source's")
    if ds.get("SyntheticData") != "YES" or list(ds.ImageType[:2]) != ["DERIVED", "SECONDARY"]:
        findings.append("not marked as derived and synthetic")
    if ds.SeriesInstanceUID == source.SeriesInstanceUID or "[SYN " not in ds.SeriesDescription:
        findings.append("not a marked series of its own")
    if any(element.tag.is_private for element in ds.iterall()):
        findings.append("has a private attribute")
    if bool(ds.get("ContrastBolusAgent")) != bool(source.get("ContrastBolusAgent")):
        findings.append("contrast agent is not the source's")
    return findings


def _written(ds: Dataset, keyword: str) -> list[str]:
    """An attribute's values as text, numbers as they were written."""
    value = ds.get(keyword)
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [str(getattr(one, "original_string", one)) for one in values]


def _volume(files: Sequence[Path]) -> sitk.Image:
    """As ITK reads a series: sorted by position, geometry of the first and last slice."""
    reader = sitk.ImageSeriesReader()
    planes = [dcmread(path, stop_before_pixels=True) for path in files]
    directions = np.asarray(planes[0].ImageOrientationPatient, dtype=np.float64)
    normal = np.cross(directions[:3], directions[3:])
    along = [
        float(np.dot(np.asarray(ds.ImagePositionPatient, dtype=float), normal)) for ds in planes
    ]
    reader.SetFileNames([str(files[index]) for index in np.argsort(along)])
    return reader.Execute()


def _lines(program: Path, *arguments: object) -> list[str]:
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, errors="replace"
    )
    return [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
