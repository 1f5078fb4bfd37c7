"""A translated volume as a new derived CT series with its provenance, slice for slice.

Same source, package, options and `now` give the same bytes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import highdicom
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from dicomnode.attributes import copy_attributes, copy_image_attributes, copy_patient_and_study
from dicomnode.errors import ConfigError, SeriesRefused
from dicomnode.imaging.marks import MANUFACTURER
from dicomnode.imaging.pixels import (
    SIGNED_16,
    Encoding,
    encode,
    encoding_of,
    is_lossy,
    numbers_of,
    pixel_digest,
    stored_values,
    without_loss,
)
from dicomnode.imaging.volume import Volume
from dicomnode.provenance import (
    IMPLEMENTATION_CLASS_UID,
    TASKS,
    Identity,
    add_provenance,
    add_references,
    coding_scheme,
    contributing_equipment,
    plain_text,
    reproducible_uid,
    software_versions,
)

__all__ = [
    "Identity",
    "OutputOptions",
    "derive_series",
    "derived_instance_uid",
    "derived_series_uid",
    "source_digests",
]

SCHEMA_VERSION = 1
"""Part of every derived UID: goes up when the same input would give other attributes."""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What a route says about the derived series; part of its UIDs.

    Attributes:
        series_number: "+N" is added to the source's SeriesNumber, an integer replaces it.
        description: SeriesDescription with the fields {source} and {model}; ASCII. The source's
            text is cut so that the rest stays whole within 64 characters.
        content_qualification: RESEARCH, PRODUCT or SERVICE (PS3.3 C.12.1.1.8); a source that is
            RESEARCH or SERVICE keeps its own.

    Raises:
        ConfigError: a value cannot be used; the message starts with the name of the option.
    """

    series_number: str | int = "+1000"
    description: str = "{source} [SYN {model}]"
    content_qualification: str = "RESEARCH"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\+[0-9]{1,9}|[1-9][0-9]{0,8}", str(self.series_number)):
            raise ConfigError("series_number: give +1 to +999999999, or a number from 1 on")
        marker = self.description.replace("{source}", "").strip()
        if not marker or not marker.isascii() or not marker.isprintable() or "\\" in marker:
            raise ConfigError("description: beside {source} give a marker in ASCII, no backslash")
        if len(marker.replace("{model}", "")) > 40:
            raise ConfigError("description: at most 40 characters beside {source} and {model}")
        if self.content_qualification not in ("RESEARCH", "PRODUCT", "SERVICE"):
            raise ConfigError("content_qualification: give RESEARCH, PRODUCT or SERVICE")


def source_digests(datasets: Iterable[Dataset]) -> dict[str, str]:
    """SOP Instance UID -> sha256 (hex) of the decoded stored pixel values.

    Raises:
        SeriesRefused: UNDECODABLE.
    """
    return {str(ds.SOPInstanceUID): pixel_digest(stored_values(ds)) for ds in datasets}


def derived_series_uid(
    digests: Mapping[str, str], package_digest: str, options: OutputOptions
) -> str:
    """Series Instance UID of what a package and options make of these source instances.

    Args:
        digests: as from `source_digests`, in any order.
    """
    chosen = [str(options.series_number), options.description, options.content_qualification]
    return reproducible_uid(
        "series", SCHEMA_VERSION, sorted(digests.items()), package_digest, chosen
    )


def derived_instance_uid(series_uid: str, source_sop_instance_uid: str) -> str:
    """SOP Instance UID of one source instance's derivative in a derived series."""
    return reproducible_uid("instance", series_uid, source_sop_instance_uid)


def derive_series(
    prediction: Volume,
    source: Volume,
    datasets: Sequence[Dataset],
    identity: Identity,
    options: OutputOptions,
    now: datetime,
) -> Iterator[Dataset]:
    """Derived instances, one per source instance, in slice order, ready to be written.

    Values are stored as the source stores them if they fit, else the whole series as signed 16-bit
    HU; either way within half a rescale quantum. Padding stays where and what it was.

    Args:
        prediction: (slices, rows, columns), float32, HU, on the grid of `source`.
        source: the volume that was made of `datasets`.
        datasets: source instances in slice order, as `volume_from_datasets` returns them.
        now: aware; written as the time of derivation, in the time zone of the source if it has one.

    Raises:
        SeriesRefused: TASK_NOT_YET, OUTPUT_NOT_FINITE, OUTPUT_OUT_OF_RANGE.
        ValueError: prediction, source and datasets do not belong together, or `now` is naive.
    """
    _check_arguments(prediction, source, datasets, now)
    if identity.task not in TASKS:
        raise SeriesRefused("TASK_NOT_YET", f"task {identity.task}", "use a denoise package")
    encodings = _output_encodings(prediction, source, datasets)
    series = _Series(datasets, source.digests, identity, options, now)
    return (
        series.instance(index, encoding, _plane(index, encoding, prediction, source))
        for index, encoding in enumerate(encodings)
    )


