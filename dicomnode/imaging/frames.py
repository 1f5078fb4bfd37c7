"""An SOP instance as the slices it holds: one of a classic image, one per frame of an enhanced one.

A frame gets a header as a classic instance would have it, so that all other code sees slices only.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydicom import DataElement, Dataset
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
)
from pydicom.valuerep import DSfloat

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.pixels import refused
from dicomnode.imaging.verbatim import hand_on_text

ENHANCED = {  # SOP Class UID -> Modality of what its frames are
    EnhancedCTImageStorage: "CT",
    EnhancedMRImageStorage: "MR",
    EnhancedPETImageStorage: "PT",
    LegacyConvertedEnhancedCTImageStorage: "CT",
    LegacyConvertedEnhancedMRImageStorage: "MR",
    LegacyConvertedEnhancedPETImageStorage: "PT",
}
TRANSLATABLE = {
    CTImageStorage: "CT",
    MRImageStorage: "MR",
    PositronEmissionTomographyImageStorage: "PT",
    **ENHANCED,
}
"""SOP Class UID -> Modality of every image that can be a slice."""

_RENAMED = {  # attribute of a functional group -> what a classic image calls it
    "FrameType": "ImageType",
    "EffectiveEchoTime": "EchoTime",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "FrameAcquisitionDateTime": "AcquisitionDateTime",
    "TemporalPositionIndex": "TemporalPositionIdentifier",
    "NominalCardiacTriggerDelayTime": "TriggerTime",
    "FrameLaterality": "ImageLaterality",
    "ExposureTimeInms": "ExposureTime",
    "XRayTubeCurrentInmA": "XRayTubeCurrent",
    "ExposureInmAs": "Exposure",
    "EstimatedDoseSaving": "",
    "FrameComments": "",
}
_WHOLE = {"ReferencedImageSequence"}  # functional groups which a classic image has by that name
_LEFT_OUT = {
    "ConversionSourceAttributesSequence",
    "DerivationImageSequence",
    "RealWorldValueMappingSequence",
}
_PET_UNITS = {"Bq/ml": "BQML", "g/ml{SUVbw}": "GML"}  # UCUM -> Units of a classic PET image
_OF_THE_INSTANCE = {  # what says that there are several frames, and where they are
    tag_for_keyword(keyword)
    for keyword in (
        "NumberOfFrames",
        "SharedFunctionalGroupsSequence",
        "PerFrameFunctionalGroupsSequence",
        "DimensionOrganizationSequence",
        "DimensionIndexSequence",
        "DimensionOrganizationType",
        "ExtendedOffsetTable",
        "ExtendedOffsetTableLengths",
        "PixelData",
        "IconImageSequence",
    )
}


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One slice of an SOP instance.

    Attributes:
        dataset: the instance.
        header: a dataset that reads like a classic instance of this slice alone, pixels included
            where `dataset` has them. SOPClassUID and SOPInstanceUID are those of `dataset`; that it
            is a frame is told by `frame_number`. A classic instance is its own header.
        number: from 1; None in a classic instance.
    """

    dataset: Dataset
    header: Dataset
    number: int | None


@dataclass(frozen=True, slots=True)
class Ignored:
    """An instance, or frame, that is no slice of anything, and why."""

    sop_instance_uid: str
    code: str
    reason: str
    frame: int | None = None


def frame_number(header: Dataset) -> int | None:
    """What ReferencedFrameNumber must say to refer to a slice; None for a classic instance.

    Args:
        header: of a slice, as `frames_of` and `volume_from_datasets` return them.
    """
    number = header.get("ReferencedFrameNumber")
    return number if isinstance(number, int) else None


def is_enhanced(dataset: Dataset) -> bool:
    """Whether an instance has its slices as frames with functional groups (PS3.3 C.7.6.16)."""
    return dataset.get("SOPClassUID") in ENHANCED


