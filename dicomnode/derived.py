"""A translated volume as a new derived series with its provenance, slice for slice.

Same source, package, options and `now` give the same bytes.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import highdicom
import numpy as np
from pydicom import DataElement, Dataset
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
)

from dicomnode.attributes import (
    CONTRAST,
    SIDE,
    WINDOW,
    copy_attributes,
    copy_laterality,
    copy_tags,
    copy_window,
    raw_values,
    shallow_copy,
    tags_of,
)
from dicomnode.composite import zone_of
from dicomnode.encodings import Storage, storage_before, storage_for
from dicomnode.errors import ConfigError
from dicomnode.imaging.frames import frame_number
from dicomnode.imaging.marks import IMPLEMENTATION_CLASS_UID, reproducible_uid
from dicomnode.imaging.pixels import is_lossy, numbers_of, pixel_digest, stored_values
from dicomnode.imaging.planes import Planes
from dicomnode.imaging.verbatim import unencodable
from dicomnode.label import label_pixels
from dicomnode.numbering import images_number
from dicomnode.outputs import Output, check_source, output_of
from dicomnode.provenance import (
    Identity,
    add_equipment,
    add_loss,
    add_provenance,
    add_related_series,
    add_source_image,
    coding_scheme,
    contributing_equipment,
    plain_text,
)

__all__ = [
    "Identity",
    "OutputOptions",
    "derive_series",
    "derived_instance_uid",
    "derived_series_uid",
    "slice_key",
    "source_digests",
]

log = logging.getLogger(__name__)

SCHEMA_VERSION = 4
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
        stack: number from 1 of a stack of several, else 0.
        stack_name: what tells the stack from the others, for the description.
        label: burned: the words of label.py are burned into every image; none.
        generation: how often this very result was retracted before. A late slice needs none: the
            set of source slices is in the UIDs. But an archive that was told to reject a series
            "shall not accept subsequent occurrence" of its UIDs (IHE RAD IOCM), so the same
            images translated again after a retraction must have others.

    Raises:
        ConfigError: a value cannot be used; the message starts with the name of the option.
    """

    series_number: str | int = "+1000"
    description: str = "{source} [SYN {model}]"
    content_qualification: str = "RESEARCH"
    generation: int = 0
    label: Literal["none", "burned"] = "none"
    stack: int = 0
    stack_name: str = ""

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


def slice_key(dataset: Dataset) -> str:
    """What names one source slice: its SOP Instance UID, and ``#frame`` where it is a frame."""
    frame = frame_number(dataset)
    return str(dataset.SOPInstanceUID) + ("" if frame is None else f"#{frame}")


def source_digests(datasets: Iterable[Dataset]) -> dict[str, str]:
    """`slice_key` -> sha256 (hex) of the decoded stored pixel values.

    Raises:
        SeriesRefused: UNDECODABLE.
    """
    return {slice_key(ds): pixel_digest(stored_values(ds)) for ds in datasets}


def derived_series_uid(
    digests: Mapping[str, str], package_digest: str, options: OutputOptions
) -> str:
    """Series Instance UID of what a package and options make of these source slices.

    Args:
        digests: as from `source_digests`, in any order.
    """
    chosen = [str(options.series_number), options.description, options.content_qualification]
    if options.label != "none":
        chosen.append(f"label {options.label}")
    if options.stack:
        chosen.append(f"stack {options.stack} {options.stack_name}")
    return reproducible_uid(
        "series",
        SCHEMA_VERSION,
        sorted(digests.items()),
        package_digest,
        [*chosen, options.generation],
    )


def derived_instance_uid(series_uid: str, source_slice: str) -> str:
    """SOP Instance UID of one source slice's derivative in a derived series.

    Args:
        source_slice: as from `slice_key`.
    """
    return reproducible_uid("instance", series_uid, source_slice)


