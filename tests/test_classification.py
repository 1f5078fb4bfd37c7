"""A route's classifier looks at what is sent; without it the images go out, and somebody is told.

The classifier is that of tests/classifiers.py, which only tells bright images from dark ones.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, dcmread

from dicomnode.classification import Classification, Classifiers, load_classifiers
from dicomnode.companions import CompanionOptions, with_companions
from dicomnode.config import Companions, Route
from dicomnode.imaging.classes import ClassifierInput
from dicomnode.imaging.classifier import ClassifierPackage, LoadedClassifier
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.manifest import Bounds, GeneratorSpec, Range
from dicomnode.imaging.networks import build_classifier
from dicomnode.imaging.package import read_package
from dicomnode.orders import Order, Outcome
from dicomnode.translating import translate
from dicomnode.worker import load_models
from tests.classifiers import BRIGHTNESS, SLOPES, brightness
from tests.factories import ct_series, mr_series, write_series
from tests.judge_dicom import judge_folders
from tests.judges import DCENTVFY, DCIODVFY, DCMDUMP, DCMPSCHK, DSRDUMP, dciodvfy, require
from tests.peers import (
    ORTHANC,
    STORESCU,
    identity_package,
    needs,
    node_settings,
    orthanc,
    running_node,
    send,
)
from tests.test_companions import content
from tests.test_derived import NOW, as_task
from tests.test_walk import series_uid

CODES = ["254626006", "22687000", "254634000", "17621005"]


def run(
    series: list[Dataset], folder: Path, classifiers: Classifiers | None, **route: Any
) -> tuple[Outcome, list[Dataset]]:
    """One order through the worker's own function: what became of it, and the files it wrote."""
    beside = Companions(classifier="brightness")
    given = Route(name="r", match={}, model="identity", send_to=(), companions=beside, **route)
    package = read_package(identity_package(folder / "models"))
    models, failures, _ = load_models({"identity": package}, "cpu", 1)
    files = tuple(write_series(series, folder / "in"))
    order = Order.of(given, files, folder / "out", NOW)
    outcome = translate(order, models, failures, classifiers)
    return outcome, [dcmread(path) for path in sorted((folder / "out").rglob("*.dcm"))]


def loaded(folder: Path, **manifest: Any) -> Classifiers:
    return load_classifiers({"brightness": brightness(folder, **manifest)}, "cpu")


def report_among(made: list[Dataset]) -> Dataset | None:
    found = [ds for ds in made if "Classifier" in ds.SeriesDescription]
    assert len(found) <= 1
    return found[0] if found else None


def test_the_report_has_the_mean_probabilities_of_the_images_as_they_were_sent(
    tmp_path: Path,
) -> None:
    source = ct_series(3, 32, 32)
    for ds, brighter in zip(source, (0, 300, 600), strict=True):
        ds.RescaleIntercept = float(ds.RescaleIntercept) + brighter
    outcome, made = run(source, tmp_path, loaded(tmp_path))
    assert outcome.unclassified == 0
    report = report_among(made)
    assert report is not None
    images = [ds for ds in made if "PixelData" in ds]
    each = []
    for image in images:
        hu = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
        logits = (np.clip(hu, -1000, 1000) / 1000).mean() * np.array(SLOPES)
        each.append(np.exp(logits) / np.exp(logits).sum())
    said = content(report)
    assert said["Finding"] == CODES
    found = [value for value, _ in said["Probability"]]
    np.testing.assert_allclose(found, np.mean(each, axis=0), atol=5e-3)
    assert sum(found) == pytest.approx(1, abs=2e-4)
    assert any("mean of 3 images" in text for text in said["Algorithm Parameters"])
    named = {e.value for e in report.iterall() if e.keyword == "ReferencedSOPInstanceUID"}
    assert named == {ds.SOPInstanceUID for ds in images}
    (series,) = outcome.series
    assert str(report.SOPInstanceUID) in [uid for uid, _ in series.companions]


def test_foreign_programs_accept_the_report_beside_images_and_companions(tmp_path: Path) -> None:
    require(DCIODVFY, DCENTVFY, DCMDUMP, DCMPSCHK, DSRDUMP)
    source = ct_series(3, 32, 32, character_set="\\ISO 2022 IR 149", TimezoneOffsetFromUTC="+0900")
    _, made = run(source, tmp_path, loaded(tmp_path))
    derived = write_series([ds for ds in made if "PixelData" in ds], tmp_path / "derived")
    beside = write_series([ds for ds in made if "PixelData" not in ds], tmp_path / "beside")
    assert len(beside) == 3
    np.save(tmp_path / "derived" / "prediction.npy", _voxels(derived))
    code, text = judge_folders(tmp_path / "in", tmp_path / "derived", [tmp_path / "beside"])
    assert code == 0, text
    assert "PASS companions" in text
    assert dciodvfy(beside) == set()


