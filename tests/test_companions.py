"""What goes with a derived series - GSPS, reports, retraction, burned-in label - is right."""

import contextlib
import itertools
import logging
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import CTImageStorage
from pynetdicom import AE, evt

from dicomnode import sop_classes
from dicomnode.companions import CompanionOptions, companions, header_of
from dicomnode.config import Companions, Route
from dicomnode.derived import OutputOptions
from dicomnode.errors import DeliveryRefused, SeriesRefused
from dicomnode.imaging.marks import is_synthetic
from dicomnode.imaging.package import read_package
from dicomnode.label import label_pixels, presentation_state
from dicomnode.orders import Order
from dicomnode.outputs import OUTPUTS
from dicomnode.provenance import Identity
from dicomnode.qa import Finding
from dicomnode.report import classifier_report, qa_report, retraction
from dicomnode.scu import Address, send_instances
from dicomnode.translating import translate
from dicomnode.worker import load_models
from tests.classifiers import BRIGHTNESS
from tests.factories import CANARY, NAMES, changed, ct_series, file_bytes, write_series
from tests.judges import (
    DCENTVFY,
    DCIODVFY,
    DCMDUMP,
    DCMPSCHK,
    DSRDUMP,
    dciodvfy,
    entity_findings,
    require,
)
from tests.peers import (
    ORTHANC,
    STORESCU,
    Archive,
    free_port,
    needs,
    node_settings,
    orthanc,
    running_node,
    send,
)
from tests.promises import companion_findings
from tests.tasks import ge_pet
from tests.test_derived import DENOISER, NOW, as_task, derive

GSPS, REPORT = "1.2.840.10008.5.1.4.1.1.11.1", "1.2.840.10008.5.1.4.1.1.88.33"
HANGUL = "\\ISO 2022 IR 149"
SHOWN = "Hong^Gildong=洪^吉洞=홍^길동"
FINDINGS = [
    Finding("finite", 1.0, 1.0, True),
    Finding("mean_change", 1.5, 5.0, True),
    Finding("mean_abs_change", 2.5, None, True),
    Finding("clipped_fraction", 0.0125, 0.02, True),
]
PROBABILITIES = (0.7, 0.1, 0.15, 0.05)


def headers(series: Sequence[Dataset], identity: Identity = DENOISER) -> list[Dataset]:
    """Of what is derived of a CT series, as the worker keeps them."""
    _, _, derived = derive(list(series), 0.25, identity)
    return [header_of(ds) for ds in derived]


def classified(
    images: Sequence[Dataset],
    probabilities: Sequence[float],
    identity: Identity = DENOISER,
    now: datetime = NOW,
) -> Dataset:
    """The report of the four classes of lung tissue."""
    return classifier_report(images, BRIGHTNESS, probabilities, identity, now, series_number=1007)


def every_companion(
    derived: Sequence[Dataset], identity: Identity = DENOISER, now: datetime = NOW
) -> dict[str, Dataset]:
    """One of each kind, as a receiver reads it."""
    made = {
        "window": presentation_state(derived, identity, now, series_number=1005),
        "label": presentation_state(derived, identity, now, series_number=1005, window=False),
        "qa": qa_report(derived, FINDINGS, identity, now, series_number=1006),
        "class": classified(derived, PROBABILITIES, identity, now),
        "quality": retraction(derived, identity, now, series_number=1013),
        "safety": retraction(derived, identity, now, series_number=1013, reason="safety"),
    }
    return {name: dcmread(BytesIO(file_bytes(ds))) for name, ds in made.items()}


def content(ds: Dataset) -> dict[str, list[Any]]:
    """Values of the content items of a document by the meaning of their concept."""
    found: dict[str, list[Any]] = {}
    for item in walk(ds):
        if "ConceptNameCodeSequence" in item:
            found.setdefault(item.ConceptNameCodeSequence[0].CodeMeaning, []).append(value_of(item))
    return found


def walk(item: Dataset) -> list[Dataset]:
    below = item.get("ContentSequence") or ()
    return [item, *itertools.chain.from_iterable(map(walk, below))]


