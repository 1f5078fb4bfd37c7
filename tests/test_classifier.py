"""Classifiers: DenseNet-121 is torchvision's by the number, a package is whole or refused."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from dicomnode.errors import PackageError
from dicomnode.imaging.classes import Class, ClassifierInput, Coded
from dicomnode.imaging.classifier import (
    ClassifierPackage,
    load_classifier,
    read_any,
    read_classifier,
    write_classifier,
)
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.manifest import DicomSpec, GeneratorSpec
from dicomnode.imaging.networks import as_squares, build_classifier
from dicomnode.imaging.package import read_package
from tests.classifiers import BRIGHTNESS, LUNG, SLOPES, brightness
from tests.peers import identity_package


# --- DenseNet-121 -------------------------------------------------------------------------------
def test_densenet121_has_the_weights_of_torchvision_by_name_shape_and_number() -> None:
    network = build_classifier("densenet121", {"classes": 1000})
    assert sum(weight.numel() for weight in network.parameters()) == 7_978_856
    lines = [f"{key} {tuple(value.shape)}\n" for key, value in network.state_dict().items()]
    assert len(lines) == 727
    digest = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    # of torchvision/models/densenet.py (pytorch/vision 01db3ba), run apart from this project
    assert digest == "7276922e3dc9be16708b7fc240e0d025619aabf1dfd8e509175f5d359728eceb"


def test_densenet121_computes_what_torchvision_does() -> None:
    network = build_classifier("densenet121", {"classes": 5})
    count = 0
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.dtype.is_floating_point:
                steps = torch.arange(value.numel(), dtype=torch.float32).reshape(value.shape)
                value.copy_(0.5 + 0.4 * torch.sin(steps * 0.7 + count))
                if value.ndim == 4:
                    value.sub_(0.5).mul_(1 / value[0].numel() ** 0.5)
            count += 1
        x = torch.sin(torch.arange(3 * 70 * 65, dtype=torch.float32)).reshape(1, 3, 70, 65)
        given = network(x)[0]
    assert torch.allclose(given, torch.tensor(TORCHVISION), rtol=1e-4), given.tolist()


TORCHVISION = (110.25028, 116.65144, 123.8256, 129.91162, 133.29333)
"""What torchvision's own network makes of the same weights and image, run apart from this."""


@pytest.mark.parametrize(
    "options",
    [
        {"classes": 1},
        {"classes": 4, "channels": 2},
        {"classes": 4, "blocks": []},
        {"classes": 4, "blocks": [65]},
        {"classes": 4, "growth": 0},
        {"classes": 4, "colour": 3},
        {},
    ],
)
def test_options_that_make_no_classifier_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PackageError, match=r"network\.options of densenet121"):
        build_classifier("densenet121", options)


def test_a_generator_is_no_classifier() -> None:
    with pytest.raises(PackageError, match="no 'resnet_9'; known: brightness, densenet121"):
        build_classifier("resnet_9", {})


# --- what it sees -------------------------------------------------------------------------------
def test_an_image_becomes_a_square_without_changing_its_shape() -> None:
    wide = torch.ones(1, 20, 40)
    seen = as_squares(wide, 40)
    assert seen.shape == (1, 1, 40, 40)
    assert (seen[0, 0, :20] == 1).all()
    assert (seen[0, 0, 20:] == -1).all()
    small = as_squares(wide, 20)[0, 0]
    assert small[:9].min() == pytest.approx(1)
    assert small[11:].max() == pytest.approx(-1)


def test_resampling_to_a_smaller_square_averages() -> None:
    stripes = torch.ones(1, 64, 64)
    stripes[:, :, ::4] = stripes[:, :, 3::4] = -1.0
    inner = as_squares(stripes, 16)[..., 1:-1]
    assert inner.abs().max() < 0.02  # without averaging: 1 everywhere


# --- packages -----------------------------------------------------------------------------------
def test_probabilities_come_in_the_order_of_the_classes_and_of_each_image_alone(
    tmp_path: Path,
) -> None:
    classifier = load_classifier(brightness(tmp_path))
    voxels = np.stack([np.full((30, 20), hu, np.float32) for hu in (-1000, 0, 3000)])
    found = classifier.probabilities(voxels)
    # two thirds of the square are image, the rest is as dark as air
    means = np.array([-1, -1 / 3, 1 / 3])
    expected = np.exp(means[:, None] * SLOPES)
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), atol=2e-3)
    np.testing.assert_array_equal(classifier.probabilities(voxels[1:2])[0], found[1])


def test_a_package_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    package = brightness(tmp_path)
    assert package.manifest == BRIGHTNESS
    assert read_any(package.path) == package
    assert len(package.digest) == 64
    assert not isinstance(read_any(identity_package(tmp_path)), ClassifierPackage)