def _check_arguments(
    prediction: Volume, source: Volume, datasets: Sequence[Dataset], now: datetime
) -> None:
    if now.tzinfo is None:
        raise ValueError("now: give a time with its zone")
    if prediction.unit != "HU" or source.unit != "HU":
        raise ValueError(f"prediction in {prediction.unit}, source in {source.unit}: only HU")
    if prediction.voxels.shape != source.voxels.shape or len(datasets) != len(source.voxels):
        raise ValueError("prediction, source and datasets do not have the same slices")
    here = [numbers_of(dataset, "ImagePositionPatient", 3, "NO_GEOMETRY") for dataset in datasets]
    if not np.array_equal(here, source.positions):
        raise ValueError("datasets are not in the slice order of source")
    if not np.isfinite(prediction.voxels).all():
        raise SeriesRefused(
            "OUTPUT_NOT_FINITE", "the model gave NaN or infinity", "check the model"
        )


def _native(volume: Volume, index: int) -> NDArray[np.bool_] | bool:
    return True if volume.padding is None else ~volume.padding[index]


def _output_encodings(
    prediction: Volume, source: Volume, datasets: Sequence[Dataset]
) -> list[Encoding]:
    """Each slice's own encoding if all fit, else signed 16 bit for all; never a mixture."""
    own = [encoding_of(dataset) for dataset in datasets]
    planes = list(enumerate(prediction.voxels))
    if all(without_loss(own[i], plane, _native(source, i)) for i, plane in planes):
        return own
    whole = [_whole_hu(encoding) for encoding in own]
    if not all(without_loss(whole[i], plane, _native(source, i)) for i, plane in planes):
        raise SeriesRefused("OUTPUT_OUT_OF_RANGE", "values beyond 16 bits", "check the model")
    return whole


def _whole_hu(own: Encoding) -> Encoding:
    """Signed 16-bit HU, with a padding value where the source has one."""
    if own.padding is None:
        return SIGNED_16
    low, high = SIGNED_16.limits
    padding = round(min(max(own.padding[0] * own.slope + own.intercept, low), high))
    return Encoding(16, True, 1.0, 0.0, (padding, padding))


def _plane(index: int, encoding: Encoding, prediction: Volume, source: Volume) -> NDArray[Any]:
    """Stored values of one slice; padded voxels as the source has them."""
    mask = None if source.padding is None else source.padding[index]
    padded: NDArray[Any] | int = encoding.to_stored(source.voxels[index])
    if encoding.padding is not None and encoding.padding[0] == encoding.padding[1]:
        padded = encoding.padding[0]
    return encode(encoding, prediction.voxels[index], mask, padded)