def frames_of(dataset: Dataset) -> list[Frame]:
    """Every slice of an instance, in the order of its frames.

    Shared and per-frame functional groups are folded into one header per frame; private ones are
    left out. The instance may have been read without its pixel data, then headers have none. A
    header of a frame is its own and only slice.

    Raises:
        SeriesRefused: NO_GEOMETRY (functional groups do not fit the number of frames), UNDECODABLE
            (nor does the pixel data).
    """
    if not is_enhanced(dataset) or _is_header(dataset):
        return [Frame(dataset, dataset, frame_number(dataset))]
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    count = dataset.get("NumberOfFrames")
    if not isinstance(count, int) or len(groups) != count or count < 1:
        raise refused("NO_GEOMETRY", dataset, "no functional groups per frame", "send it again")
    base = _base(dataset)
    for item in dataset.get("SharedFunctionalGroupsSequence") or []:
        _fold(base, item)
    pixels = _pixels(dataset, count) if "PixelData" in dataset else iter([None] * count)
    frames = []
    for number, (group, element) in enumerate(zip(groups, pixels, strict=True), start=1):
        header = Dataset()
        header.update(base)
        _fold(header, group)
        hand_on_text(dataset, header)
        header.add_new("ReferencedFrameNumber", "IS", number)
        header.add_new("InstanceNumber", "IS", number)
        if element is not None:
            header.add(element)
        if hasattr(dataset, "file_meta"):
            header.file_meta = dataset.file_meta
        frames.append(Frame(dataset, header, number))
    return frames


def slices_of(datasets: Iterable[Dataset]) -> tuple[list[Dataset], list[Ignored]]:
    """The header of every slice that instances hold, and what is no slice, in the order given.

    No slice: what has no pixels (NOT_AN_IMAGE), is neither CT, MR nor PET (NOT_CT_MR_PET), has
    several frames without functional groups (NOT_SINGLE_FRAME), is a LOCALIZER or a MOSAIC, cannot
    be taken apart (NO_GEOMETRY, UNDECODABLE), or is there already (REPEATED).
    """
    slices: list[Dataset] = []
    ignored: list[Ignored] = []
    seen: set[tuple[str, int | None]] = set()
    for dataset in datasets:
        uid = str(dataset.get("SOPInstanceUID"))
        key = (uid, frame_number(dataset))
        code = "REPEATED" if key in seen else _no_image(dataset)
        seen.add(key)
        if code is not None:
            ignored.append(Ignored(uid, code, _WHY[code]))
            continue
        try:
            frames = frames_of(dataset)
        except SeriesRefused as refusal:
            ignored.append(Ignored(uid, refusal.code, refusal.message))
            continue
        for frame in frames:
            code = _no_slice(frame.header)
            if code is None:
                slices.append(frame.header)
            else:
                ignored.append(Ignored(uid, code, _WHY[code], frame.number))
    return slices, ignored


def why_nothing(codes: Sequence[str]) -> str:
    """The code of a series in which nothing is a slice, from those of its instances.

    The most frequent one; that an instance is there twice says nothing about either.
    """
    telling = [code for code in codes if code != "REPEATED"] or ["NOT_AN_IMAGE"]
    return Counter(sorted(telling)).most_common(1)[0][0]


def _is_header(dataset: Dataset) -> bool:
    return frame_number(dataset) is not None and "PerFrameFunctionalGroupsSequence" not in dataset


_WHY = {
    "NOT_AN_IMAGE": "has no pixels",
    "NOT_CT_MR_PET": "is no CT, MR or PET image",
    "NOT_SINGLE_FRAME": "has several frames but no functional groups",
    "LOCALIZER": "is a localizer",
    "MOSAIC": "is a mosaic of several slices in one image",
    "REPEATED": "is there already",
}


def _no_image(dataset: Dataset) -> str | None:
    if "Rows" not in dataset:
        return "NOT_AN_IMAGE"
    if dataset.get("SOPClassUID") not in TRANSLATABLE:
        return "NOT_CT_MR_PET"
    frames = dataset.get("NumberOfFrames")
    if not is_enhanced(dataset) and isinstance(frames, int) and frames > 1:
        return "NOT_SINGLE_FRAME"
    return None


def _no_slice(header: Dataset) -> str | None:
    kind = header.get("ImageType") or ()
    if "LOCALIZER" in kind:
        return "LOCALIZER"
    if "MOSAIC" in kind:
        return "MOSAIC"
    try:  # Siemens; the image type may have been shortened by others
        images = header.private_block(0x0019, "SIEMENS MR HEADER")[0x0A].value
    except KeyError:
        return None
    return "MOSAIC" if isinstance(images, int) and images > 1 else None


