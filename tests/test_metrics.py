"""Figures of merit beside those of public programs, and on images whose figures are known.

Numbers named after a program were made with it in a scratch environment (torchmetrics 1.9.0, MONAI
1.6.1, the organisers' scripts of SynthRAD2023 fe7e385 and SynthRAD2025 17cac47, ldct-benchmark
0.0.15) on `pair`; scikit-image is asked here.
"""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import linalg, ndimage, stats
from skimage.filters import threshold_otsu
from skimage.metrics import (
    normalized_root_mse,
    peak_signal_noise_ratio,
    structural_similarity,
)

from training.distributions import (
    frechet_distance,
    histogram_distance,
    jitter,
    kernel_distance,
    noise_spectrum,
    rank_warning,
    spectrum_distance,
)
from training.errors import TrainingError
from training.inception import Inception, load_inception
from training.intervals import agreement, by_patient, difference, summary
from training.profiles import ldctbench, synthrad2023, synthrad2025
from training.regions import AIR_TO_BONE_HU, body_of, class_overlap, otsu
from training.similarity import (
    mean_absolute_error,
    normalised_root_mean_square,
    peak_ratio,
    root_mean_square,
    similarity,
    similarity_of_scales,
)

LOW, HIGH = -1024.0, 3071.0
Arrays = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]


def pair(shape: tuple[int, ...], seed: int = 5) -> Arrays:
    """Result, truth in HU and a round mask."""
    rng = np.random.default_rng(seed)
    truth = ndimage.gaussian_filter(rng.normal(0, 3000, shape), 2) - 200
    result = truth + ndimage.gaussian_filter(rng.normal(5, 80, shape), 0.7)
    centre = np.array(shape[-2:]).reshape(2, *[1] * len(shape)) / 2
    mask = np.hypot(*(np.indices(shape)[-2:] - centre)) < 0.45 * min(shape[-2:])
    return result, truth, mask


def shifted(image: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(image, LOW, HIGH) - LOW


# --- beside public programs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(60, 70), (9, 40, 44)])
def test_similarity_of_slices_and_volumes_is_that_of_scikit_image(
    shape: tuple[int, ...], dtype: type
) -> None:
    result, truth = (image.astype(dtype) for image in pair(shape)[:2])
    given = shifted(truth), shifted(result)
    expected = structural_similarity(*given, data_range=HIGH - LOW)
    assert similarity(result, truth, LOW, HIGH) == pytest.approx(expected, abs=1e-12)


def test_gaussian_similarity_is_that_of_scikit_image() -> None:
    result, truth, _ = pair((60, 70))
    expected = structural_similarity(
        shifted(truth),
        shifted(result),
        data_range=HIGH - LOW,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert similarity(result, truth, LOW, HIGH, gaussian=True) == pytest.approx(expected, abs=1e-12)


def test_peak_ratio_and_nrmse_are_those_of_scikit_image() -> None:
    result, truth, _ = pair((60, 70))
    given = np.clip(truth, -160, 240), np.clip(result, -160, 240)
    expected = peak_signal_noise_ratio(*given, data_range=400)
    assert peak_ratio(result, truth, -160, 240) == pytest.approx(expected, abs=1e-12)
    expected = normalized_root_mse(truth, result)
    assert normalised_root_mean_square(result, truth) == pytest.approx(expected, abs=1e-12)


def test_similarities_are_those_of_torchmetrics_and_monai() -> None:
    result, truth, _ = pair((200, 180))
    torchmetrics, monai, monai_scales = 0.991307708639431, 0.99130779504776, 0.9983092546463013
    found = similarity(result, truth, LOW, HIGH, gaussian=True)
    assert found == pytest.approx(torchmetrics, abs=1e-12)  # of its map without the border
    assert found == pytest.approx(monai, abs=2e-7)  # its kernel is of float32
    scales = similarity_of_scales(result, truth, LOW, HIGH)
    assert scales == pytest.approx(monai_scales, abs=2e-6)
    assert scales == pytest.approx(0.9982857323760653, abs=3e-5)  # torchmetrics: with its border


def test_synthrad_profiles_are_the_organisers_scripts() -> None:
    given = pair((12, 40, 36))
    assert synthrad2023(*given) == pytest.approx(
        {"mae": 17.83460179033078, "psnr": 44.998278113165355, "ssim": 0.9945531609787579},
        abs=1e-12,
    )
    assert synthrad2025(*given) == pytest.approx(
        {"mae": 17.83460179033078, "psnr": 45.15019679413668, "ms_ssim": 0.9986396447584193},
        abs=1e-12,
    )


@pytest.mark.parametrize(
    ("exam", "ssim", "psnr"),
    [
        ("chest", 0.9911456131818988, 34.291855208767366),
        ("abdomen", 0.9737010175091144, 26.924364894804924),
        ("neuro", 0.936602634009765, 20.55075061600437),
    ],
)
def test_the_ldct_profile_is_the_benchmark_s(exam: str, ssim: float, psnr: float) -> None:
    result, truth, _ = pair((200, 180))
    found = ldctbench(result[None], truth[None], exam)
    expected = {"ssim": ssim, "psnr": psnr, "rmse": 32.79586282970916}
    assert found == pytest.approx(expected, abs=1e-10)


def features() -> tuple[NDArray[np.float64], ...]:
    rng = np.random.default_rng(5)
    return rng.normal(0, 1, (60, 6)), rng.normal(0.2, 1.3, (50, 6)), rng.normal(0.2, 1.3, (60, 6))


def test_distances_of_features_are_those_of_torchmetrics() -> None:
    one, two, three = features()
    assert frechet_distance(one, two) == pytest.approx(1.8952798674134765, abs=1e-10)
    assert kernel_distance(one, three) == pytest.approx(0.35507088397117936, abs=1e-10)


def test_the_frechet_distance_is_the_formula_with_a_root_of_a_matrix() -> None:
    one, two, _ = features()
    first, second = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = linalg.sqrtm(first @ second).real
    apart = ((one.mean(0) - two.mean(0)) ** 2).sum()
    expected = apart + np.trace(first + second - 2 * root)
    assert frechet_distance(one, two) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-9)


def test_otsu_is_that_of_scikit_image() -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(10, 5, 3000), rng.normal(200, 40, 1000)])
    assert otsu(values) == pytest.approx(threshold_otsu(values))