def value_of(item: Dataset) -> Any:
    if item.ValueType == "NUM":
        measured = item.MeasuredValueSequence[0]
        return float(measured.NumericValue), measured.MeasurementUnitsCodeSequence[0].CodeValue
    if item.ValueType == "CODE":
        return item.ConceptCodeSequence[0].CodeValue
    return item.get("TextValue") or item.get("UID")


# --- all kinds ----------------------------------------------------------------------------------
@pytest.mark.parametrize("character_set", [HANGUL, "ISO_IR 192", "ISO_IR 100"])
def test_foreign_programs_find_no_error_of_ours_in_any_companion(
    character_set: str, tmp_path: Path
) -> None:
    require(DCIODVFY, DCENTVFY, DCMDUMP)
    series = ct_series(3, character_set=character_set, TimezoneOffsetFromUTC="+0900")
    source = write_series(series, tmp_path / "source")
    _, _, images = derive(series, 0.25)
    derived = write_series(images, tmp_path / "derived")
    made = write_series(every_companion(images).values(), tmp_path / "companions")
    assert dciodvfy(made) == set()
    assert entity_findings(source, [*derived, *made]) == []
    assert companion_findings(derived, made) == []
    name = SHOWN if character_set != "ISO_IR 100" else NAMES[character_set]
    for path in [*source, *derived, *made]:
        command = [str(DCMDUMP), "-q", "+U8", "+P", "PatientName", str(path)]
        assert f"[{name}]" in subprocess.check_output(command, text=True)


@pytest.mark.parametrize("character_set", [HANGUL, "ISO_IR 192", "ISO_IR 100", None])
def test_names_are_the_same_bytes_in_source_image_and_every_companion(
    character_set: str | None,
) -> None:
    series = ct_series(2, character_set=character_set)
    stored = dcmread(BytesIO(file_bytes(series[0]))).get_item("PatientName").value
    for ds in every_companion(headers(series)).values():
        assert ds.get_item("PatientName").value == stored
        assert ds.get("SpecificCharacterSet") == series[0].get("SpecificCharacterSet")


def test_everything_of_patient_and_study_is_copied_and_nothing_private() -> None:
    given = {
        "IssuerOfPatientID": "HOSPITAL",
        "StudyDescription": "Thorax",
        "PatientWeight": "70",
        "PatientIdentityRemoved": "NO",
    }
    for ds in every_companion(headers(ct_series(2, private=True, **given))).values():
        assert {keyword: str(ds.get(keyword)) for keyword in given} == given
        assert ds.AccessionNumber == "A77"
        assert CANARY.encode() not in file_bytes(ds)


def test_times_are_in_the_zone_of_the_source() -> None:
    series = ct_series(2, TimezoneOffsetFromUTC="+0900")
    for ds in every_companion(headers(series)).values():
        kinds = [kind for kind in ("Content", "PresentationCreation") if f"{kind}Date" in ds]
        assert kinds
        for kind in (*kinds, "InstanceCreation", "Series"):
            assert ds[f"{kind}Date"].value == "20260305"
            assert ds[f"{kind}Time"].value == "083015.250000"
        assert ds.TimezoneOffsetFromUTC == "+0900"


def test_a_companion_needs_a_time_with_its_zone() -> None:
    with pytest.raises(ValueError, match="zone"):
        presentation_state(
            headers(ct_series(2)), DENOISER, NOW.replace(tzinfo=None), series_number=1
        )


def test_a_repeat_gives_the_same_bytes_and_other_images_other_uids() -> None:
    first, again = (every_companion(headers(ct_series(3, seed=seed))) for seed in (1, 1))
    other = every_companion(headers(ct_series(3, seed=2)))
    assert {k: file_bytes(ds) for k, ds in first.items()} == {
        k: file_bytes(ds) for k, ds in again.items()
    }
    uids = [
        uid
        for made in (first, other)
        for ds in made.values()
        for uid in (ds.SOPInstanceUID, ds.SeriesInstanceUID)
    ]
    assert len(set(uids)) == len(uids) == 24
    assert all(re.fullmatch(r"2\.25\.\d{1,39}", uid) for uid in uids)