def _base(dataset: Dataset) -> Dataset:
    """What is true of all frames: the instance's own attributes."""
    base = Dataset()
    for tag in dataset.keys():  # noqa: SIM118 - a Dataset iterates elements
        if tag not in _OF_THE_INSTANCE and not tag.is_private:
            base.add(dataset[tag])
    return base


def _fold(header: Dataset, group: Dataset) -> None:
    """Put the attributes of one item of functional groups where a classic image has them."""
    for macro in group:
        if macro.tag.is_private or macro.keyword in _LEFT_OUT:
            continue
        if macro.keyword in _WHOLE or macro.VR != "SQ":
            header.add(macro)
        elif macro.value:
            for element in macro.value[0]:
                if not element.tag.is_private:
                    _place(header, element)
    if "Units" not in header and header.get("SOPClassUID") == EnhancedPETImageStorage:
        _fold_pet_units(header, group)


def _fold_pet_units(header: Dataset, group: Dataset) -> None:
    """Enhanced PET has its unit in a real world value mapping (PS3.3 C.7.6.16.2.11)."""
    for mapping in group.get("RealWorldValueMappingSequence") or []:
        code = (mapping.get("MeasurementUnitsCodeSequence") or [Dataset()])[0].get("CodeValue")
        if code in _PET_UNITS and "RealWorldValueSlope" in mapping:
            header.add_new("Units", "CS", _PET_UNITS[code])
            for part in ("Slope", "Intercept"):
                number = float(mapping.get(f"RealWorldValue{part}") or 0)
                header.add_new(f"Rescale{part}", "DS", DSfloat(number, auto_format=True))
            return


def _place(header: Dataset, element: DataElement) -> None:
    keyword = _RENAMED.get(element.keyword, element.keyword)
    if keyword == element.keyword:
        header.add(element)
    elif keyword and element.value not in (None, ""):
        vr = dictionary_VR(keyword)
        header.add(DataElement(tag_for_keyword(keyword) or 0, vr, _as_vr(vr, element.value)))
        if keyword == "AcquisitionDateTime":
            _add_date_and_time(header, str(element.value))


def _as_vr(vr: str, value: Any) -> Any:
    if vr == "DS":
        return DSfloat(float(value), auto_format=True)
    return round(float(value)) if vr == "IS" else value


def _add_date_and_time(header: Dataset, moment: str) -> None:
    """AcquisitionDate and AcquisitionTime of a DT value; its offset is left in the DT."""
    digits = moment.split("+")[0].split("-")[0].strip()
    if len(digits) >= 14:
        header.add_new("AcquisitionDate", "DA", digits[:8])
        header.add_new("AcquisitionTime", "TM", digits[8:])


def _pixels(dataset: Dataset, count: int) -> Iterator[DataElement]:
    """Each frame's Pixel Data; native frames are views into that of the instance, not copies."""
    whole = dataset["PixelData"]
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
        try:
            extended = None if None in offsets else offsets
            found = list(
                generate_frames(whole.value, number_of_frames=count, extended_offsets=extended)
            )
        except Exception as error:  # whatever a damaged table of offsets makes pydicom raise
            raise _not_in_frames(dataset) from error
        if len(found) != count:
            raise _not_in_frames(dataset)
        for frame in found:
            element = DataElement(whole.tag, "OB", encapsulate([frame]))
            element.is_undefined_length = True
            yield element
        return
    length = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("BitsAllocated") or 0) // 8
    length *= int(dataset.get("SamplesPerPixel") or 1)
    if length == 0 or len(whole.value) < length * count:
        raise _not_in_frames(dataset)
    data = memoryview(whole.value)
    for start in range(0, length * count, length):
        yield DataElement(whole.tag, whole.VR, data[start : start + length], already_converted=True)


def _not_in_frames(dataset: Dataset) -> SeriesRefused:
    return refused("UNDECODABLE", dataset, "pixel data is not in frames", "send it again")
