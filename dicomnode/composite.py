"""What the companions of a derived series have in common: patient, study, equipment, times, UIDs.

A companion is a GSPS, an SR or a KO: it refers to images and has no pixels of its own.
"""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from pydicom import Dataset
from pydicom.uid import UID

from dicomnode.attributes import copy_attributes, copy_item, copy_tags, patient_and_study
from dicomnode.imaging.marks import IMPLEMENTATION_CLASS_UID, reproducible_uid
from dicomnode.provenance import Identity, add_equipment, coding_scheme

_COPIED = [
    "SpecificCharacterSet",
    "TimezoneOffsetFromUTC",
    "SyntheticData",
    "ContentQualification",
    "InstitutionName",
    "InstitutionalDepartmentName",
]


def zone_of(dataset: Dataset) -> timezone | None:
    """TimezoneOffsetFromUTC, if it is one."""
    found = re.fullmatch(r"([+-])(\d\d)(\d\d)", str(dataset.get("TimezoneOffsetFromUTC") or ""))
    if found is None or int(found[2]) > 14 or int(found[3]) > 59:
        return None
    offset = timedelta(hours=int(found[2]), minutes=int(found[3]))
    return timezone(-offset if found[1] == "-" else offset)


def companion_uids(
    images: Sequence[Dataset], kind: str, *parts: object, number: int = 1
) -> dict[str, Any]:
    """The identifiers of a companion as arguments of highdicom's constructors.

    Reproducible: of the images' series and `kind`, and of `parts`, which are what else decides
    the bytes.

    Args:
        number: InstanceNumber in the companion's series.
    """
    series = reproducible_uid("companion", str(images[0].SeriesInstanceUID), kind, parts)
    return {
        "series_instance_uid": series,
        "sop_instance_uid": reproducible_uid("companion instance", series, number),
        "instance_number": number,
    }


def without_patient(images: Sequence[Dataset]) -> list[Dataset]:
    """What identifies the images and nobody else, as highdicom wants evidence.

    No patient attribute passes through highdicom's constructors: they log what they dislike,
    refuse ``\\ISO 2022 IR 149``, and copy only some. `finish` copies all of them.
    """
    bare = []
    for image in images:
        item = Dataset()
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"):
            setattr(item, keyword, None)
        for keyword in ("AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
            setattr(item, keyword, None)
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID"):
            setattr(item, keyword, str(image[keyword].value))
        bare.append(item)
    return bare


def finish(
    companion: Dataset, image: Dataset, identity: Identity, now: datetime, description: str
) -> None:
    """Give a companion what it shares with its images, its equipment and its times.

    Args:
        image: header of one of the images.
        now: aware; written in the time zone of the images if they have one.
        description: SeriesDescription, ASCII, at most 64 characters.

    Raises:
        ValueError: `now` is naive.
    """
    if now.tzinfo is None:
        raise ValueError("now: give a time with its zone")
    copy_tags(companion, image, patient_and_study())
    copy_attributes(companion, image, _COPIED)
    add_equipment(companion, identity)
    companion.SeriesDescription = description
    companion.CodingSchemeIdentificationSequence = [coding_scheme()]
    equipment = image.get("ContributingEquipmentSequence") or ()
    companion.ContributingEquipmentSequence = [copy_item(item) for item in equipment]
    companion.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    companion.file_meta.ImplementationVersionName = "DICOMNODE"
    now = now.astimezone(zone_of(image) or now.tzinfo)
    companion.SeriesDate = companion.SeriesTime = ""
    for kind in ("InstanceCreation", "Series", "Content", "PresentationCreation"):
        if f"{kind}Date" in companion:
            setattr(companion, f"{kind}Date", f"{now:%Y%m%d}")
            setattr(companion, f"{kind}Time", f"{now:%H%M%S.%f}")