def test_no_companion_is_ever_a_source() -> None:
    for ds in every_companion(headers(ct_series(2))).values():
        assert is_synthetic(ds)
        assert ds.SyntheticData == "YES"
        assert ds.Manufacturer == "dicomnode"
        makers = [item.Manufacturer for item in ds.ContributingEquipmentSequence]
        assert makers[:2] == ["Phantom Works", "dicomnode"]


def test_no_patient_attribute_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    every_companion(headers(ct_series(2, PatientName="Seldom^Seen,", PatientSex="X")))
    assert "Seldom" not in caplog.text


# --- presentation state -------------------------------------------------------------------------
def test_the_label_stands_over_every_image_and_names_the_model() -> None:
    derived = headers(ct_series(3), as_task("ce_ct"))
    state = every_companion(derived, as_task("ce_ct"))["window"]
    (annotation,) = state.GraphicAnnotationSequence
    (text,) = annotation.TextObjectSequence
    assert text.UnformattedTextValue == "SYNTHETIC - NOT ACQUIRED (CE_CT ldct-denoise 1.2.0)"
    assert text.BoundingBoxAnnotationUnits == "DISPLAY"
    assert "ReferencedImageSequence" not in annotation
    (series,) = state.ReferencedSeriesSequence
    named = [item.ReferencedSOPInstanceUID for item in series.ReferencedImageSequence]
    assert named == [ds.SOPInstanceUID for ds in derived]
    (area,) = state.DisplayedAreaSelectionSequence
    assert area.PresentationPixelSpacing == derived[0].PixelSpacing == [0.703125, 0.6]
    assert (state.BodyPartExamined, "Laterality" in state) == ("CHEST", False)


def test_a_presentation_state_that_names_no_body_part_has_an_empty_laterality(
    tmp_path: Path,
) -> None:
    """Its images need none: they have ImageLaterality, which is not for presentation states."""
    derived = headers(ct_series(2, BodyPartExamined=None))
    derived = changed(derived, ImageLaterality="U", Laterality=None)
    state = every_companion(derived)["window"]
    assert ("BodyPartExamined" in state, state["Laterality"].is_empty) == (False, True)
    require(DCIODVFY)
    assert dciodvfy(write_series([state], tmp_path)) == set()


def test_a_presentation_state_presets_the_window_or_only_labels() -> None:
    made = every_companion(headers(ct_series(2)))
    (window,) = made["window"].SoftcopyVOILUTSequence
    assert (window.WindowCenter, window.WindowWidth) == (40, 400)
    assert "ReferencedImageSequence" not in window
    assert "SoftcopyVOILUTSequence" not in made["label"]
    for state in (made["window"], made["label"]):
        assert (state.RescaleSlope, state.RescaleIntercept, state.RescaleType) == (1, -1024, "HU")


def test_images_with_another_window_are_named_by_it() -> None:
    derived = headers(ct_series(3))
    derived[2] = changed([derived[2]], WindowWidth="80")[0]
    (one, other) = every_companion(derived)["window"].SoftcopyVOILUTSequence
    assert [len(item.ReferencedImageSequence) for item in (one, other)] == [2, 1]
    assert (one.WindowWidth, other.WindowWidth) == (400, 80)


def test_images_without_a_window_get_none() -> None:
    derived = headers(ct_series(2, WindowCenter=None, WindowWidth=None))
    assert "SoftcopyVOILUTSequence" not in every_companion(derived)["window"]


def test_values_of_pet_have_a_rescale_and_no_type_of_it() -> None:
    _, _, derived = derive(ge_pet(2), 3.0, as_task("delayed_pet"), unit="BQML", to="BQML")
    state = every_companion(derived, as_task("delayed_pet"))["window"]
    assert (state.RescaleSlope, state.RescaleType) == (derived[0].RescaleSlope, "US")
    assert "SeriesTime" in state
    assert state.SeriesTime != derived[0].SeriesTime  # only images keep that of the source