class _Series:
    """What the instances of one derived series share."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        digests: Sequence[str],
        identity: Identity,
        options: OutputOptions,
        now: datetime,
    ) -> None:
        first = datasets[0]
        self.datasets = datasets
        self.identity = identity
        uids = [str(dataset.SOPInstanceUID) for dataset in datasets]
        by_uid = dict(zip(uids, digests, strict=True)) if digests else source_digests(datasets)
        self.uid = derived_series_uid(by_uid, identity.digest, options)
        self.number = _series_number(first.get("SeriesNumber"), options.series_number)
        self.description = _series_description(first, identity, options)
        self.qualification = first.get("ContentQualification") or options.content_qualification
        if self.qualification not in ("RESEARCH", "SERVICE"):
            self.qualification = options.content_qualification
        self.now = now.astimezone(_zone_of(first) or now.tzinfo)
        self.numbers = _instance_numbers(datasets)
        self.equipment = contributing_equipment(datasets, identity, self.now)
        self.frame_uid = reproducible_uid("frame", str(first.SeriesInstanceUID))

    def instance(self, index: int, encoding: Encoding, stored: NDArray[Any]) -> Dataset:
        """One derived instance; `stored` is (rows, columns), int16 or uint16."""
        source = self.datasets[index]
        derived = self._identification(source, self.numbers[index])
        copy_patient_and_study(derived, source)
        copy_image_attributes(derived, source)
        add_provenance(derived, self.identity)
        add_references(derived, source)
        derived.add_new("ContributingEquipmentSequence", "SQ", self.equipment)
        derived.FrameOfReferenceUID = source.get("FrameOfReferenceUID") or self.frame_uid
        if is_lossy(source):
            derived.LossyImageCompression = "01"
        _add_pixels(derived, source, encoding, stored)
        copy_attributes(derived, source, ["SpecificCharacterSet"])
        return derived

    def _identification(self, source: Dataset, number: int) -> highdicom.SOPClass:
        """The instance's own identifiers, equipment and times.

        No patient attribute passes through highdicom's constructor, which logs what it dislikes.
        """
        derived = highdicom.SOPClass(
            study_instance_uid=source.StudyInstanceUID,
            series_instance_uid=self.uid,
            series_number=self.number,
            sop_instance_uid=derived_instance_uid(self.uid, str(source.SOPInstanceUID)),
            sop_class_uid=CTImageStorage,
            instance_number=number,
            modality="CT",
            manufacturer=MANUFACTURER,
            manufacturer_model_name=plain_text(self.identity.name, 64),
            transfer_syntax_uid=ExplicitVRLittleEndian,
            content_qualification=self.qualification,
            coding_schemes=[coding_scheme()],
        )
        derived.add_new("SoftwareVersions", "LO", software_versions(self.identity))
        derived.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
        derived.file_meta.ImplementationVersionName = "DICOMNODE"
        derived.InstanceCreatorUID = IMPLEMENTATION_CLASS_UID
        derived.SeriesDescription = self.description
        for kind in ("InstanceCreation", "Series", "Content"):
            setattr(derived, f"{kind}Date", f"{self.now:%Y%m%d}")
            setattr(derived, f"{kind}Time", f"{self.now:%H%M%S.%f}")
        return derived


def _series_number(source: Any, rule: str | int) -> int:
    """The rule applied; an unusable SeriesNumber of the source counts as 0 (IS: below 2^31)."""
    text = str(rule)
    if not text.startswith("+"):
        return int(text)
    number = int(source) if isinstance(source, int) and source > 0 else 0
    return int(text) + (number if number + int(text) < 2**31 else 0)


def _series_description(first: Dataset, identity: Identity, options: OutputOptions) -> str:
    """At most 64 characters; only the model's and the source's texts are ever cut, ending in ~."""
    fixed = len(options.description.replace("{source}", "").replace("{model}", ""))
    model = plain_text(identity.name, 60 - fixed)
    template = options.description.replace("{model}", model)
    source = first.get("SeriesDescription") or ""
    if not isinstance(source, str):
        source = " ".join(str(part) for part in source)  # a backslash made it several values
    source = "".join(c for c in source if c.isprintable() and c != "\\").strip()
    room = 64 - len(template.replace("{source}", ""))
    if len(source) > room:
        source = source[: max(room - 1, 0)] + "~"[:room]
    return template.replace("{source}", source).strip()


def _instance_numbers(datasets: Sequence[Dataset]) -> list[int]:
    """The source's InstanceNumbers if they can serve, else 1, 2, 3 ... in slice order."""
    numbers = [dataset.get("InstanceNumber") for dataset in datasets]
    usable = all(isinstance(number, int) and number >= 1 for number in numbers)
    if usable and len(set(numbers)) == len(numbers):
        return [int(number) for number in numbers]
    return list(range(1, len(datasets) + 1))


def _zone_of(dataset: Dataset) -> timezone | None:
    """TimezoneOffsetFromUTC, if it is one."""
    found = re.fullmatch(r"([+-])(\d\d)(\d\d)", str(dataset.get("TimezoneOffsetFromUTC") or ""))
    if found is None or int(found[2]) > 14 or int(found[3]) > 59:
        return None
    offset = timedelta(hours=int(found[2]), minutes=int(found[3]))
    return timezone(-offset if found[1] == "-" else offset)


def _add_pixels(
    derived: Dataset, source: Dataset, encoding: Encoding, stored: NDArray[Any]
) -> None:
    """Image Pixel and the rescale to HU, which is implied for ORIGINAL images only."""
    derived.SamplesPerPixel = 1
    derived.Rows, derived.Columns = stored.shape
    derived.BitsAllocated = 16
    derived.BitsStored, derived.HighBit = encoding.bits_stored, encoding.bits_stored - 1
    derived.PixelRepresentation = int(encoding.signed)
    vr = "SS" if encoding.signed else "US"
    if encoding.padding is not None:
        first, last = encoding.padding
        derived.add_new("PixelPaddingValue", vr, first)
        if first != last:
            derived.add_new("PixelPaddingRangeLimit", vr, last)
    derived.add_new("SmallestImagePixelValue", vr, int(stored.min()))
    derived.add_new("LargestImagePixelValue", vr, int(stored.max()))
    if (encoding.slope, encoding.intercept) == (1.0, 0.0):
        derived.RescaleSlope, derived.RescaleIntercept = "1", "0"
    else:
        copy_attributes(derived, source, ("RescaleSlope", "RescaleIntercept"))
    derived.RescaleType = "HU"
    derived.add_new("PixelData", "OW", stored.astype(stored.dtype.newbyteorder("<")).tobytes())
