"""What DESIGN 1.6 and derived.md promise of a derived instance and no foreign program looks for."""

from collections.abc import Sequence
from pathlib import Path

from pydicom import Dataset, dcmread

from dicomnode.imaging.marks import is_synthetic


def contract_findings(source: Sequence[Path], derived: Sequence[Path]) -> list[str]:
    """What DESIGN 1.6 promises of every derived instance and no foreign program looks for."""
    by_uid = {
        str(ds.SOPInstanceUID): ds
        for ds in (dcmread(path, stop_before_pixels=True) for path in source)
    }
    outputs = [dcmread(path, stop_before_pixels=True) for path in derived]
    findings = []
    if len({ds.SOPInstanceUID for ds in outputs} - by_uid.keys()) != len(outputs):
        findings.append("SOP Instance UIDs are not new and unique")
    if len({ds.SeriesInstanceUID for ds in outputs}) != 1:
        findings.append("not one series")
    if len({str(ds.get("RescaleSlope")) for ds in outputs}) > 1 and outputs[0].Modality == "PT":
        findings.append("more than one RescaleSlope")
    for ds in outputs:
        reference = str(ds.SourceImageSequence[0].ReferencedSOPInstanceUID)
        if reference not in by_uid:
            findings.append("references an image that is not in the source")
            continue
        findings += _promises(by_uid[reference], ds)
    return sorted(set(findings))


def companion_findings(derived: Sequence[Path], companions: Sequence[Path]) -> list[str]:
    """What a GSPS, SR or KO must share with the images it is of, and what it must not."""
    images = {
        str(ds.SOPInstanceUID): ds
        for ds in (dcmread(path, stop_before_pixels=True) for path in derived)
    }
    image = next(iter(images.values()))
    series = {str(image.SeriesInstanceUID)}
    findings = []
    for ds in map(dcmread, companions):
        kind = ds.SOPClassUID.name
        findings += [
            f"{kind}: {keyword} is not the images'"
            for keyword in _OF_PATIENT
            if _written(ds, keyword) != _written(image, keyword)
        ]
        if str(ds.SeriesInstanceUID) in series:
            findings.append(f"{kind}: not a series of its own")
        series.add(str(ds.SeriesInstanceUID))
        if not is_synthetic(ds) or ds.get("SyntheticData") != image.get("SyntheticData"):
            findings.append(f"{kind}: the loop guard does not know it")
        if any(element.tag.is_private for element in ds.iterall()):
            findings.append(f"{kind}: has a private attribute")
        ds.pop("ReferencedStudySequence", None)  # of the study, and the images have it too
        named = [e.value for e in ds.iterall() if e.keyword == "ReferencedSOPInstanceUID"]
        if not named or set(map(str, named)) != images.keys():
            findings.append(f"{kind}: does not refer to the very images")
        offset = ds.get("TimezoneOffsetFromUTC")
        if offset != image.get("TimezoneOffsetFromUTC"):
            findings.append(f"{kind}: another time zone")
    return sorted(set(findings))


_OF_PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge")
_OF_PATIENT += ("IssuerOfPatientID", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID")
_OF_PATIENT += ("AccessionNumber", "StudyDescription", "SpecificCharacterSet", "PatientWeight")
_SAME = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "PatientID")
_SAME += ("StudyInstanceUID", "FrameOfReferenceUID", "SpecificCharacterSet", "PatientBirthDate")
_SAME_IN_PET = ("SeriesDate", "SeriesTime", "AcquisitionDate", "AcquisitionTime", "DecayFactor")
_SAME_IN_PET += ("FrameReferenceTime", "ActualFrameDuration", "DecayCorrection")
_NEVER = {  # ImageType's last value -> what such an image must not have
    "CE_CT": ("ContrastBolusAgent", "CTDIvol"),
    "SYN_CT": ("ContrastBolusAgent", "EchoTime", "ScanningSequence", "ConvolutionKernel"),
    "SYN_MR": ("ContrastBolusAgent", "KVP", "RescaleSlope", "ConvolutionKernel", "Exposure"),
    "DLY_PET": ("PrimaryPromptsCountsAccumulated", "SecondaryCountsType", "SUVType"),
}
_TYPES = {
    "CT": ["DERIVED", "SECONDARY", "AXIAL", "SYNTHETIC"],
    "MR": ["DERIVED", "SECONDARY", "OTHER", "SYNTHETIC"],
    "PT": ["DERIVED", "PRIMARY", "SYNTHETIC"],
}


def _promises(source: Dataset, ds: Dataset) -> list[str]:
    kind = str(ds.ImageType[-1])
    same = (*_SAME, *(_SAME_IN_PET if kind == "DLY_PET" else ()))
    findings = [
        f"{keyword} is not the source's"
        for keyword in same
        if keyword in source and _written(ds, keyword) != _written(source, keyword)
    ]
    if ds.get("SyntheticData") != "YES" or list(ds.ImageType[:-1]) != _TYPES[ds.Modality]:
        findings.append("not marked as derived and synthetic")
    if ds.SeriesInstanceUID == source.SeriesInstanceUID or "[SYN " not in ds.SeriesDescription:
        findings.append("not a marked series of its own")
    if any(element.tag.is_private for element in ds.iterall()):
        findings.append("has a private attribute")
    findings += [f"has {keyword}" for keyword in _NEVER.get(kind, ()) if ds.get(keyword)]
    agent = "ContrastBolusAgent"
    if kind not in _NEVER and bool(ds.get(agent)) != bool(source.get(agent)):
        findings.append("contrast agent is not the source's")
    if "WindowCenter" in ds and ds["WindowCenter"].VM != 1:
        findings.append("not one window")
    if kind == "DLY_PET" and (ds.RescaleIntercept != 0 or ds.BitsStored != 16):
        findings.append("RescaleIntercept is not 0, or BitsStored not 16")
    return findings


def _written(ds: Dataset, keyword: str) -> list[str]:
    """An attribute's values as text, numbers as they were written."""
    value = ds.get(keyword)
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [str(getattr(one, "original_string", one)) for one in values]