def test_slices_with_their_own_rescale_need_presentation_states_of_their_own(
    tmp_path: Path,
) -> None:
    series = ct_series(3, bits_stored=16, slope="0.5")
    series[2] = changed([series[2]], RescaleSlope="0.25")[0]
    _, _, derived = derive(series)
    assert [ds.RescaleSlope for ds in derived] == [0.5, 0.5, 0.25]
    with pytest.raises(ValueError, match="rescale"):
        presentation_state(derived, DENOISER, NOW, series_number=1)
    states = companions(derived, FINDINGS, DENOISER, CompanionOptions(report=False), NOW)
    assert [(ds.RescaleSlope, ds.InstanceNumber) for ds in states] == [(0.5, 1), (0.25, 2)]
    assert len({ds.SeriesInstanceUID for ds in states}) == 1
    assert len({ds.SOPInstanceUID for ds in states}) == 2
    if DCIODVFY.exists():
        assert dciodvfy(write_series(states, tmp_path)) == set()


def test_dcmtk_passes_the_presentation_state_and_shows_the_report(tmp_path: Path) -> None:
    require(DCMPSCHK, DSRDUMP)
    made = every_companion(headers(ct_series(2, TimezoneOffsetFromUTC="+0900")))
    paths = dict(zip(made, write_series(made.values(), tmp_path), strict=True))
    for kind in ("window", "label"):
        done = subprocess.run([str(DCMPSCHK), str(paths[kind])], capture_output=True, text=True)
        assert "Test passed." in done.stdout + done.stderr
    shown = subprocess.check_output([str(DSRDUMP), "+Pl", str(paths["qa"])]).decode("latin-1")
    for words in ("Algorithm Name", "Algorithm Version", "UNVERIFIED", "PRELIMINARY"):
        assert words in shown
    assert f'"sha256={"ab" * 32}"' in shown


# --- reports ------------------------------------------------------------------------------------
def test_the_quality_report_says_which_model_and_what_was_measured() -> None:
    report = every_companion(headers(ct_series(3)))["qa"]
    said = content(report)
    assert said["Algorithm Name"] == ["LDCT denoiser"]
    assert said["Algorithm Version"] == ["1.2.0"]
    assert f"sha256={'ab' * 32}" in said["Algorithm Parameters"]
    assert said["Observer Type"] == ["121007"]
    assert said["Quality gate"] == ["PASSED"]
    assert said["Mean difference from the source, absolute"] == [(1.5, "[hnsf'U]")]
    assert said["Limit of: Mean difference from the source, absolute"] == [(5.0, "[hnsf'U]")]
    assert said["Mean absolute difference from the source"] == [(2.5, "[hnsf'U]")]
    assert "Limit of: Mean absolute difference from the source" not in said
    assert said["Voxels at the ends of the output range"] == [(1.25, "%")]
    assert said["Limit of: Voxels at the ends of the output range"] == [(2.0, "%")]
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")


@pytest.mark.parametrize(
    ("gate", "ok", "verdict"),
    [
        ("gate", True, "PASSED"),
        ("gate", False, "FAILED"),
        ("flag", False, "FAILED"),
        ("off", False, "NOT_APPLIED"),
    ],
)
def test_the_quality_report_gives_the_verdict_of_the_gate(
    gate: Any, ok: bool, verdict: str
) -> None:
    found = [Finding("mean_change", 9.0, 5.0, ok)]
    report = qa_report(headers(ct_series(2)), found, DENOISER, NOW, series_number=3, gate=gate)
    assert content(report)["Quality gate"] == [verdict]


def test_what_was_measured_is_reported_to_four_digits() -> None:
    made = []
    for value in (21.554136, 21.554139):  # two machines, one result
        found = [Finding("mean_abs_change", value, None, True)]
        made.append(qa_report(headers(ct_series(2)), found, DENOISER, NOW, series_number=3))
    assert content(made[0])["Mean absolute difference from the source"] == [(21.55, "[hnsf'U]")]
    assert file_bytes(made[0]) == file_bytes(made[1])