def _voxels(files: list[Path]) -> Any:
    images = sorted(map(dcmread, files), key=lambda ds: float(ds.ImagePositionPatient[2]))
    return np.stack([ds.pixel_array * ds.RescaleSlope + ds.RescaleIntercept for ds in images])


def test_the_same_series_gives_the_same_report(tmp_path: Path) -> None:
    classifiers = loaded(tmp_path)
    (_, one), (_, other) = (
        run(ct_series(2, 32, 32), tmp_path / part, classifiers) for part in ("a", "b")
    )
    assert one == other
    assert report_among(one) is not None


def test_a_series_of_two_stacks_gets_a_report_for_each(tmp_path: Path) -> None:
    series = ct_series(4, 32, 32)
    for ds in series[2:]:
        ds.ConvolutionKernel = "B70f"
    outcome, made = run(series, tmp_path, loaded(tmp_path))
    assert len(outcome.series) == 2
    assert len([ds for ds in made if "Classifier" in ds.SeriesDescription]) == 2


def test_padding_is_as_dark_as_air_to_it(tmp_path: Path) -> None:
    series = ct_series(1, 32, 32, padding=3000, signed=True, bits_stored=16)
    found = Classification("brightness", loaded(tmp_path).loaded["brightness"])
    (image,) = series
    stored = image.pixel_array.copy()
    stored[:16] = 3000
    image.PixelData = stored.tobytes()
    found.look(image)
    (report,) = found.reports([image], NOW, 1)
    hu = stored * float(image.RescaleSlope) + float(image.RescaleIntercept)
    hu[stored == 3000] = -1000
    logits = (np.clip(hu, -1000, 1000) / 1000).mean() * np.array(SLOPES)
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(
        [value for value, _ in content(report)["Probability"]], expected, atol=5e-3
    )


# --- what goes wrong costs the report, never the images -----------------------------------------
def _bounded(**bounds: Any) -> dict[str, Any]:
    return {"bounds": Bounds(("CT",), **bounds)}


OUTSIDE: list[tuple[dict[str, Any], str]] = [
    (_bounded(rows=Range(512, 512)), "OUT_OF_BOUNDS: model brightness 1.0.0 was not accepted"),
    (_bounded(slices=Range(20, None)), "slices is 2, allowed 20 to any"),
    (_bounded(hu_range=Range(-10, 10)), "a voxel has"),
    (_bounded(require={"BodyPartExamined": ("CHEST",)}), "BodyPartExamined is not one of CHEST"),
    (
        {"input": ClassifierInput("MR", "AU", Window(0, 1), 16), "bounds": Bounds(("MR",))},
        "classifier brightness takes MR, not CT",
    ),
]


@pytest.mark.parametrize(("manifest", "why"), OUTSIDE, ids=[why for _, why in OUTSIDE])
def test_images_outside_its_bounds_go_out_without_a_report_and_with_the_reason(
    manifest: dict[str, Any], why: str, tmp_path: Path
) -> None:
    series = ct_series(2, 32, 32, BodyPartExamined="LEG")
    outcome, made = run(series, tmp_path, loaded(tmp_path, **manifest))
    assert outcome.plausible
    assert [ds.Modality for ds in made].count("CT") == 2
    assert report_among(made) is None
    assert outcome.unclassified == 1
    assert "no report of classifier brightness: " in outcome.detail
    assert why in outcome.detail


def test_a_classifier_that_cannot_be_loaded_is_named_with_its_failure(tmp_path: Path) -> None:
    package = brightness(tmp_path)
    damaged = replace(package, digest="ab" * 32)
    classifiers = load_classifiers({"brightness": damaged}, "cpu")
    assert not classifiers.loaded
    outcome, made = run(ct_series(2, 32, 32), tmp_path, classifiers)
    assert report_among(made) is None
    assert "changed since the node started" in outcome.detail
    assert outcome.unclassified == 1
    assert len(outcome.series[0].instances) == 2


def test_a_classifier_that_runs_out_of_memory_loses_only_its_report(tmp_path: Path) -> None:
    package = brightness(tmp_path)
    greedy = replace(BRIGHTNESS, input=ClassifierInput("CT", "HU", Window(-1000, 1000), 1024))
    network = build_classifier("densenet121", {"classes": 4, "channels": 1})
    network.register_forward_pre_hook(_out_of_memory)
    big = ClassifierPackage(package.path, greedy, package.digest)
    classifiers = Classifiers({"brightness": LoadedClassifier(big, network, "cpu")})
    outcome, made = run(ct_series(2, 32, 32), tmp_path, classifiers)
    assert [ds.Modality for ds in made].count("CT") == 2
    assert report_among(made) is None
    assert "no report of classifier brightness: RuntimeError" in outcome.detail


