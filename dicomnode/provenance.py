"""Who and what made a derived instance: its model, its node, its source (PS3.3 C.12.1, C.12.4)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import highdicom
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
)
from pydicom.valuerep import DT

from dicomnode.attributes import copy_attributes, copy_item
from dicomnode.imaging.frames import frame_number
from dicomnode.imaging.marks import IMPLEMENTATION_CLASS_UID, MANUFACTURER, reproducible_uid
from dicomnode.outputs import output_of

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

_LOSSY_METHOD = {  # PS3.3 C.7.6.1.1.5.1
    JPEGBaseline8Bit: "ISO_10918_1",
    JPEGExtended12Bit: "ISO_10918_1",
    JPEGLSNearLossless: "ISO_14495_1",
    JPEG2000: "ISO_15444_1",
    HTJ2K: "ISO_15444_15",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who derives: a model package run by a node. Texts as in the manifest.

    Attributes:
        digest: sha256 (hex) of the package's SHA256SUMS.
        precision: number format and kind of device, for example "fp32 cpu".
        params: of the model's task, for example "early=60min delayed=120min"; empty: none.
        remark: follows the name in SeriesDescription, never cut; empty: none.
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
    params: str = ""
    remark: str = ""


def coding_scheme() -> CodingSchemeIdentificationItem:
    """Who is responsible for our private codes."""
    return CodingSchemeIdentificationItem(
        _DESIGNATOR, name="Tasks of dicomnode", responsible_organization="dicomnode"
    )


def add_equipment(derived: Dataset, identity: Identity) -> None:
    """The software as General Equipment (PS3.3 C.7.5.1): the scanner is a contributor.

    The device is the model package run by dicomnode, wherever that is: its serial number and UID
    are of the package digest, so that every host of a cluster writes the same bytes.
    """
    derived.Manufacturer = MANUFACTURER
    derived.ManufacturerModelName = plain_text(identity.name, 64)
    derived.DeviceSerialNumber = identity.digest[:16]
    derived.DeviceUID = reproducible_uid("device", identity.digest)
    derived.StationName = "DICOMNODE"
    derived.add_new("SoftwareVersions", "LO", software_versions(identity))
    derived.InstanceCreatorUID = IMPLEMENTATION_CLASS_UID


def add_provenance(derived: Dataset, identity: Identity) -> None:
    """That this image is synthetic, and how it was derived (PS3.3 C.7.6.1, C.12.4)."""
    output = output_of(identity.task)
    derived.SyntheticData = "YES"
    derived.ImageType = [*output.image_type, "SYNTHETIC", output.code]
    derived.ImageComments = (
        f"SYNTHETIC IMAGE, NOT ACQUIRED. {output.meaning}: {_model(identity)}. "
        "Not for diagnosis on its own."
    )
    derived.DerivationDescription = _derivation(identity)
    derived.DerivationCodeSequence = [
        highdicom.sr.CodedConcept(output.code, _DESIGNATOR, output.meaning)
    ]


def add_related_series(derived: Dataset, source: Dataset) -> None:
    """The source series, with the purpose of the reference (PS3.3 C.7.3.1)."""
    related = Dataset()
    related.StudyInstanceUID = source.StudyInstanceUID
    related.SeriesInstanceUID = source.SeriesInstanceUID
    related.PurposeOfReferenceCodeSequence = _purpose(
        codes.DCM.SourceSeriesForImageProcessingOperation
    )
    derived.RelatedSeriesSequence = [related]


def add_source_image(derived: Dataset, source: Dataset) -> None:
    """The source image, or frame, at the same place (PS3.3 C.12.4, C.12.2)."""
    image, listed = _reference(source), _reference(source)
    image.SpatialLocationsPreserved = "YES"
    image.PurposeOfReferenceCodeSequence = _purpose(
        codes.DCM.SourceImageForImageProcessingOperation
    )
    derived.SourceImageSequence = [image]
    series = Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    series.ReferencedInstanceSequence = [listed]
    derived.ReferencedSeriesSequence = [series]


def _reference(source: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    frame = frame_number(source)
    if frame is not None:
        item.ReferencedFrameNumber = frame
    return item


@cache
def _concept(code: Code) -> highdicom.sr.CodedConcept:
    return highdicom.sr.CodedConcept.from_code(code)


def _purpose(code: Code) -> list[Dataset]:
    return [_concept(code)]


def contributing_equipment(
    datasets: Sequence[Dataset], identity: Identity, now: datetime
) -> list[Dataset]:
    """The source's own contributors, the device that made the source, this node, its library."""
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
    library = highdicom.ContributingEquipment(
        "Highdicom open-source contributors",
        codes.DCM.ProcessingEquipment,
        manufacturer_model_name="highdicom",
        software_versions=[highdicom.__version__],
        contribution_datetime=f"{now:%Y%m%d%H%M%S.%f%z}",
        contribution_description="Software library that composed the instance",
    )
    return [*(copy_item(item) for item in before), scanner, node, library]


def _earliest_acquisition(datasets: Sequence[Dataset]) -> str | None:
    """The first acquisition time of the series as a DT text, None if it says none.

    With the offset that the source declares, so that it stays true where that is not known.
    """
    zone = str(datasets[0].get("TimezoneOffsetFromUTC") or "")
    times = []
    for dataset in datasets:
        text = str(dataset.get("AcquisitionDateTime") or "")
        date, time = (str(dataset.get(f"Acquisition{kind}") or "") for kind in ("Date", "Time"))
        text = text or (date + time if date else "")
        if _is_moment(text):
            times.append(text)
    first = min(times, default=None)
    if first is None or len(first) < 14 or re.search(r"[+-]", first):
        return first
    return first + zone if re.fullmatch(r"[+-]\d{4}", zone) else first


def _is_moment(text: str) -> bool:
    """Whether a DT text is a day, or a second of one, that the calendar has."""
    if not re.fullmatch(r"\d{8}(\d{6}(\.\d{1,6})?)?([+-]\d{4})?", text):
        return False
    try:
        DT(text)
    except ValueError:  # 24:00:00, the 31st of February
        return False
    return True


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
        "sha256": identity.digest,
        "algorithm": identity.algorithm_name,
        "family": identity.algorithm_family,
        "algorithm version": identity.algorithm_version,
        "params": identity.params,
        "run as": identity.precision,
        "software": f"dicomnode {identity.node_version}",
    }
    end = "; not acquired"
    text = "; ".join(f"{key}={plain_text(part, 80)}" for key, part in parts.items() if part)
    return plain_text(text, 1024 - len(end)) + end


def plain_text(value: Any, limit: int) -> str:
    """Text that fits any character set and one value: printable ASCII, cut with ~ at `limit`."""
    ascii_text = str(value).encode("ascii", "replace").decode("ascii")
    plain = "".join("/" if c == "\\" else c for c in ascii_text if c.isprintable()).strip()
    return plain if len(plain) <= limit else plain[: limit - 1] + "~"


def add_loss(derived: Dataset, source: Dataset) -> None:
    """That pixels went through lossy compression, once and for all (PS3.3 C.7.6.1.1.5)."""
    derived.LossyImageCompression = "01"
    syntax = UID(source.file_meta.TransferSyntaxUID)
    if not derived.get("LossyImageCompressionMethod") and syntax in _LOSSY_METHOD:
        derived.LossyImageCompressionMethod = _LOSSY_METHOD[syntax]
    if not derived.get("LossyImageCompressionRatio") and syntax.is_encapsulated:
        ratio = 2 * source.Rows * source.Columns / len(source.PixelData)
        derived.LossyImageCompressionRatio = f"{ratio:.2f}"
