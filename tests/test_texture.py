"""Noise that looks like noise: its loss, its mixtures, weights to begin with, and the proof."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from dicomnode.errors import ConfigError, PackageError
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.manifest import GeneratorSpec
from dicomnode.imaging.networks import build_generator
from dicomnode.imaging.package import read_package
from tests.test_training import config, patients, slice_hu, write_config  # noqa: F401
from training import prove, train
from training.config import Folder, TrainConfig, load_config, window_of
from training.data import Sample, draw_batch
from training.doses import Details, LowDose
from training.errors import TrainingError
from training.losses import texture
from training.proofs.denoising import Held, figures, lines, scanned_pair
from training.recipes.build import begin_with, build_recipe
from training.strength import at_strength, spec_at


def noise(seed: int, deviation: float = 10.0, smooth: float = 1.0) -> torch.Tensor:
    """(1, 1, 128, 128), float32, HU: correlated noise of that standard deviation."""
    plain = np.random.default_rng(seed).normal(size=(1, 1, 128, 128))
    correlated = ndimage.gaussian_filter(plain, (0, 0, smooth, smooth))
    return torch.from_numpy((deviation * correlated / correlated.std()).astype(np.float32))


def test_noise_elsewhere_of_the_same_kind_has_the_same_texture() -> None:
    same, less = float(texture(noise(1), noise(2))), float(texture(0.5 * noise(1), noise(2)))
    assert same < 0.6 * less
    assert float(texture(2.0 * noise(1), noise(2))) > 2 * same


def test_noise_as_strong_but_coarser_has_another_texture() -> None:
    same, coarser = (float(texture(noise(1, smooth=s), noise(2))) for s in (1.0, 3.0))
    assert coarser > 1.5 * same


def test_texture_does_not_see_an_offset_and_has_a_gradient_where_images_are_equal() -> None:
    image = noise(3).requires_grad_()
    assert float(texture(image.detach() + 100.0, noise(3))) < 1e-2
    texture(image, torch.zeros(1, 1, 128, 128)).backward()
    assert torch.isfinite(torch.as_tensor(image.grad)).all()
    flat = torch.zeros(1, 1, 128, 128, requires_grad=True)
    texture(flat, flat.detach()).backward()
    assert torch.isfinite(torch.as_tensor(flat.grad)).all()


def test_mixed_noise_is_as_strong_as_one_realisation(
    config: TrainConfig,  # noqa: F811
) -> None:
    realisations = np.concatenate([noise(seed).numpy()[0] for seed in range(4)])
    samples = [Sample("p", "d", Folder("ct", "generated"), 2.4, slice_hu(3), realisations)]

    def added(mixed: bool) -> np.ndarray:
        dose = LowDose(lowest=0.5, highest=0.5, full_dose_share=0.0, mixed=mixed)
        drawn = [
            draw_batch(
                samples, window_of(config), dose, Details(), 8, 64, np.random.default_rng(seed)
            )
            for seed in range(6)
        ]
        return np.concatenate([(batch.source - batch.target).numpy().ravel() for batch in drawn])

    assert added(mixed=True).std() == pytest.approx(added(mixed=False).std(), rel=0.1)


def test_keys_that_came_later_and_are_not_used_leave_the_digest(
    config: TrainConfig,  # noqa: F811
) -> None:
    known = config.digest()
    assert replace(config, start="").digest() == known
    assert replace(config, start="models/ldct-denoise").digest() != known
    assert replace(config, low_dose=replace(config.low_dose, mixed=True)).digest() != known
    weighted = replace(config.optimisation, texture_weight=0.1)
    assert replace(config, optimisation=weighted).digest() != known


def test_a_run_begins_with_the_weights_of_a_package_and_its_side_path_changes_nothing_yet() -> None:
    package = read_package(Path("models/ldct-denoise"))
    options = dict(package.manifest.generator.options)
    plain = build_generator("residual_denoiser", options)
    wider = build_generator("residual_denoiser", options | {"coarse": 2})
    begin_with(plain, package)
    begin_with(wider, package)
    x = torch.from_numpy(np.random.default_rng(0).normal(-0.5, 0.02, (1, 1, 64, 64))).float()
    with torch.no_grad():
        torch.testing.assert_close(wider(x), plain(x), rtol=0, atol=0)
        assert (plain(x) - x).abs().max() > 0


def test_weights_to_begin_with_that_do_not_fit_are_refused(config: TrainConfig) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"start: ldct-denoise has .* weights that"):
        build_recipe(replace(config, start="models/ldct-denoise"))
    with pytest.raises(PackageError):
        build_recipe(replace(config, start="models/nothing"))


def at(result: float) -> dict[str, float]:
    """Figures of a slice in which so much of added noise of 80 HU is left."""
    truth = slice_hu(3).astype(np.float32)
    low = (truth + noise(5, 80.0).numpy()[0, 0]).astype(np.float32)
    made = ((1 - result) * truth + result * low).astype(np.float32)
    return figures(made, Held("p", truth, low, 2.4))


def test_the_proof_tells_smoother_and_noisier_results_from_the_full_dose() -> None:
    kept, all_of_it = at(0.001), at(1.0)
    assert kept["noise power over full dose"] == pytest.approx(1.0, abs=0.01)
    assert kept["noise power distance"] < 0.01
    assert all_of_it["noise power over full dose"] > 1.5
    assert all_of_it["... at middle frequencies"] > 1.5
    assert all_of_it["PSNR, dB"] < at(0.5)["PSNR, dB"]
    assert all_of_it["SSIM"] < at(0.5)["SSIM"] < 1
    assert kept["bias in soft tissue, HU"] == pytest.approx(0.0, abs=0.01)


def test_the_proof_says_what_the_second_method_has_more_than_the_first() -> None:
    truth = slice_hu(3).astype(np.float32)
    held = [
        Held(str(seed), truth, truth + noise(seed, 20.0).numpy()[0, 0], 2.4) for seed in (1, 2, 3)
    ]
    halves = {
        "none": lambda low: low,
        "half": lambda low: (low + truth) / 2,
    }
    rows = {line.split(" | ")[0].strip("| "): line for line in lines(held, halves)}
    assert "second minus first" in rows["figure"]
    assert "+6.0" in rows["PSNR, dB"]  # half the error: 20 log10(2)
    assert rows["noise power over full dose"].split(" | ")[-1].startswith("-")


def test_a_scanned_pair_is_read_in_hounsfield_units(tmp_path: Path) -> None:
    np.save(tmp_path / "L0_1_target.npy", np.full((8, 8), 0.25))
    with pytest.raises(TrainingError, match="does not hold one"):
        scanned_pair(tmp_path)
    np.save(tmp_path / "L0_1_input.npy", np.full((8, 8), 0.5))
    (pair,) = scanned_pair(tmp_path)
    assert (pair.truth == 0.0).all()
    assert (pair.low == 1024.0).all()
    np.save(tmp_path / "L0_1_input.npy", np.zeros((8, 7)))
    with pytest.raises(TrainingError, match="no two slices"):
        scanned_pair(tmp_path)


def test_a_denoiser_is_trained_for_texture_and_proven_beside_another(
    patients: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(patients, tmp_path)
    weighted = ["optimisation.texture_weight=0.1", "low_dose.mixed=true", "name=second"]
    first, second = [f"package={tmp_path / 'first'}"], [f"package={tmp_path / 'second'}"]
    train.main([str(path), *first])
    train.main([str(path), *second, *weighted, f"start={tmp_path / 'first'}"])
    assert "texture_hu" in capsys.readouterr().out
    prove.main([str(path), *second, *weighted, f"against={tmp_path / 'first'}"])
    printed = capsys.readouterr().out
    assert "0.25 of the dose" in printed
    assert "| figure | input | debug 0.1.0 | second 0.1.0 | second minus first" in printed


def test_a_denoiser_turned_down_gives_that_share_of_its_difference() -> None:
    spec = GeneratorSpec("residual_denoiser", {"width": 8, "blocks": 1})
    whole = build_generator(spec.architecture, spec.options)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    x = torch.from_numpy(np.random.default_rng(0).normal(-0.5, 0.02, (1, 1, 32, 32))).float()
    with torch.no_grad():
        full, part = whole(x), at_strength(spec, whole, 0.75)(x)
        assert torch.equal(at_strength(spec, whole, 1.0)(x), full)
    assert full.abs().max() > 0
    torch.testing.assert_close(part, 0.75 * full)
    assert spec_at(spec_at(spec, 0.75), 1.0) == spec


@pytest.mark.parametrize("strength", [0.0, 1.1, -0.5])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(PackageError, match="strength"):
        build_generator("residual_denoiser", {"width": 8, "blocks": 1, "strength": strength})


def test_a_strength_where_there_is_none_stops_the_run(patients: Path, tmp_path: Path) -> None:  # noqa: F811
    path = write_config(patients, tmp_path)
    for wrong in (["strength=0"], ["strength=0.5", "generator={architecture: red_cnn}"]):
        with pytest.raises(ConfigError, match="strength"):
            load_config(path, wrong)


def test_a_package_is_turned_down_without_training_anew(
    patients: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(patients, tmp_path)
    train.main([str(path)])
    again = [f"package={tmp_path / 'half'}", "strength=0.5"]
    train.main([str(path), *again])
    whole, half = (load_model(read_package(tmp_path / name)) for name in ("package", "half"))
    assert half.package.manifest.generator.options["strength"] == 0.5
    assert "strength" not in whole.package.manifest.generator.options
    ours, theirs = half.generator.state_dict(), whole.generator.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    capsys.readouterr()
    prove.main([str(path), "strengths=0.5", f"against={tmp_path / 'half'}"])
    printed = capsys.readouterr().out
    assert "| figure | input | debug 0.1.0 | strength 0.5 |" in printed
    psnr = next(line for line in printed.splitlines() if line.startswith("| PSNR")).split(" | ")
    assert psnr[2] == psnr[3]
    with pytest.raises(ConfigError, match="strengths"):
        prove.main([str(path), "strengths=all"])