def test_the_quality_report_says_what_was_left_out_of_the_source() -> None:
    told = {"left_out_slices": 2.0, "ignored_instances": 3.0, "tilt_degrees": 18.5}
    findings = [Finding(name, value, None, ok=True) for name, value in told.items()]
    images = headers(ct_series(2))
    said = content(qa_report(images, findings, DENOISER, NOW, series_number=2))
    assert said["Source slices left out, not decodable"] == [(2.0, "1")]
    assert said["Source instances that are no slices"] == [(3.0, "1")]
    assert said["Angle of stack axis and slice normal"] == [(18.5, "deg")]


def test_what_is_not_finite_is_not_reported_as_a_number() -> None:
    found = [Finding("mean_change", float("nan"), 5.0, False)]
    report = qa_report(headers(ct_series(2)), found, DENOISER, NOW, series_number=3)
    assert not any("difference" in concept for concept in content(report))
    assert content(report)["Quality gate"] == ["FAILED"]


def test_the_difference_between_ct_and_mr_is_reported_only_if_it_is_limited() -> None:
    found = [Finding("mean_change", 9.0, None, True), Finding("abs_change_p999", 9.0, 10.0, True)]
    assert OUTPUTS["syn_mr"].modality == "MR"
    report = qa_report(headers(ct_series(2)), found, as_task("syn_mr"), NOW, series_number=3)
    said = content(report)
    assert "Mean difference from the source, absolute" not in said
    assert said["99.9th percentile of the absolute difference"] == [(9.0, "[arb'U]")]


def test_the_classifier_reports_four_codes_with_their_probabilities() -> None:
    derived = headers(ct_series(3))
    report = every_companion(derived)["class"]
    said = content(report)
    assert said["Finding"] == ["254626006", "22687000", "254634000", "17621005"]
    assert said["Finding Site"] == ["39607008"] * 4
    assert said["Probability"] == [(0.7, "1"), (0.1, "1"), (0.15, "1"), (0.05, "1")]
    named = {e.value for e in report.iterall() if e.keyword == "ReferencedSOPInstanceUID"}
    assert named == {ds.SOPInstanceUID for ds in derived}  # so that the chain is visible
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    other = classified(derived, PROBABILITIES, replace(DENOISER, digest="cd" * 32))
    again = classified(derived, (0.71, 0.1, 0.15, 0.04))
    assert len({ds.SOPInstanceUID for ds in (report, other, again)}) == 3


def test_a_report_on_acquired_images_does_not_call_them_synthetic() -> None:
    report = classified(ct_series(2), PROBABILITIES)
    assert "SyntheticData" not in report
    assert is_synthetic(report)  # by its maker: still no source


@pytest.mark.parametrize(
    "given",
    [
        (0.7, 0.1, 0.15, 0.5),
        (0.8, 0.1, 0.15, -0.05),
        (0.7, 0.1, 0.15, float("nan")),
        (1.0,),
    ],
)
def test_what_are_not_probabilities_of_the_classes_is_not_reported(
    given: tuple[float, ...],
) -> None:
    with pytest.raises(ValueError, match="probabilit"):
        classified(headers(ct_series(2)), given)


# --- retraction ---------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "title"), [("quality", "113001"), ("safety", "113037")])
def test_a_retraction_names_every_instance_and_why(kind: str, title: str) -> None:
    derived = headers(ct_series(4))
    note = every_companion(derived)[kind]
    concept = note.ConceptNameCodeSequence[0]
    assert (concept.CodeValue, concept.CodingSchemeDesignator) == (title, "DCM")
    assert not any(element.keyword == "CodingSchemeVersion" for element in note.iterall())
    (study,) = note.CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    uids = [ds.SOPInstanceUID for ds in derived]
    assert [item.ReferencedSOPInstanceUID for item in series.ReferencedSOPSequence] == uids
    items = [item for item in note.ContentSequence if "ReferencedSOPSequence" in item]
    assert [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in items] == uids
    assert ("Document Title Modifier" in content(note)) == (kind == "quality")  # TID 2010