def derive_series(
    prediction: Planes,
    source: Planes,
    datasets: Sequence[Dataset],
    identity: Identity,
    options: OutputOptions,
    now: datetime,
    *,
    use_template: bool = True,
    storage: Storage | None = None,
) -> Iterator[Dataset]:
    """Derived instances, one per source slice, in slice order, ready to be written.

    What they are is said by `identity.task` (outputs.py), how values are stored by encodings.py:
    within half a rescale quantum of the prediction; padding stays where it was.

    Args:
        prediction: in the unit of the output type, on the grid of `source`.
        source: the volume that was made of `datasets`.
        datasets: source slices in slice order, as `volume_from_datasets` returns them.
        now: aware; written as the time of derivation, in the time zone of the source if it has one.
        use_template: build what slices share once. False: anew for each, which gives the same
            bytes and takes longer; there to be compared with.
        storage: see `storage_ahead`; None: found now, which takes every slice of `prediction`.

    Raises:
        SeriesRefused: see `check_source`, `storage_for` and `label_pixels`.
        ValueError: prediction, source and datasets do not belong together, or `now` is naive.
    """
    output = output_of(identity.task, prediction.unit)
    check_source(datasets, identity.task, accept_synthetic=True)
    _check_arguments(prediction, source, datasets, now)
    if prediction.unit not in output.units:
        raise ValueError(f"{identity.task} gives {output.units}, not {prediction.unit}")
    if storage is None:
        storage = storage_for(output.stored, prediction, source, datasets)
    if options.label == "burned":
        label = label_pixels(*source.shape[1:])
        params = f"{identity.params} burned-in label={label.sum()} pixels lost".strip()
        storage, identity = replace(storage, label=label), replace(identity, params=params)
    series = _Series(datasets, source.digests, storage, output, identity, options, now)
    return (series.instance(index, use_template) for index in range(len(datasets)))


def storage_ahead(
    prediction: Planes,
    source: Planes,
    datasets: Sequence[Dataset],
    task: str,
    options: OutputOptions,
) -> Storage | None:
    """How slices are stored if all of them fit, before any was predicted; None: nobody can tell.

    With it, `derive_series` makes one instance after the other as `prediction` gives its slices,
    and raises `encodings.DoesNotFit` where it was wrong: then the series is to be made anew.
    """
    if options.label != "none":  # as bright as the brightest voxel of all slices
        return None
    return storage_before(output_of(task).stored, prediction, source, datasets)


def _check_arguments(
    prediction: Planes, source: Planes, datasets: Sequence[Dataset], now: datetime
) -> None:
    if now.tzinfo is None:
        raise ValueError("now: give a time with its zone")
    if prediction.shape != source.shape or len(datasets) != source.shape[0]:
        raise ValueError("prediction, source and datasets do not have the same slices")
    here = [numbers_of(dataset, "ImagePositionPatient", 3, "NO_GEOMETRY") for dataset in datasets]
    if not np.array_equal(here, source.positions):
        raise ValueError("datasets are not in the slice order of source")


