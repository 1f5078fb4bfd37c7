"""Structured reports on a derived series: its quality, its class, its retraction (SR and KO)."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Literal

import highdicom
from highdicom import sr
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from dicomnode.composite import companion_uids, finish, without_patient
from dicomnode.imaging.classes import ClassifierManifest, Coded
from dicomnode.imaging.marks import MANUFACTURER, reproducible_uid
from dicomnode.outputs import output_of
from dicomnode.provenance import Identity, plain_text, software_versions
from dicomnode.qa import Finding

_own = partial(Code, scheme_designator="99DICOMNODE")
_PROCEDURE = {
    "CT": codes.LN.CTUnspecifiedBodyRegion,
    "MR": codes.LN.MRIUnspecifiedBodyRegion,
    "PT": codes.LN.PETUnspecifiedBodyRegion,
}
_UNIT = {  # of the values of a derived series, by its Modality
    "CT": Code("[hnsf'U]", "UCUM", "Hounsfield unit"),
    "MR": Code("[arb'U]", "UCUM", "arbitrary unit"),
    "PT": Code("Bq/ml", "UCUM", "Becquerels/milliliter"),
}
_PERCENT = Code("%", "UCUM", "Percent")
_NO_UNITS = Code("1", "UCUM", "no units")
_MEASURES = {  # finding of qa.py -> concept, CodeValue at most 12 characters
    "mean_change": ("MEAN_CHANGE", "Mean difference from the source, absolute"),
    "mean_abs_change": ("MEAN_ABS", "Mean absolute difference from the source"),
    "abs_change_p999": ("P999_ABS", "99.9th percentile of the absolute difference"),
    "clipped_fraction": ("CLIPPED", "Voxels at the ends of the output range"),
}
_OBSERVED = {  # finding of qa.py about the source -> concept and its unit
    "left_out_slices": ("LEFT_OUT", "Source slices left out, not decodable", _NO_UNITS),
    "ignored_instances": ("IGNORED", "Source instances that are no slices", _NO_UNITS),
    "tilt_degrees": ("TILT", "Angle of stack axis and slice normal", codes.UCUM.Degree),
}
_GATE = _own("QA_GATE", meaning="Quality gate")
Gate = Literal["gate", "flag", "off"]
_REJECTED = {  # reason -> title (CID 7010) and its modifier (CID 7011), where it must have one
    "quality": (codes.DCM.RejectedForQualityReasons, codes.DCM.OtherFailure),
    "safety": (codes.DCM.RejectedForPatientSafetyReasons, None),
}


def qa_report(
    derived: Sequence[Dataset],
    findings: Sequence[Finding],
    identity: Identity,
    now: datetime,
    *,
    series_number: int,
    gate: Gate = "gate",
) -> Dataset:
    """Comprehensive SR by TID 1500: which model made the series, and what the quality checks found.

    Preliminary and unverified: nobody has read it (PS3.3 C.17.2).

    Args:
        derived: headers of the images of one series.
        findings: as from `qa.assess`. What is not finite is left out, and what has no limit and
            no meaning: the difference between a CT and the MR that it is made of.
        gate: what the route does with an implausible result.

    Raises:
        ValueError: `now` is naive.
    """
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(derived, "QA"),
        algorithm_id=_algorithm(identity),
        measurements=[item for one in findings for item in _measurements(one, identity.task)],
        qualitative_evaluations=[sr.QualitativeEvaluation(_GATE, _verdict(findings, gate))],
        source_images=_sources(derived),
    )
    title = codes.DCM.ImagingMeasurementReport
    uids = companion_uids(derived, "QA report", gate)
    return _report(derived, [group], title, identity, now, series_number, "QA report", uids)


def classifier_report(
    images: Sequence[Dataset],
    manifest: ClassifierManifest,
    probabilities: Sequence[float],
    identity: Identity,
    now: datetime,
    *,
    series_number: int,
) -> Dataset:
    """Comprehensive SR by TID 1500: how probable each class is to a classifier.

    A group per class, of a finding, its site and its probability. It refers to the very images
    that were classified, so that a chain over a synthetic series stays visible.

    Args:
        images: headers of the classified images of one series.
        manifest: the classifier's, which says what its classes mean.
        probabilities: one per class, in that order, in [0, 1], of sum 1.
        identity: the classifier's.

    Raises:
        ValueError: these are not the probabilities of these classes, or `now` is naive.
    """
    values = [float(f"{value:.4f}") for value in probabilities]  # more digits mean nothing
    if len(values) != len(manifest.classes) or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"give {len(manifest.classes)} probabilities from 0 to 1")
    if abs(math.fsum(probabilities) - 1) > 1e-3:
        raise ValueError("the sum of the probabilities is not 1")
    site = None if manifest.site is None else [sr.FindingSite(_code(manifest.site))]
    groups = [
        sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=_tracking(images, one.name),
            finding_type=_code(one.code),
            finding_sites=site,
            algorithm_id=_algorithm(identity),
            measurements=[sr.Measurement(codes.DCM.Probability, value, _NO_UNITS)],
            source_images=_sources(images),
        )
        for one, value in zip(manifest.classes, values, strict=True)
    ]
    title = codes.DCM.ImagingMeasurementReport
    uids = companion_uids(images, "classifier report", identity.digest, values)
    return _report(images, groups, title, identity, now, series_number, "Classifier report", uids)


def _code(coded: Coded) -> Code:
    return Code(coded.value, coded.scheme, coded.meaning)


def retraction(
    datasets: Sequence[Dataset],
    identity: Identity,
    now: datetime,
    *,
    series_number: int,
    reason: Literal["quality", "safety"] = "quality",
) -> Dataset:
    """Key Object Selection that withdraws stored instances (IHE RAD IOCM, PS3.16 TID 2010).

    An archive that honours it hides them, or deletes them; after "safety" it never takes these
    SOP Instance UIDs again (`OutputOptions.generation` gives others).

    Args:
        datasets: headers of the instances to withdraw, images and companions of one study, in any
            order, which makes no difference.

    Raises:
        ValueError: they are of several studies, or `now` is naive.
    """
    if len({str(ds.StudyInstanceUID) for ds in datasets}) != 1:
        raise ValueError("a rejection note is of one study")
    title, modifier = _REJECTED[reason]
    datasets = sorted(datasets, key=_images_first)
    evidence = without_patient(datasets)
    content = highdicom.ko.KeyObjectSelection(
        title,
        evidence,
        observer_device_context=_observer(identity),
        description="Synthetic images, withdrawn by the software that made them. Do not use.",
    )
    if modifier is not None:
        item = sr.CodeContentItem(
            codes.DCM.DocumentTitleModifier, modifier, sr.RelationshipTypeValues.HAS_CONCEPT_MOD
        )
        content[0].ContentSequence.insert(0, item)
    instances = sorted(str(ds.SOPInstanceUID) for ds in datasets)
    note = highdicom.ko.KeyObjectSelectionDocument(
        evidence,
        content,
        series_number=series_number,
        **companion_uids(datasets, "retraction", reason, instances),
    )
    finish(note, datasets[0], identity, now, plain_text(f"Withdrawn [SYN {identity.name}]", 64))
    return note


def _images_first(ds: Dataset) -> tuple[bool, str, int, str]:
    series, uid = str(ds.SeriesInstanceUID), str(ds.SOPInstanceUID)
    return ds.get("Modality") in ("PR", "SR"), series, int(ds.get("InstanceNumber") or 0), uid


def _report(
    images: Sequence[Dataset],
    groups: Sequence[sr.MeasurementsAndQualitativeEvaluations],
    title: Code,
    identity: Identity,
    now: datetime,
    series_number: int,
    name: str,
    uids: Mapping[str, Any],
) -> Dataset:
    modality = str(images[0].Modality)
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=_observer(identity)),
        procedure_reported=_PROCEDURE.get(modality, codes.SCT.ImagingProcedure),
        imaging_measurements=groups,
        title=title,
    )
    report = sr.ComprehensiveSR(
        without_patient(images),
        content,
        series_number=series_number,
        is_complete=True,
        is_final=False,
        is_verified=False,
        **uids,
    )
    finish(report, images[0], identity, now, plain_text(f"{name} [SYN {identity.name}]", 64))
    return report


def _tracking(images: Sequence[Dataset], name: str) -> sr.TrackingIdentifier:
    uid = reproducible_uid("tracking", str(images[0].SeriesInstanceUID), name)
    return sr.TrackingIdentifier(uid, name)


def _sources(images: Sequence[Dataset]) -> list[sr.SourceImageForMeasurementGroup]:
    return [
        sr.SourceImageForMeasurementGroup(str(image.SOPClassUID), str(image.SOPInstanceUID))
        for image in images
    ]


def _observer(identity: Identity) -> sr.ObserverContext:
    """The device that says so: the model package, as General Equipment names it."""
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=reproducible_uid("device", identity.digest),
        name=software_versions(identity)[0],
        manufacturer_name=MANUFACTURER,
        model_name=plain_text(identity.name, 64),
        serial_number=identity.digest[:16],
    )
    return sr.ObserverContext(codes.DCM.Device, device)


def _algorithm(identity: Identity) -> sr.AlgorithmIdentification:
    """TID 4019. The version is the package's, the digest that of all its files."""
    parts = {
        "model": identity.name,
        "version": identity.version,
        "sha256": identity.digest,
        "task": identity.task,
        "arch": identity.architecture,
        "family": identity.algorithm_family,
        "params": identity.params,
        "run as": identity.precision,
        "software": f"dicomnode {identity.node_version}",
    }
    return sr.AlgorithmIdentification(
        name=plain_text(identity.algorithm_name, 64),
        version=plain_text(identity.algorithm_version, 64),
        parameters=[f"{key}={plain_text(part, 80)}" for key, part in parts.items() if part],
        family=codes.DCM.ArtificialIntelligence,
    )