def test_a_retraction_withdraws_companions_with_their_images(tmp_path: Path) -> None:
    derived = headers(ct_series(2))
    beside = companions(derived, FINDINGS, DENOISER, CompanionOptions(), NOW)
    note = retraction([*derived, *beside], DENOISER, NOW, series_number=1013)
    (study,) = note.CurrentRequestedProcedureEvidenceSequence
    assert len(study.ReferencedSeriesSequence) == 3
    assert note.SOPInstanceUID != every_companion(derived)["quality"].SOPInstanceUID
    if DCIODVFY.exists():
        assert dciodvfy(write_series([note], tmp_path)) == set()


def test_a_retraction_is_the_same_whatever_the_order() -> None:
    derived = headers(ct_series(4))
    given = [*derived, *companions(derived, FINDINGS, DENOISER, CompanionOptions(), NOW)]
    one, other = (retraction(d, DENOISER, NOW, series_number=9) for d in (given, given[::-1]))
    assert file_bytes(one) == file_bytes(other)


def test_a_retraction_from_stored_files_is_that_of_the_images_in_memory(tmp_path: Path) -> None:
    _, _, derived = derive(ct_series(3, character_set=HANGUL), 0.25)
    stored = [dcmread(p, stop_before_pixels=True) for p in write_series(derived, tmp_path)]
    one, other = (retraction(ds, DENOISER, NOW, series_number=9) for ds in (derived, stored))
    assert file_bytes(one) == file_bytes(other)


def test_a_retraction_is_of_one_study() -> None:
    two = [*headers(ct_series(1)), *headers(ct_series(1, seed=2))]
    with pytest.raises(ValueError, match="one study"):
        retraction(two, DENOISER, NOW, series_number=9)


# --- what a route gets --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (CompanionOptions(), [("PR", 10040001), ("SR", 10040002)]),
        (CompanionOptions(gsps="label", report=False), [("PR", 10040001)]),
        (CompanionOptions(gsps="none"), [("SR", 10040002)]),
        (CompanionOptions(gsps="none", report=False), []),
    ],
)
def test_a_route_gets_the_companions_it_asks_for(
    options: CompanionOptions, expected: list[tuple[str, int]]
) -> None:
    made = companions(headers(ct_series(2)), FINDINGS, DENOISER, options, NOW)
    assert [(ds.Modality, ds.SeriesNumber) for ds in made] == expected


def test_the_options_of_a_route_reach_its_companions() -> None:
    options = CompanionOptions(gsps="label", gate="off")
    state, report = companions(headers(ct_series(2)), FINDINGS, DENOISER, options, NOW)
    assert "SoftcopyVOILUTSequence" not in state
    assert content(report)["Quality gate"] == ["NOT_APPLIED"]


@pytest.mark.parametrize(
    ("route", "modalities", "label"),
    [
        ({}, ["CT", "CT", "PR", "SR"], None),
        ({"companions": Companions(gsps="none", report=False)}, ["CT", "CT"], None),
        (
            {"companions": Companions(gsps="label", report=False), "label": "burned"},
            ["CT", "CT", "PR"],
            "YES",
        ),
    ],
)
def test_the_worker_makes_what_the_route_says(
    route: dict[str, Any],
    modalities: list[str],
    label: str | None,
    models_dir: Path,
    tmp_path: Path,
) -> None:
    package = read_package(models_dir / "identity")
    models, failures, _ = load_models({"identity": package}, "cpu", 1)
    files = tuple(write_series(ct_series(2, 64, 160), tmp_path / "in"))
    given = Route(name="r", match={}, model="identity", send_to=(), **route)
    order = Order.of(given, files, tmp_path / "out", NOW)
    (series,) = translate(order, models, failures).series
    made = [dcmread(path) for path in (tmp_path / "out").rglob("*.dcm")]
    assert sorted(ds.Modality for ds in made) == modalities
    assert {ds.SOPInstanceUID for ds in made} == {uid for uid, _ in series.files()}
    assert {ds.get("BurnedInAnnotation") for ds in made if "PixelData" in ds} == {label}


def test_a_header_is_the_instance_without_its_pixels() -> None:
    _, _, (derived, _) = derive(ct_series(2))
    header = header_of(derived)
    assert "PixelData" in derived
    assert set(derived.keys()) - set(header.keys()) == {0x7FE00010}


