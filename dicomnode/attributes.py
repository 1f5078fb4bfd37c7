"""Which attributes of a source instance a derived CT instance keeps, and how they are copied.

An allow-list: what is not named here, and every private attribute at any depth, stays behind. The
Patient and Study modules are kept whole by `copy_patient_and_study`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import highdicom
from pydicom import DataElement, Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.multival import MultiValue

_BY_MODULE = {  # module of PS3.3 -> keywords, copied value by value if present
    "C.7.3.1 General Series": "BodyPartExamined ProtocolName RequestAttributesSequence "
    "AnatomicalOrientationType",
    "C.7.3.2 Clinical Trial Series": "ClinicalTrialCoordinatingCenterName ClinicalTrialSeriesID "
    "ClinicalTrialSeriesDescription",
    "C.7.5.1 General Equipment": "InstitutionName InstitutionalDepartmentName",
    "C.7.10.1 General Acquisition": "AcquisitionDate AcquisitionTime AcquisitionDateTime "
    "AcquisitionUID AcquisitionDuration IrradiationEventUID",
    "C.7.6.1 General Image": "QualityControlImage BurnedInAnnotation RecognizableVisualFeatures "
    "ImageLaterality AnatomicRegionSequence PrimaryAnatomicStructureSequence PatientOrientation "
    "LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod",
    "C.12.4 General Reference": "ReferencedImageSequence",
    "C.7.6.2 Image Plane": "ImagePositionPatient ImageOrientationPatient PixelSpacing "
    "SpacingBetweenSlices SliceLocation",
    "C.7.6.3 Image Pixel": "PhotometricInterpretation",
    "C.8.2.1 CT Image": "ScanOptions DataCollectionDiameter ReconstructionDiameter "
    "DistanceSourceToDetector DistanceSourceToPatient GantryDetectorTilt TableHeight "
    "RotationDirection ExposureTime XRayTubeCurrent Exposure ExposureInuAs FilterType "
    "FilterMaterial GeneratorPower FocalSpots ConvolutionKernel RevolutionTime "
    "SingleCollimationWidth TotalCollimationWidth TableSpeed TableFeedPerRotation "
    "SpiralPitchFactor DataCollectionCenterPatient ReconstructionTargetCenterPatient "
    "ExposureModulationType CTDIvol CTDIPhantomTypeCodeSequence",
    "C.11.2 VOI LUT": "VOILUTFunction",
    "C.12.1 SOP Common": "TimezoneOffsetFromUTC LongitudinalTemporalInformationModified",
}
_TYPE_2 = {  # copied, or written empty
    "C.7.3.1 General Series": "PatientPosition",
    "C.7.4.1 Frame of Reference": "PositionReferenceIndicator",
    "C.7.6.2 Image Plane": "SliceThickness",
    "C.8.2.1 CT Image": "KVP AcquisitionNumber",
}
_CONTRAST = {
    "C.7.6.4 Contrast/Bolus": "ContrastBolusAgent ContrastBolusAgentSequence ContrastBolusRoute "
    "ContrastBolusAdministrationRouteSequence ContrastBolusVolume ContrastBolusStartTime "
    "ContrastBolusStopTime ContrastBolusTotalDose ContrastFlowRate ContrastFlowDuration "
    "ContrastBolusIngredient ContrastBolusIngredientConcentration",
}


def _keywords(modules: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(keyword for keywords in modules.values() for keyword in keywords.split())


KEPT = _keywords(_BY_MODULE)
KEPT_OR_EMPTY = _keywords(_TYPE_2)
CONTRAST = _keywords(_CONTRAST)
_TAG = {keyword: tag_for_keyword(keyword) or 0 for keyword in KEPT + KEPT_OR_EMPTY + CONTRAST}


def copy_attributes(derived: Dataset, source: Dataset, keywords: Iterable[str]) -> None:
    """Copy the attributes named from `source`, if it has them."""
    for keyword in keywords:
        tag = _TAG.get(keyword) or tag_for_keyword(keyword) or 0
        if tag in source:
            derived.add(_clean(source[tag]))


def copy_patient_and_study(derived: highdicom.SOPClass, source: Dataset) -> None:
    """Copy every standard attribute of the Patient and Study modules (PS3.3 C.7.1, C.7.2)."""
    derived.copy_patient_and_study_information(source)
    for tag in list(derived.keys()):
        derived.add(_clean(derived[tag]))  # highdicom shares elements with the source


def copy_image_attributes(derived: Dataset, source: Dataset) -> None:
    """Copy what stays true of a translated CT image: geometry, acquisition, contrast agent."""
    copy_attributes(derived, source, KEPT)
    for keyword in KEPT_OR_EMPTY:
        setattr(derived, keyword, None)
    copy_attributes(derived, source, KEPT_OR_EMPTY)
    if source.get("ContrastBolusAgent") or source.get("ContrastBolusAgentSequence"):
        copy_attributes(derived, source, CONTRAST)
    if source.get("Laterality") in ("L", "R"):
        derived.Laterality = source.Laterality
    elif not (
        source.get("BodyPartExamined")
        or source.get("AnatomicRegionSequence")
        or source.get("ImageLaterality")
    ):
        derived.Laterality = None  # type 2C: only where nothing else may say the side
    _copy_window(derived, source)


def copy_item(item: Dataset) -> Dataset:
    """A sequence item without private attributes, which shares nothing mutable with the source."""
    copied = Dataset()
    for element in item:
        if not element.tag.is_private:
            copied.add(_clean(element))
    return copied


def _clean(element: DataElement) -> DataElement:
    if element.VR == "SQ":
        return DataElement(element.tag, "SQ", [copy_item(item) for item in element.value])
    value = element.value
    if isinstance(value, MultiValue):
        value = MultiValue(_same, value)
    return DataElement(element.tag, element.VR, value, already_converted=True)


def _same(value: Any) -> Any:
    return value


def _copy_window(derived: Dataset, source: Dataset) -> None:
    """The first window only: some viewers ignore all if there are several (PS3.3 C.11.2.1.2)."""
    keywords = ("WindowCenter", "WindowWidth", "WindowCenterWidthExplanation")
    if any(keyword not in source or source[keyword].VM == 0 for keyword in keywords[:2]):
        return
    copy_attributes(derived, source, keywords)
    for keyword in keywords:
        if keyword in derived and derived[keyword].VM > 1:
            derived[keyword].value = derived[keyword].value[0]