# --- on images whose figures are known


def test_a_constant_error_is_its_own_figure() -> None:
    truth = np.linspace(-900, 900, 400).reshape(20, 20)
    assert mean_absolute_error(truth - 7, truth) == pytest.approx(7)
    assert root_mean_square(truth - 7, truth) == pytest.approx(7)
    assert peak_ratio(truth + 7, truth, -1000, 1000) == pytest.approx(20 * math.log10(2000 / 7))


def test_only_what_is_inside_the_mask_counts() -> None:
    truth = np.zeros((20, 20))
    result, mask = truth.copy(), np.zeros((20, 20), np.bool_)
    result[:10], mask[10:] = 50, True
    assert mean_absolute_error(result, truth, mask) == 0
    assert mean_absolute_error(result, truth) == 25
    assert peak_ratio(result, truth, -100, 100, mask) == math.inf
    assert math.isnan(mean_absolute_error(result, truth, np.zeros_like(mask)))


def test_the_range_decides_the_peak() -> None:
    result, truth, _ = pair((40, 40))
    wide, narrow = peak_ratio(result, truth, -5000, 5000), peak_ratio(result, truth, -2500, 2500)
    assert wide - narrow == pytest.approx(20 * math.log10(2))


@pytest.mark.parametrize("figure", [mean_absolute_error, root_mean_square])
def test_images_of_different_size_are_refused(figure: object) -> None:
    with pytest.raises(TrainingError, match="differ in size"):
        figure(np.zeros((4, 4)), np.zeros((4, 5)))  # type: ignore[operator]


def test_too_small_an_image_is_refused() -> None:
    with pytest.raises(TrainingError, match="smaller than the window"):
        similarity(np.zeros((6, 40)), np.zeros((6, 40)), 0, 1)
    with pytest.raises(TrainingError, match="want 176 or more"):
        similarity_of_scales(np.zeros((170, 200)), np.zeros((170, 200)), 0, 1)


def test_a_profile_refuses_an_empty_mask_and_an_unknown_exam() -> None:
    volume = np.zeros((8, 8, 8))
    for profile in (synthrad2023, synthrad2025):
        with pytest.raises(TrainingError, match="nothing is inside"):
            profile(volume, volume, volume > 0)
        with pytest.raises(TrainingError, match="differ in size"):
            profile(volume, volume[1:], volume > 0)
    with pytest.raises(TrainingError, match="'knee' is not one of chest"):
        ldctbench(volume, volume, "knee")


def test_classes_overlap_as_counted_by_hand() -> None:
    truth = np.array([-1000.0, -401, -400, 160, 161, 700])
    result = np.array([-1000.0, -400, -400, 160, 160, 700])
    assert class_overlap(result, truth, AIR_TO_BONE_HU) == pytest.approx((1 / 2, 2 / 4, 1 / 2))
    overlaps = class_overlap(truth[:2], truth[:2], AIR_TO_BONE_HU)
    assert overlaps[0] == 1
    assert math.isnan(overlaps[2])


def test_the_histogram_distance_of_a_shift_is_the_shift() -> None:
    values = np.random.default_rng(0).normal(0, 50, 5000)
    assert histogram_distance(values + 12, values) == pytest.approx(12)
    expected = stats.wasserstein_distance(values * 1.5, values)
    assert histogram_distance(values * 1.5, values) == pytest.approx(expected, rel=0.02)
    with pytest.raises(TrainingError, match="no values"):
        histogram_distance(values[:0], values)


def test_white_noise_has_its_variance_at_every_frequency() -> None:
    noise = np.random.default_rng(0).normal(0, 20, (256, 256))
    spectrum = noise_spectrum(noise, np.ones_like(noise, np.bool_))
    assert spectrum is not None
    np.testing.assert_allclose(spectrum[1:], 400, rtol=0.15)