# --- burned in ----------------------------------------------------------------------------------
def test_a_burned_in_label_costs_its_own_pixels_only_and_is_declared() -> None:
    series = ct_series(3, 64, 160, padding=3000, signed=True, bits_stored=16)
    _, _, clean = derive(series)
    _, _, burned = derive(series, options=OutputOptions(label="burned"))
    label = label_pixels(64, 160)
    brightest = max(ds.pixel_array[ds.pixel_array != 3000].max() for ds in clean)
    for one, other in zip(clean, burned, strict=True):
        assert (one.pixel_array[~label] == other.pixel_array[~label]).all()
        assert (other.pixel_array[label] == brightest).all()
        assert other.LargestImagePixelValue == other.pixel_array.max()
        assert (one.get("BurnedInAnnotation"), other.BurnedInAnnotation) == (None, "YES")
        assert f"burned-in label={label.sum()} pixels lost" in other.DerivationDescription
        assert "burned-in" not in one.DerivationDescription
        assert one.SOPInstanceUID != other.SOPInstanceUID
        assert one.SeriesInstanceUID != other.SeriesInstanceUID


def test_a_burned_in_label_is_as_bright_in_units_where_slices_have_their_own_rescale() -> None:
    series = ct_series(2, 64, 160, bits_stored=16, slope="0.5")
    series[1] = changed([series[1]], RescaleSlope="0.25")[0]
    _, _, burned = derive(series, options=OutputOptions(label="burned"))
    label = label_pixels(64, 160)
    values = [
        ds.pixel_array[label] * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in burned
    ]
    assert np.ptp(np.concatenate(values)) <= 0.5


@pytest.mark.parametrize(
    ("rows", "columns", "pixels"), [(512, 512, 300), (64, 64, 300), (1024, 1024, 1200)]
)
def test_a_burned_in_label_takes_few_pixels_and_breaks_into_lines(
    rows: int, columns: int, pixels: int
) -> None:
    assert label_pixels(rows, columns).sum() == pixels


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (64, 40), (12, 64)])
def test_a_matrix_too_small_for_a_burned_in_label_is_refused(rows: int, columns: int) -> None:
    with pytest.raises(SeriesRefused, match="LABEL_DOES_NOT_FIT"):
        label_pixels(rows, columns)


# --- at the destination -------------------------------------------------------------------------
@contextlib.contextmanager
def destination(
    classes: Sequence[str], statuses: Mapping[str, int] | None = None
) -> Iterator[tuple[Address, list[str]]]:
    """A Storage SCP for some SOP classes, and the SOP Instance UIDs that it took."""
    taken: list[str] = []

    def store(event: evt.Event) -> int:
        status = (statuses or {}).get(event.request.AffectedSOPClassUID, 0)
        if status == 0:
            taken.append(event.request.AffectedSOPInstanceUID)
        return status

    entity = AE("PACS")
    for sop_class in classes:
        entity.add_supported_context(sop_class)
    port = free_port()
    server = entity.start_server(
        ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)]
    )
    try:
        yield Address("127.0.0.1", port, "PACS", "DICOMNODE"), taken
    finally:
        server.shutdown()


@pytest.fixture(name="files")
def _files(tmp_path: Path) -> dict[str, Path]:
    """Two images and their companions, by SOP Instance UID."""
    _, _, derived = derive(ct_series(2), 0.25)
    made = [*derived, *companions(derived, FINDINGS, DENOISER, CompanionOptions(), NOW)]
    paths = write_series(made, tmp_path / "files")
    return {str(ds.SOPInstanceUID): path for ds, path in zip(made, paths, strict=True)}


