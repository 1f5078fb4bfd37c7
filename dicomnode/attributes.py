"""Which attributes of a source instance a derived instance may keep, and how they are copied.

An allow-list: what is not named here, and every private attribute at any depth, stays behind.
Which of the groups an output type takes is said in outputs.py.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import highdicom
from pydicom import DataElement, Dataset
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag
from pydicom.uid import CTImageStorage, generate_uid
from pydicom.valuerep import DSfloat

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.pixels import numbers_of
from dicomnode.imaging.verbatim import sent_bytes, text_as_sent


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COMMON = _words(  # of every output type, copied as they are if present
    # C.7.3.1 General Series, C.7.3.2 Clinical Trial Series
    "BodyPartExamined ProtocolName RequestAttributesSequence AnatomicalOrientationType "
    "ClinicalTrialCoordinatingCenterName ClinicalTrialSeriesID ClinicalTrialSeriesDescription "
    # C.7.5.1 General Equipment
    "InstitutionName InstitutionalDepartmentName "
    # C.7.10.1 General Acquisition
    "AcquisitionDate AcquisitionTime AcquisitionDateTime AcquisitionNumber AcquisitionUID "
    "AcquisitionDuration "
    # C.7.6.1 General Image
    "QualityControlImage BurnedInAnnotation RecognizableVisualFeatures ImageLaterality "
    "AnatomicRegionSequence PrimaryAnatomicStructureSequence PatientOrientation "
    "LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod "
    # C.12.4 General Reference
    "ReferencedImageSequence "
    # C.7.6.2 Image Plane
    "ImagePositionPatient ImageOrientationPatient PixelSpacing SpacingBetweenSlices "
    "SliceLocation "
    # C.12.1 SOP Common
    "SpecificCharacterSet TimezoneOffsetFromUTC LongitudinalTemporalInformationModified"
)
COMMON_OR_EMPTY = _words("PositionReferenceIndicator SliceThickness")
"""Type 2 in every output: copied, or written empty."""

CT = _words(  # C.8.2.1 CT Image: what stays true when a CT is made of a CT
    "ScanOptions DataCollectionDiameter ReconstructionDiameter DistanceSourceToDetector "
    "DistanceSourceToPatient GantryDetectorTilt TableHeight RotationDirection ExposureTime "
    "XRayTubeCurrent Exposure ExposureInuAs FilterType FilterMaterial GeneratorPower FocalSpots "
    "ConvolutionKernel RevolutionTime SingleCollimationWidth TotalCollimationWidth TableSpeed "
    "TableFeedPerRotation SpiralPitchFactor DataCollectionCenterPatient "
    "ReconstructionTargetCenterPatient ExposureModulationType IrradiationEventUID"
)
CT_DOSE = _words("CTDIvol CTDIPhantomTypeCodeSequence")
CONTRAST = _words(  # C.7.6.4 Contrast/Bolus
    "ContrastBolusAgent ContrastBolusAgentSequence ContrastBolusRoute "
    "ContrastBolusAdministrationRouteSequence ContrastBolusVolume ContrastBolusStartTime "
    "ContrastBolusStopTime ContrastBolusTotalDose ContrastFlowRate ContrastFlowDuration "
    "ContrastBolusIngredient ContrastBolusIngredientConcentration"
)

PET = _words(  # C.8.9.1 PET Series, C.8.9.2 Isotope, C.8.9.4 Image, C.8.4.6 NM/PET Orientation
    "SeriesDate SeriesTime CountsSource SeriesType ReprojectionMethod "
    "RandomsCorrectionMethod AttenuationCorrectionMethod AttenuationCorrectionSource "
    "AttenuationCorrectionTemporalRelationship ScatterCorrectionMethod DecayCorrection "
    "ReconstructionDiameter ConvolutionKernel ReconstructionMethod DetectorLinesOfResponseUsed "
    "AcquisitionStartCondition AcquisitionStartConditionData AcquisitionTerminationCondition "
    "AcquisitionTerminationConditionData FieldOfViewShape FieldOfViewDimensions "
    "GantryDetectorTilt GantryDetectorSlew TypeOfDetectorMotion CollimatorGridName "
    "AxialAcceptance AxialMash TransverseMash DetectorElementSize CoincidenceWindowWidth "
    "EnergyWindowRangeSequence InterventionDrugInformationSequence FrameReferenceTime "
    "ActualFrameDuration DecayFactor DoseCalibrationFactor ScatterFractionFactor DeadTimeFactor "
    "SliceSensitivityFactor PatientPosition"
)
PET_OR_EMPTY = _words(
    "CorrectedImage CollimatorType AcquisitionDate AcquisitionTime "
    "RadiopharmaceuticalInformationSequence PatientOrientationCodeSequence "
    "PatientGantryRelationshipCodeSequence"
)

PER_SLICE = _words(
    "AcquisitionDate AcquisitionTime AcquisitionDateTime AcquisitionNumber AcquisitionUID "
    "IrradiationEventUID ImageLaterality PatientOrientation LossyImageCompressionRatio "
    "ReferencedImageSequence ImagePositionPatient SliceLocation ExposureTime XRayTubeCurrent "
    "Exposure ExposureInuAs TableHeight DataCollectionCenterPatient "
    "ReconstructionTargetCenterPatient CTDIvol FrameReferenceTime ActualFrameDuration DecayFactor "
    "ScatterFractionFactor DeadTimeFactor SliceSensitivityFactor"
)
"""What commonly differs from slice to slice, so that a template leaves it out."""
WINDOW = ("WindowCenter", "WindowWidth", "WindowCenterWidthExplanation", "VOILUTFunction")
_PAIRED = frozenset(  # body parts with a side (PS3.16 Annex L)
    _words(
        "ANKLE ARM AXILLA BREAST CALCANEUS CALF CLAVICLE EAR ELBOW EXTREMITY EYE FEMUR FIBULA "
        "FINGER FOOT FOREARM HAND HIP HUMERUS IAC KIDNEY KIDNEYS KNEE LEG LOWERLEG LOWEXTREMITY "
        "LUNG LUNGS OVARY PATELLA RADIUS SCAPULA SCJOINT SHOULDER TESTIS THIGH THUMB TIBIA TMJ "
        "TOE ULNA UPEXTREMITY UPPERARM WRIST ZYGOMA"
    )
)
SIDE = ("Laterality", "BodyPartExamined", "AnatomicRegionSequence", "ImageLaterality")


@cache
def patient_and_study() -> tuple[int, ...]:
    """Tags of every standard attribute of the Patient and Study modules (PS3.3 C.7.1, C.7.2).

    highdicom knows them; it is asked by giving it a source that has nothing.
    """
    asked: list[int] = []

    class Empty(Dataset):
        SOPInstanceUID = ""
        SOPClassUID = CTImageStorage

        def __getitem__(self, key: Any) -> Any:
            asked.append(key)
            raise KeyError(key)

    uid = generate_uid(entropy_srcs=["any"])
    reader = highdicom.SOPClass(uid, uid, 1, uid, CTImageStorage, 1, "CT", "any")
    reader.copy_patient_and_study_information(Empty())
    return tuple(asked)


def tags_of(keywords: Iterable[str]) -> tuple[int, ...]:
    """The tags of keywords of the standard."""
    return tuple(_tag_of(keyword) for keyword in keywords)


@cache
def _tag_of(keyword: str) -> BaseTag:
    return Tag(keyword)


def copy_tags(derived: Dataset, source: Dataset, tags: Iterable[int]) -> None:
    """Copy the attributes that `source` has, value for value; nothing mutable is shared.

    Text keeps its bytes. What `source` has in another VR than the standard's comes in that one; a
    value that cannot is left out.
    """
    for tag in tags:
        copied = _copied(source, tag) if tag in source else None
        if copied is not None:
            derived.add(copied)


def copy_attributes(derived: Dataset, source: Dataset, keywords: Iterable[str]) -> None:
    """Copy the attributes named from `source`, if it has them."""
    copy_tags(derived, source, tags_of(keywords))


def copy_laterality(derived: Dataset, source: Dataset) -> None:
    """Laterality is type 2C: empty only where a side may be missing (PS3.3 C.7.3.1).

    That is a paired body part, or none at all, and no ImageLaterality.
    """
    if source.get("Laterality") in ("L", "R"):
        copy_attributes(derived, source, ["Laterality"])
        return
    part = str(source.get("BodyPartExamined") or "").upper()
    unsaid = not part and not source.get("AnatomicRegionSequence")
    if (part in _PAIRED or unsaid) and not source.get("ImageLaterality"):
        derived.Laterality = None


def copy_window(derived: Dataset, source: Dataset) -> None:
    """The first window only: some viewers ignore all if there are several (PS3.3 C.11.2.1.2).

    None where the source's is no window: not two numbers, or too narrow.
    """
    if not _has_window(source):
        return
    copy_attributes(derived, source, WINDOW)
    for keyword in WINDOW[:3]:
        if keyword in derived and source[keyword].VM > 1:
            derived[keyword].value = source[keyword].value[0]


def _has_window(source: Dataset) -> bool:
    """Whether the first window is one; WindowWidth is 1 at least, or above 0 (PS3.3 C.11.2.1.2)."""
    first = []
    for keyword in WINDOW[:2]:
        count = source[keyword].VM if keyword in source else 0
        try:
            first.append(numbers_of(source, keyword, max(count, 1), "")[0])
        except SeriesRefused:
            return False
    exact = source.get("VOILUTFunction") in ("LINEAR_EXACT", "SIGMOID")
    return first[1] > 0 if exact else first[1] >= 1


def copy_item(item: Dataset) -> Dataset:
    """A sequence item without private attributes, which shares nothing mutable with the source."""
    copied = Dataset()
    copy_tags(copied, item, [tag for tag in item.keys() if not tag.is_private])  # noqa: SIM118
    return copied


def raw_values(source: Dataset, tags: Iterable[int]) -> list[Any]:
    """Values as they came (bytes of text, and where nobody has looked yet), to be compared."""
    return [_raw_value(source, tag) if tag in source else None for tag in tags]


def _raw_value(source: Dataset, tag: int) -> Any:
    text = sent_bytes(source, tag)
    return source.get_item(tag).value if text is None else text


def shallow_copy(template: Dataset) -> Dataset:
    """A data set with elements of its own: setting one does not touch the template's.

    Sequence items are shared.
    """
    copied = Dataset(_own_elements(template))
    copied.file_meta = FileMetaDataset(_own_elements(template.file_meta))
    copied.preamble = template.preamble
    return copied


def _own_elements(dataset: Dataset) -> dict[BaseTag, DataElement | RawDataElement]:
    return {tag: _own(dataset[tag]) for tag in dataset.keys()}  # noqa: SIM118 - it is no dict


def _own(element: DataElement) -> DataElement:
    return DataElement(element.tag, element.VR, element.value, already_converted=True)


def _copied(source: Dataset, tag: int) -> DataElement | None:
    text = text_as_sent(source, tag)
    return text if text is not None else _clean(source[tag])


def _clean(element: DataElement) -> DataElement | None:
    known = dictionary_VR(element.tag).split(" or ") if dictionary_has_tag(element.tag) else ()
    if known and element.VR not in known:
        return None if "SQ" in (element.VR, *known) else _in_vr(element, known[0])
    if element.VR == "SQ":
        return DataElement(element.tag, "SQ", [copy_item(item) for item in element.value])
    value = element.value
    if isinstance(value, MultiValue):
        value = MultiValue(_same, value)
    return DataElement(element.tag, element.VR, value, already_converted=True)


def _in_vr(element: DataElement, vr: str) -> DataElement | None:
    """The same value in another VR; None: it has none there."""
    value = element.value
    try:
        if vr == "DS":
            value = [DSfloat(float(part), auto_format=True) for part in _parts(value)]
        return DataElement(element.tag, vr, value)
    except (ValueError, TypeError, OverflowError):
        return None


def _parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, MultiValue | list) else [value]


def _same(value: Any) -> Any:
    return value
