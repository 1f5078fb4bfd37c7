"""Who and what made a derived instance: its model, its node, its source (PS3.3 C.12.1, C.12.4)."""

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import highdicom
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from dicomnode.attributes import copy_attributes, copy_item
from dicomnode.imaging.marks import MANUFACTURER

NAMESPACE = uuid.UUID("099c1bbe-392e-4940-ad37-fcdfe9374a78")
"""Of every UID of this project, by UUIDv5."""

_DESIGNATOR = "99DICOMNODE"
_SCANNER = (
    "Manufacturer",
    "ManufacturerModelName",
    "DeviceSerialNumber",
    "SoftwareVersions",
    "StationName",
    "InstitutionName",
    "InstitutionalDepartmentName",
)


@dataclass(frozen=True, slots=True)
class Task:
    """What a model does, in the words of a derived CT instance.

    Attributes:
        code: value 5 of ImageType, and the CodeValue of DerivationCodeSequence.
        meaning: its CodeMeaning; PS3.16 CID 7203 has no code for images made by a network.
    """

    code: str
    meaning: str


TASKS = {
    "denoise": Task("DENOISE", "Denoised by a trained model"),
    "identity": Task("IDENTITY", "Passed through a model that changes nothing"),
    "affine": Task("AFFINE", "Pixel values scaled and shifted"),
}


def reproducible_uid(*parts: object) -> str:
    """A reproducible UID: 2.25 and the UUIDv5 of the parts as canonical JSON (PS3.5 B.2)."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return f"2.25.{uuid.uuid5(NAMESPACE, text).int}"


IMPLEMENTATION_CLASS_UID = reproducible_uid("implementation", MANUFACTURER)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who derives: a model package run by a node. Texts as in the manifest.

    Attributes:
        digest: sha256 (hex) of the package's SHA256SUMS.
        precision: number format and kind of device, for example "fp32 cpu".
    """

    name: str
    version: str
    digest: str
    architecture: str
    task: str
    algorithm_name: str
    algorithm_family: str
    algorithm_version: str
    node_version: str
    precision: str


def coding_scheme() -> CodingSchemeIdentificationItem:
    """Who is responsible for our private codes."""
    return CodingSchemeIdentificationItem(
        _DESIGNATOR, name="Tasks of dicomnode", responsible_organization="dicomnode"
    )


def add_provenance(derived: Dataset, identity: Identity) -> None:
    """That this image is synthetic, and how it was derived (PS3.3 C.7.6.1, C.12.4)."""
    task = TASKS[identity.task]
    derived.SyntheticData = "YES"
    derived.ImageType = ["DERIVED", "SECONDARY", "AXIAL", "SYNTHETIC", task.code]
    derived.ImageComments = (
        f"SYNTHETIC IMAGE, NOT ACQUIRED. {task.meaning}: {_model(identity)}. "
        "Not for diagnosis on its own."
    )
    derived.DerivationDescription = _derivation(identity)
    derived.DerivationCodeSequence = [
        highdicom.sr.CodedConcept(task.code, _DESIGNATOR, task.meaning)
    ]


def add_references(derived: Dataset, source: Dataset) -> None:
    """The source image and series, each with the purpose of the reference."""
    derived.SourceImageSequence = [_reference(source)]
    image = derived.SourceImageSequence[0]
    image.SpatialLocationsPreserved = "YES"
    image.PurposeOfReferenceCodeSequence = _purpose(
        codes.DCM.SourceImageForImageProcessingOperation
    )
    series = Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    series.ReferencedInstanceSequence = [_reference(source)]
    derived.ReferencedSeriesSequence = [series]
    related = Dataset()
    related.StudyInstanceUID = source.StudyInstanceUID
    related.SeriesInstanceUID = source.SeriesInstanceUID
    related.PurposeOfReferenceCodeSequence = _purpose(
        codes.DCM.SourceSeriesForImageProcessingOperation
    )
    derived.RelatedSeriesSequence = [related]


def _reference(source: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    return item


def _purpose(code: Code) -> list[Dataset]:
    return [highdicom.sr.CodedConcept.from_code(code)]


def contributing_equipment(
    datasets: Sequence[Dataset], identity: Identity, now: datetime
) -> list[Dataset]:
    """The source's own contributors, the device that made the source, and this node."""
    first = datasets[0]
    before = first.get("ContributingEquipmentSequence") or []
    listed = [
        code.get("CodeValue")
        for item in before
        for code in item.get("PurposeOfReferenceCodeSequence") or ()
    ]
    purpose = codes.DCM.AcquisitionEquipment
    if "DERIVED" in (first.get("ImageType") or ()) and purpose.value in listed:
        purpose = codes.DCM.ProcessingEquipment
    scanner = highdicom.ContributingEquipment(
        plain_text(first.get("Manufacturer") or "Unknown", 64),
        purpose,
        contribution_datetime=_earliest_acquisition(datasets),
    )
    copy_attributes(scanner, first, [keyword for keyword in _SCANNER if first.get(keyword)])
    node = highdicom.ContributingEquipment(
        MANUFACTURER,
        codes.DCM.SynthesizingEquipment,
        manufacturer_model_name=plain_text(identity.name, 64),
        software_versions=software_versions(identity),
        contribution_datetime=f"{now:%Y%m%d%H%M%S.%f%z}",
        contribution_description=_derivation(identity),
    )
    return [*(copy_item(item) for item in before), scanner, node]


def _earliest_acquisition(datasets: Sequence[Dataset]) -> str | None:
    """The first acquisition time of the series as a DT text, None if it says none."""
    times = []
    for dataset in datasets:
        text = str(dataset.get("AcquisitionDateTime") or "")
        date, time = (str(dataset.get(f"Acquisition{kind}") or "") for kind in ("Date", "Time"))
        text = text or (date + time if date else "")
        if re.fullmatch(r"\d{8}(\d{6}(\.\d{1,6})?)?([+-]\d{4})?", text):
            times.append(text)
    return min(times, default=None)


def _model(identity: Identity) -> str:
    return f"{plain_text(identity.name, 64)} {plain_text(identity.version, 64)}"


def software_versions(identity: Identity) -> list[str]:
    """The node's version and the model's name and version, as SoftwareVersions."""
    return [plain_text(f"dicomnode {identity.node_version}", 64), plain_text(_model(identity), 64)]


def _derivation(identity: Identity) -> str:
    """How, in a form that can be parsed (ST: at most 1024 characters)."""
    parts = {
        "task": identity.task,
        "model": identity.name,
        "version": identity.version,
        "arch": identity.architecture,
        "package sha256": identity.digest,
        "algorithm": identity.algorithm_name,
        "family": identity.algorithm_family,
        "algorithm version": identity.algorithm_version,
        "run as": identity.precision,
        "software": f"dicomnode {identity.node_version}",
    }
    return (
        "; ".join(f"{key}={plain_text(part, 80)}" for key, part in parts.items()) + "; not acquired"
    )


def plain_text(value: Any, limit: int) -> str:
    """Text that fits any character set and one value: printable ASCII, cut with ~ at `limit`."""
    ascii_text = str(value).encode("ascii", "replace").decode("ascii")
    plain = "".join("/" if c == "\\" else c for c in ascii_text if c.isprintable()).strip()
    return plain if len(plain) <= limit else plain[: limit - 1] + "~"