@pytest.mark.network
@pytest.mark.parametrize(
    ("classes", "statuses", "said"),
    [
        ([CTImageStorage, GSPS, REPORT], {}, [0, 0, 0, 0]),
        ([CTImageStorage, GSPS], {}, [0, 0, 0, 0x0122]),
        ([CTImageStorage], {}, [0, 0, 0x0122, 0x0122]),
        ([CTImageStorage, GSPS, REPORT], {GSPS: 0xA900, REPORT: 0xC123}, [0, 0, 0xA900, 0xC123]),
        ([CTImageStorage, GSPS, REPORT], {GSPS: 0x0122}, [0, 0, 0x0122, 0]),
    ],
)
def test_images_are_delivered_though_a_destination_refuses_companions(
    classes: list[str], statuses: dict[str, int], said: list[int], files: dict[str, Path]
) -> None:
    told: dict[str, int] = {}
    with destination(classes, statuses) as (address, taken):
        send_instances([*files.values()], address, told.__setitem__, sop_classes.COMPANIONS)
    assert told == dict(zip(files, said, strict=True))
    assert taken == [uid for uid, status in told.items() if status == 0]


@pytest.mark.network
def test_companions_left_over_from_a_cut_association_may_be_refused_too(
    files: dict[str, Path],
) -> None:
    told: dict[str, int] = {}
    left = dict(list(files.items())[2:])
    with destination([CTImageStorage]) as (address, _):
        send_instances([*left.values()], address, told.__setitem__, sop_classes.COMPANIONS)
    assert told == dict.fromkeys(left, 0x0122)


@pytest.mark.network
def test_what_a_destination_must_take_is_still_refused_by_name(
    files: dict[str, Path], tmp_path: Path
) -> None:
    note = retraction(headers(ct_series(2)), DENOISER, NOW, series_number=9)
    (path,) = write_series([note], tmp_path / "note")
    for given, optional in ([*files.values()], ()), ([path], sop_classes.COMPANIONS):
        with (
            destination([CTImageStorage]) as (address, _),
            pytest.raises(DeliveryRefused, match="no presentation context"),
        ):
            send_instances(given, address, lambda uid, status: None, optional)
    paths = [*files.values()]
    with (
        destination([GSPS, REPORT]) as (address, _),
        pytest.raises(DeliveryRefused, match=r"presentation context .*2 instances"),
    ):
        send_instances(paths, address, lambda uid, status: None, sop_classes.COMPANIONS)


@pytest.mark.peers
@pytest.mark.network
@needs(STORESCU, ORTHANC)
def test_a_node_sends_companions_with_the_images_and_lives_with_their_refusal(
    models_dir: Path, tmp_path: Path
) -> None:
    series = ct_series(4, 32, 32, character_set=HANGUL)
    files = write_series(series, tmp_path / "source")
    with (
        orthanc(tmp_path / "orthanc") as archive,
        destination([CTImageStorage]) as (address, taken),
    ):
        picky = Archive("PICKY", address.port)
        settings = node_settings(models_dir, [archive, picky], companions=True)
        with running_node(tmp_path / "node", settings) as node:
            assert send(STORESCU, files, node.port).returncode == 0
            uid = str(series[0].SeriesInstanceUID)
            (job,) = node.wait_settled(uid)["jobs"]
            text = "\n".join(event["text"] for event in node.status(uid)["timeline"])
            metrics = node.get("metrics")[1]
        assert job["state"] == "done"
        accepted = {d["destination"]: d["accepted"] for d in job["deliveries"]}
        assert accepted == {"orthanc": 6, "picky": 4}
        assert "6 instances, 2 companions of them refused with 0x0122" in text
        counter = "dicomnode_instances_delivered_total"
        assert f'{counter}{{destination="picky",outcome="refused"}} 2.0' in metrics
        assert len(taken) == 4
        back = [
            dcmread(path)
            for found in archive.series()
            for path in archive.fetch(found, tmp_path / "back")
        ]
    assert sorted(ds.Modality for ds in back) == ["CT", "CT", "CT", "CT", "PR", "SR"]
    stored = dcmread(files[0]).get_item("PatientName").value
    assert {ds.get_item("PatientName").value for ds in back} == {stored}
    images = {ds.SOPInstanceUID for ds in back if ds.Modality == "CT"}
    for ds in back:
        named = {e.value for e in ds.iterall() if e.keyword == "ReferencedSOPInstanceUID"}
        assert ds.Modality == "CT" or named == images
