"""The bundled packages do what their cards say."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread

from dicomnode.imaging.inference import Model, load_model, predict
from dicomnode.imaging.networks import build_generator
from dicomnode.imaging.package import read_golden, read_package
from dicomnode.imaging.phantom import phantom_volume
from dicomnode.imaging.volume import Volume, volume_from_datasets
from dicomnode.qa import check_bounds, check_limits
from training.metrics import body_mask, edge_retention, psnr, tissue_masks

MODELS = sorted(p.parent for p in (Path(__file__).parents[1] / "models").glob("*/manifest.yaml"))
LDCT = next(path for path in MODELS if path.name == "ldct-denoise")
SPACING_MM = 0.7


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_every_bundled_package_passes_its_checks_and_self_test(path: Path) -> None:
    package = read_package(path)
    assert package.name == path.name
    check_limits(package)
    load_model(package)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_every_card_says_first_what_it_must_not_be_used_for(path: Path) -> None:
    lines = (path / "MODEL_CARD.md").read_text("utf-8").split("\n\n")
    assert lines[1].startswith("**Not a medical device.")


@pytest.fixture(scope="module")
def denoiser() -> Model:
    return load_model(read_package(LDCT))


@pytest.fixture(scope="module")
def truth() -> NDArray[np.float32]:
    """Two slices of the generated chest without noise, (2, 512, 512), float32, HU."""
    return phantom_volume(2, photons=math.inf)


@pytest.fixture(scope="module")
def noisy() -> NDArray[np.float32]:
    return phantom_volume(2, views=240)


@pytest.fixture(scope="module")
def result(denoiser: Model, noisy: NDArray[np.float32]) -> NDArray[np.float32]:
    return predict(denoiser, as_volume(noisy)).voxels


def as_volume(voxels: NDArray[np.float32]) -> Volume:
    positions = np.array([[0.0, 0.0, 2.5 * index] for index in range(len(voxels))])
    axial = np.array([1.0, 0, 0, 0, 1, 0])
    return Volume(voxels, "HU", positions, axial, (2.5, SPACING_MM, SPACING_MM), "", None)


def test_the_proof_on_held_out_patients_is_in_the_manifest_and_in_the_card() -> None:
    figures = read_package(LDCT).manifest.validation
    card = (LDCT / "MODEL_CARD.md").read_text("utf-8")
    assert figures["gain_db"][0] >= 3.0
    assert f"**{figures['gain_db'][0]:.2f} dB**" in card
    for tissue in ("lung", "fat", "soft_tissue", "bone"):
        mean = figures[f"bias_{tissue}_hu"][0]
        assert abs(mean) <= 2.0
        assert re.search(rf"bias in {tissue.replace('_', ' ')} \| {mean:.2f} HU", card)


def test_the_package_is_small() -> None:
    assert sum(file.stat().st_size for file in LDCT.iterdir()) < 3 << 20


def test_the_golden_slice_is_changed_and_is_generated() -> None:
    golden = read_golden(LDCT)
    assert golden.source.shape == (1, 96, 96)
    assert np.abs(golden.result - golden.source).mean() > 1


def test_it_removes_noise_from_a_chest_that_it_never_saw(
    truth: NDArray[np.float32], noisy: NDArray[np.float32], result: NDArray[np.float32]
) -> None:
    for clean, low, denoised in zip(truth, noisy, result, strict=True):
        body, window = body_mask(clean), (-160.0, 240.0)
        assert psnr(denoised, clean, body, window) > psnr(low, clean, body, window) + 4


def test_it_shifts_no_tissue_by_two_hounsfield_units(
    truth: NDArray[np.float32], noisy: NDArray[np.float32], result: NDArray[np.float32]
) -> None:
    for clean, low, denoised in zip(truth, noisy, result, strict=True):
        for mask in tissue_masks(clean, SPACING_MM, body_mask(clean)).values():
            if mask.sum() >= 20_000:  # fewer pixels: the mean of their noise is not small
                assert abs((denoised - low)[mask].mean()) < 2


def test_it_keeps_edges(truth: NDArray[np.float32], result: NDArray[np.float32]) -> None:
    for clean, denoised in zip(truth, result, strict=True):
        assert edge_retention(denoised, clean, SPACING_MM, body_mask(clean)) > 0.8


def test_an_image_without_noise_is_left_almost_alone(
    denoiser: Model, truth: NDArray[np.float32]
) -> None:
    change = predict(denoiser, as_volume(truth[:1])).voxels - truth[:1]
    assert np.sqrt((change[truth[:1] > -500] ** 2).mean()) < 4


def test_tiles_with_the_declared_overlap_equal_the_whole_slice(
    denoiser: Model, noisy: NDArray[np.float32], result: NDArray[np.float32]
) -> None:
    tiling = denoiser.package.manifest.tiling
    half, reach = 256, tiling.overlap
    tile = predict(denoiser, as_volume(noisy[:1, :, : half + reach])).voxels
    np.testing.assert_allclose(tile[:, :, :half], result[:1, :, :half], atol=1e-3)


def test_the_declared_overlap_covers_the_receptive_field() -> None:
    manifest = read_package(LDCT).manifest
    generator = build_generator(manifest.generator.architecture, manifest.generator.options)
    assert manifest.tiling.overlap >= generator.receptive_field


@pytest.mark.parametrize(
    "folder",
    [
        "chest_contrast_LIDC-IDRI-0001_jpegls",
        "noncontrast_chest_RICORD-1A-001012_jpeglossless",
        "contrast_abdomen_GE_CRLM-CT-1004",
    ],
)
def test_real_body_ct_is_in_scope(real_dicom: Path, folder: str) -> None:
    files = sorted((real_dicom / "ct" / folder).glob("*.dcm"))[:6]
    volume, ordered = volume_from_datasets([dcmread(path) for path in files])
    check_bounds(volume, ordered, read_package(LDCT))