class _Series:
    """What the instances of one derived series share."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        digests: Sequence[str],
        storage: Storage,
        output: Output,
        identity: Identity,
        options: OutputOptions,
        now: datetime,
    ) -> None:
        first = datasets[0]
        self.datasets = datasets
        self.storage = storage
        self.identity = identity
        self.output = output
        self.keys = [slice_key(dataset) for dataset in datasets]
        by_key = dict(zip(self.keys, digests, strict=True)) if digests else source_digests(datasets)
        self.uid = derived_series_uid(by_key, identity.digest, options)
        self.number = images_number(first.get("SeriesNumber"), options.series_number, options.stack)
        self.description = _series_description(first, identity, options)
        self.qualification = first.get("ContentQualification") or options.content_qualification
        if self.qualification not in ("RESEARCH", "SERVICE"):
            self.qualification = options.content_qualification
        self.now = now.astimezone(zone_of(first) or now.tzinfo)
        self.numbers = _instance_numbers(datasets)
        self.equipment = contributing_equipment(datasets, identity, self.now)
        self.frame_uid = reproducible_uid("frame", str(first.SeriesInstanceUID))
        if not first.get("FrameOfReferenceUID"):
            log.info("series %s has no frame of reference: no overlay link", self.uid)
        self.slice_tags = self.output.slice_tags
        self.shared_tags = self.output.shared_tags
        self.deciding_tags = (*self.shared_tags, *tags_of((*WINDOW, *SIDE, "FrameOfReferenceUID")))
        self._header: list[Any] = []
        self._template = Dataset()

    def instance(self, index: int, use_template: bool) -> Dataset:
        """One derived instance."""
        source = self.datasets[index]
        derived = self._copy_of_template(source) if use_template else self._shared(source)
        derived.SOPInstanceUID = derived_instance_uid(self.uid, self.keys[index])
        derived.file_meta.MediaStorageSOPInstanceUID = derived.SOPInstanceUID
        derived.InstanceNumber = self.numbers[index]
        copy_tags(derived, source, self.slice_tags)
        if self.output.source == "PT":
            derived.ImageIndex = index + 1
        if self.output.keeps_contrast and _has_contrast(source):
            copy_attributes(derived, source, CONTRAST)
        add_source_image(derived, source)
        if is_lossy(source):
            add_loss(derived, source)
        self.storage.describe(derived, source, index)
        if self.storage.label is not None:
            derived.BurnedInAnnotation = "YES"
        return derived

    def _copy_of_template(self, source: Dataset) -> Dataset:
        """What `_shared` gives; built only where the tags that decide it are not the last ones."""
        header = [_syntax(source), *raw_values(source, self.deciding_tags)]
        if header != self._header:
            self._header, self._template = header, self._shared(source)
        return shallow_copy(self._template)

    def _shared(self, source: Dataset) -> Dataset:
        """Identification, provenance, patient, study, equipment: by `deciding_tags` of `source`."""
        derived = self._identification(source)
        for keyword in self.output.type_2:
            setattr(derived, keyword, None)
        copy_tags(derived, source, self.shared_tags)
        copy_laterality(derived, source)
        if self.storage.window is None:
            copy_window(derived, source)
        derived.FrameOfReferenceUID = source.get("FrameOfReferenceUID") or self.frame_uid
        add_provenance(derived, self.identity)
        add_related_series(derived, source)
        derived.add_new("ContributingEquipmentSequence", "SQ", self.equipment)
        derived.SamplesPerPixel, derived.PhotometricInterpretation = 1, "MONOCHROME2"
        derived.BitsAllocated = 16
        for keyword, value in self.output.constants.items():
            setattr(derived, keyword, value)
        if self.output.source == "PT":
            derived.NumberOfSlices = len(self.datasets)
            if derived.PatientOrientationCodeSequence:
                derived.pop("PatientPosition", None)  # one of the two says it (PS3.3 C.7.3.1)
        return derived

    def _identification(self, source: Dataset) -> highdicom.SOPClass:
        """The series' own identifiers, equipment and times.

        No patient attribute passes through highdicom's constructor, which logs what it dislikes.
        """
        derived = highdicom.SOPClass(
            study_instance_uid=source.StudyInstanceUID,
            series_instance_uid=self.uid,
            series_number=self.number,
            sop_instance_uid=self.uid,  # replaced by that of each instance
            sop_class_uid=self.output.sop_class,
            instance_number=1,
            modality=self.output.modality,
            manufacturer=None,
            transfer_syntax_uid=ExplicitVRLittleEndian,
            content_qualification=self.qualification,
            coding_schemes=[coding_scheme()],
        )
        derived.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
        derived.file_meta.ImplementationVersionName = "DICOMNODE"
        add_equipment(derived, self.identity)
        derived["SeriesDescription"] = DataElement(
            "SeriesDescription", "LO", self.description, already_converted=True
        )
        kinds = ["InstanceCreation", "Content"]
        if self.output.source != "PT":  # SUV depends on SeriesDate and SeriesTime: never ours
            kinds.append("Series")
        for kind in kinds:
            setattr(derived, f"{kind}Date", f"{self.now:%Y%m%d}")
            setattr(derived, f"{kind}Time", f"{self.now:%H%M%S.%f}")
        return derived


def _syntax(dataset: Dataset) -> UID:
    return UID(dataset.file_meta.TransferSyntaxUID)


def _has_contrast(source: Dataset) -> bool:
    return bool(source.get("ContrastBolusAgent") or source.get("ContrastBolusAgentSequence"))


def _series_description(first: Dataset, identity: Identity, options: OutputOptions) -> str | bytes:
    """At most 64 characters; only the model's name and the source's text are cut, ending in ~.

    Bytes where the source's text cannot be encoded again and need not be cut.
    """
    fixed = len(options.description.replace("{source}", "").replace("{model}", ""))
    name = re.sub(r"[{}]", "", f"stack {options.stack} {options.stack_name}")
    remark = f" {identity.remark}" if identity.remark else ""
    stack = f" ({plain_text(name, 20 - len(remark))})" if options.stack else ""
    model = plain_text(identity.name, max(60 - fixed - len(stack + remark), 1)) + remark
    template = options.description.replace("{model}", model) + stack
    source = first.get("SeriesDescription") or ""
    if not isinstance(source, str):
        source = " ".join(str(part) for part in source)  # a backslash made it several values
    source = "".join(c for c in source if c.isprintable() and c != "\\").strip()
    room = 64 - len(template.replace("{source}", ""))
    if len(source) > room:
        source = source[: max(room - 1, 0)] + "~"[:room]
    elif (sent := unencodable(first, "SeriesDescription")) is not None:
        return template.encode().replace(b"{source}", sent).strip()
    return template.replace("{source}", source).strip()


def _instance_numbers(datasets: Sequence[Dataset]) -> list[int]:
    """The source's InstanceNumbers if they can serve, else 1, 2, 3 ... in slice order."""
    numbers = [dataset.get("InstanceNumber") for dataset in datasets]
    usable = all(isinstance(number, int) and number >= 1 for number in numbers)
    if usable and len(set(numbers)) == len(numbers):
        return [int(number) for number in numbers]
    return list(range(1, len(datasets) + 1))