def _measurements(finding: Finding, task: str) -> list[sr.Measurement]:
    """What was measured and, where there is one, the limit it is held to."""
    if finding.name in _OBSERVED:
        value, meaning, unit = _OBSERVED[finding.name]
        return [sr.Measurement(_own(value, meaning=meaning), finding.value, unit)]
    if finding.name not in _MEASURES or not math.isfinite(finding.value):
        return []
    value, meaning = _MEASURES[finding.name]
    output, share = output_of(task), finding.name.endswith("_fraction")
    if not share and output.source != output.modality and finding.limit is None:
        return []
    factor, coded = (100.0, _PERCENT) if share else (1.0, _UNIT[output.modality])
    rounded = float(f"{finding.value * factor:.4g}")  # the same wherever it was computed
    made = [sr.Measurement(_own(value, meaning=meaning), rounded, coded)]
    if finding.limit is not None:
        name = _own(f"{value}_MAX", meaning=f"Limit of: {meaning}")
        made.append(sr.Measurement(name, finding.limit * factor, coded))
    return made


def _verdict(findings: Sequence[Finding], gate: Gate) -> Code:
    if gate == "off":
        return _own("NOT_APPLIED", meaning="Not applied")
    passed = all(finding.ok for finding in findings)
    return _own("PASSED", meaning="Passed") if passed else _own("FAILED", meaning="Failed")