def _out_of_memory(*_: object) -> None:
    """What torch raises on a CPU: DefaultCPUAllocator: not enough memory."""
    import torch

    torch.empty(2**62, dtype=torch.uint8)


def test_a_synthetic_mr_is_classified_in_its_own_values(tmp_path: Path) -> None:
    given = ClassifierInput("MR", "AU", Window(0, 4095), 16)
    package = brightness(tmp_path, input=given, bounds=Bounds(("MR",)))
    classifier = load_classifiers({"brightness": package}, "cpu").for_series("brightness")
    assert classifier is not None
    series = mr_series(2, 32, 32)
    for image in series:
        classifier.look(image)
    assert len(list(classifier.reports(series, NOW, 1))) == 1
    assert str(classifier) == ""


def test_a_series_that_is_made_anew_is_classified_as_if_for_the_first_time(
    tmp_path: Path,
) -> None:
    bright, dark = ct_series(2, 32, 32), ct_series(2, 32, 32)
    for ds in dark:
        ds.RescaleIntercept = float(ds.RescaleIntercept) - 600
    found = loaded(tmp_path).for_series("brightness")
    once = loaded(tmp_path).for_series("brightness")
    options = CompanionOptions(gsps="none", report=False)
    identity = as_task("denoise")
    list(with_companions(bright, [], identity, options, NOW, found))
    (*_, again) = with_companions(dark, [], identity, options, NOW, found)
    (*_, first) = with_companions(dark, [], identity, options, NOW, once)
    assert again == first


def test_a_route_without_a_classifier_asks_for_none() -> None:
    assert Classifiers().for_series(None) is None


def test_a_network_of_another_kind_is_never_taken(tmp_path: Path) -> None:
    spec = GeneratorSpec("identity", {"classes": 4})
    package = replace(brightness(tmp_path), manifest=replace(BRIGHTNESS, network=spec))
    assert "no 'identity'" in load_classifiers({"x": package}, "cpu").failures["x"]


# --- over the network ---------------------------------------------------------------------------
@pytest.mark.network
@pytest.mark.peers
@needs(STORESCU, ORTHANC)
def test_the_report_arrives_at_the_archive_and_a_failure_is_counted(tmp_path: Path) -> None:
    models = tmp_path / "models"
    identity_package(models)
    brightness(models)
    brightness(models, "legs", bounds=Bounds(("CT",), require={"BodyPartExamined": ("LEG",)}))
    with orthanc(tmp_path / "orthanc") as archive:
        settings = node_settings(models, [archive])
        (route,) = settings["routes"]
        settings["routes"] = [
            {**route, "name": name, "series_number": f"+{offset}"}
            | {"companions": {**route["companions"], "classifier": name}}
            for name, offset in (("brightness", 1000), ("legs", 2000))
        ]
        with running_node(tmp_path / "node", settings) as node:
            files = write_series(ct_series(3, 32, 32), tmp_path / "in")
            assert send(STORESCU, files, node.port).returncode == 0
            series = node.wait_settled(series_uid(files))
            assert [job["state"] for job in series["jobs"]] == ["done", "done"]
            words = " ".join(event["text"] for event in series["timeline"])
            assert "no report of classifier legs: OUT_OF_BOUNDS" in words
            said = node.get("metrics")[1]
            assert 'dicomnode_series_unclassified_total{route="legs"} 1.0' in said
            assert 'unclassified_total{route="brightness"}' not in said
            listed = node.run("check").stdout
            assert "classifier legs 1.0.0: ok" in listed
        arrived = [s["MainDicomTags"]["Modality"] for s in archive.series()]
        assert sorted(arrived) == ["CT", "CT", "SR"]
        (report,) = (s for s in archive.series() if s["MainDicomTags"]["Modality"] == "SR")
        (path,) = archive.fetch(report, tmp_path / "back")
        assert content(dcmread(path))["Finding"] == CODES


def test_a_missing_classifier_stops_the_node_and_names_its_route(tmp_path: Path) -> None:
    from dicomnode.config import config_from_mapping
    from dicomnode.errors import ConfigError
    from dicomnode.node import load_classifiers as packages_of

    settings = node_settings(tmp_path / "models", [])
    settings["routes"][0]["companions"] = {"classifier": "chest"}
    config = config_from_mapping(settings, tmp_path)
    with pytest.raises(ConfigError, match=r"routes\[0\]\.companions\.classifier: chest: "):
        packages_of(config)
    settings["routes"][0]["companions"] = {"classifier": "../chest"}
    with pytest.raises(ConfigError, match=r"routes\[0\]\.companions\.classifier: not the name"):
        config_from_mapping(settings, tmp_path)