def test_a_gradient_is_not_noise() -> None:
    row, column = np.indices((64, 64), dtype=np.float64)
    spectrum = noise_spectrum(3 * row - 2 * column, row >= 0)
    assert spectrum is not None
    assert spectrum.max() < 1e-12
    assert noise_spectrum(row, row > 50) is None


def test_noise_that_is_smoothed_away_is_a_distance_to_the_truth() -> None:
    noise = np.random.default_rng(0).normal(0, 20, (128, 128))
    everywhere = np.ones_like(noise, np.bool_)
    sharp, smooth = (
        noise_spectrum(image, everywhere)
        for image in (noise, np.asarray(ndimage.gaussian_filter(noise, 2)))
    )
    assert sharp is not None
    assert smooth is not None
    assert spectrum_distance(sharp, sharp) == 0
    assert 0.8 < spectrum_distance(smooth, sharp) < 1


def test_slices_that_flicker_are_seen() -> None:
    truth = np.broadcast_to(np.arange(6.0)[:, None, None], (6, 4, 4))
    mask = np.ones(truth.shape, np.bool_)
    flickering = truth + 10 * (np.arange(6) % 2)[:, None, None]
    assert jitter(truth, truth, mask) == 1
    assert jitter(flickering, truth, mask) == pytest.approx((3 * 11 + 2 * 9) / 5)
    assert math.isnan(jitter(truth[:1], truth[:1], mask[:1]))


def test_few_images_for_many_features_are_said() -> None:
    assert rank_warning(4096, 5000, 2048) is None
    assert "4096 or more" in str(rank_warning(300, 5000, 2048))
    one, two, _ = features()
    with pytest.raises(TrainingError, match="do not fit together"):
        frechet_distance(one, two[:, :3])
    with pytest.raises(TrainingError, match="two images or more"):
        kernel_distance(one[:1], two)


def test_the_body_is_without_table_and_with_its_lungs() -> None:
    volume = np.full((5, 60, 60), -1000.0)
    row, column = np.indices((60, 60)) - 28
    volume[:, np.hypot(row, column) < 20] = 40
    volume[:, np.hypot(row, column) < 8] = -850
    volume[:, 55:57] = 100
    body = body_of(volume, -500)
    assert body[:, 28, 28].all()
    assert not body[:, 55].any()
    assert body[0].sum() == pytest.approx(math.pi * 400, rel=0.03)


# --- patients together


def test_a_patient_with_many_images_counts_once() -> None:
    values, patients = [1.0] * 99 + [3.0, math.nan], ["a"] * 99 + ["b", "b"]
    names, means = by_patient(values, patients)
    assert names == ("a", "b")
    assert means.tolist() == [1, 3]
    found = summary(values, patients)
    assert (found.mean, found.patients) == (2.0, 2)
    assert math.isnan(summary([math.nan], ["a"]).mean)


def test_paired_tests_are_scipy_s_on_the_means_of_patients() -> None:
    rng = np.random.default_rng(3)
    one, two = rng.normal(0, 1, 20), rng.normal(0.4, 1, 20)
    patients = [f"p{number:02}" for number in range(20)]
    twice = difference([*one, *one], [*two, *two], [*patients, *patients])
    assert twice.t_test == pytest.approx(stats.ttest_rel(one, two).pvalue)
    assert twice.wilcoxon == pytest.approx(stats.wilcoxon(one, two).pvalue)
    assert twice.low < twice.mean < twice.high
    same = difference(one.tolist(), one.tolist(), patients)
    assert (same.mean, same.t_test, same.wilcoxon) == (0, 1, 1)


def test_the_limits_of_agreement_are_those_of_the_paper() -> None:
    """Bland and Altman 1986, table 1: peak flow of 17 people by two meters, l/min."""
    wright = [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427]
    mini = [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451]
    found = agreement(wright, mini)
    assert found.bias == pytest.approx(-2.1, abs=0.05)
    assert (found.upper - found.lower) / (2 * 1.96) == pytest.approx(38.8, abs=0.05)
    assert found.bias_interval == pytest.approx((-22.0, 17.8), abs=0.1)
    with pytest.raises(TrainingError, match="two or more"):
        agreement([1.0], [2.0])


# --- features by Inception


def test_weights_of_inception_are_read_as_tensors_and_checked(tmp_path: object) -> None:
    path = tmp_path / "weights.pth"  # type: ignore[operator]
    network = Inception()
    assert sum(weight.numel() for weight in network.parameters()) == 21_785_568
    torch.save({**network.state_dict(), "fc.weight": torch.zeros(1008, 2048)}, path)
    image = torch.zeros(1, 3, 75, 75)
    with torch.inference_mode():
        found, expected = load_inception(path)(image), network.eval()(image)
    assert torch.equal(found, expected)
    assert found.shape == (1, 2048)
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(TrainingError, match="does not hold the weights"):
        load_inception(path)
    path.write_bytes(b"not weights")
    with pytest.raises(TrainingError, match="does not hold the weights"):
        load_inception(path)