def test_a_classifier_translates_nothing_and_a_translation_classifies_nothing(
    tmp_path: Path,
) -> None:
    with pytest.raises(PackageError, match=r"brightness: manifest.*: unknown keys: classes"):
        read_package(brightness(tmp_path).path)
    with pytest.raises(PackageError, match=r"identity: manifest: unknown keys"):
        read_classifier(identity_package(tmp_path))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "../x"}, "manifest.name"),
    ({"classes": LUNG[:1]}, "manifest.classes: from 2"),
    ({"classes": (LUNG[0], *LUNG[:3])}, "manifest.classes: two have the same name"),
    (
        {"classes": (*LUNG[:3], Class("other", LUNG[0].code))},
        "manifest.classes: two have the same code",
    ),
    ({"classes": LUNG[:3]}, "manifest.network.options.classes"),
]


@pytest.mark.parametrize(("changed", "what"), WRONG, ids=[what for _, what in WRONG])
def test_a_manifest_that_does_not_fit_together_is_refused(
    changed: dict[str, Any], what: str
) -> None:
    with pytest.raises(PackageError, match=what.replace(".", r"\.")):
        dataclasses.replace(BRIGHTNESS, **changed)


@pytest.mark.parametrize(
    ("code", "key"),
    [
        (("1" * 17, "SCT", "x"), "value"),
        (("1", "", "x"), "scheme"),
        (("1", "SCT", "ä"), "meaning"),
        (("1", "SCT", "a\\b"), "meaning"),
    ],
)
def test_a_code_that_no_sequence_can_hold_is_refused(code: tuple[str, str, str], key: str) -> None:
    with pytest.raises(PackageError, match=key):
        Coded(*code)


def test_a_unit_of_another_modality_or_a_matrix_of_no_use_is_refused() -> None:
    with pytest.raises(PackageError, match=r"input\.unit"):
        ClassifierInput("MR", "HU", Window(0, 1), 64)
    with pytest.raises(PackageError, match=r"input\.matrix"):
        ClassifierInput("CT", "HU", Window(0, 1), 8)


def test_a_network_that_would_leave_nothing_of_an_image_is_refused(tmp_path: Path) -> None:
    deep = GeneratorSpec("densenet121", {"classes": 4, "blocks": [1] * 4, "growth": 4, "width": 4})
    state = build_classifier(deep.architecture, deep.options).state_dict()
    given = dataclasses.replace(BRIGHTNESS, network=deep)
    with pytest.raises(PackageError, match=r"manifest\.input\.matrix: at least 32"):
        write_classifier(tmp_path / "x", given, state, np.zeros((1, 16, 16), np.float32), "#\n")


def _rewritten(folder: Path, file: str, data: bytes) -> Path:
    """The package with another file and sums that fit."""
    (folder / file).write_bytes(data)
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in sorted(p.name for p in folder.iterdir() if p.name != "SHA256SUMS")
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    folder = brightness(tmp_path).path
    data = yaml.safe_load((folder / "manifest.yaml").read_text())
    data["classes"][2]["code"]["colour"] = "red"
    _rewritten(folder, "manifest.yaml", yaml.safe_dump(data).encode())
    with pytest.raises(PackageError, match=r"manifest\.classes\[2\]\.code: unknown keys: colour"):
        read_classifier(folder)


def test_weights_that_give_other_probabilities_fail_the_self_test(tmp_path: Path) -> None:
    package = brightness(tmp_path)
    state = {"classifier.weight": torch.ones(4, 1), "classifier.bias": torch.zeros(4)}
    save_file(state, tmp_path / "w")
    _rewritten(package.path, "weights.safetensors", (tmp_path / "w").read_bytes())
    with pytest.raises(PackageError, match="self-test on cpu differs by"):
        load_classifier(read_classifier(package.path))


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ({"classifier.weight": torch.zeros(4, 1)}, "cannot load on cpu"),
        (
            {"classifier.weight": torch.zeros(4, 1).half(), "classifier.bias": torch.zeros(4)},
            "weights must be float32: classifier.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_a_classifier_are_refused(
    state: dict[str, torch.Tensor], what: str, tmp_path: Path
) -> None:
    folder = brightness(tmp_path).path
    save_file(state, tmp_path / "w")
    _rewritten(folder, "weights.safetensors", (tmp_path / "w").read_bytes())
    with pytest.raises(PackageError, match=what):
        load_classifier(read_classifier(folder))


def test_a_self_test_with_an_image_for_a_result_is_refused(tmp_path: Path) -> None:
    folder = brightness(tmp_path).path
    image = np.zeros((2, 16, 16), np.float32)
    np.savez(tmp_path / "g.npz", source=image, result=image, tolerance=np.float64(1))
    _rewritten(folder, "golden.npz", (tmp_path / "g.npz").read_bytes())
    with pytest.raises(PackageError, match=r"\(slices, classes\)"):
        load_classifier(read_classifier(folder))


def test_a_changed_file_is_refused_by_name(tmp_path: Path) -> None:
    folder = brightness(tmp_path).path
    (folder / "MODEL_CARD.md").write_text("# Fit for everything\n")
    with pytest.raises(PackageError, match=r"MODEL_CARD\.md differs from SHA256SUMS"):
        read_any(folder)


def test_a_folder_with_a_version_holds_that_version(tmp_path: Path) -> None:
    package = brightness(tmp_path, dicom=DicomSpec("b", "test", "1"))
    other = package.path.rename(tmp_path / "brightness@2.0.0")
    with pytest.raises(PackageError, match=r"holds brightness@1\.0\.0"):
        read_classifier(other)
