"""Training end to end on generated patients: data, split, resume, package; and its figures."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.errors import ConfigError
from dicomnode.imaging.inference import load_model, predict
from dicomnode.imaging.package import read_package
from dicomnode.imaging.projection import quantum_noise
from dicomnode.imaging.volume import volume_from_datasets
from tests.factories import ct_series
from training import train
from training.baselines import gaussian, non_local_means
from training.checkpoint import load_checkpoint, save_checkpoint
from training.compare import filter_at_same_noise, turned_down
from training.config import Folder, TrainConfig, load_config, window_of
from training.data import Sample, draw_batch, draw_details, load_samples
from training.doses import Details, LowDose
from training.errors import TrainingError
from training.figures import Figures, SliceFigures, denoiser, evaluate_samples
from training.lowdose import insert_low_dose, measure_noise, own_noise_again
from training.material import load_material
from training.metrics import (
    Insert,
    body_mask,
    edge_retention,
    insert_image,
    insert_recovery,
    interval,
    psnr,
    tissue_masks,
)
from training.split import split_patients

SIZE, SPACING_MM = 128, 2.4
ROOT = Path(__file__).parents[1]


@functools.cache
def slice_hu(seed: int, photons: float = 4e5) -> NDArray[np.float32]:
    """A body with fat, muscle, lung and bone, and its own noise, (128, 128), float32, HU."""
    rng = np.random.default_rng(seed)
    row, column = np.indices((SIZE, SIZE)) - (SIZE - 1) / 2
    hu = np.full((SIZE, SIZE), -1000.0, np.float32)
    hu[np.hypot(row / 50, column / 60) < 1] = -100
    hu[np.hypot(row / 44, column / 54) < 1] = 50
    hu[np.hypot(row + 5, column - 25) < 15] = -850
    hu[np.hypot(row - 20, column + 15) < 6] = 600
    for _ in range(6):
        place = rng.uniform(-30, 30, 2)
        hu[np.hypot(row - place[0], column - place[1]) < 3] += rng.uniform(-60, 60)
    hu = ndimage.gaussian_filter(hu, 0.6)
    return hu + quantum_noise(hu[None], SPACING_MM, math.inf, photons, rng, views=36)[0]


def write_series(folder: Path, patient: str, seed: int, slices: int = 2, **tags: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    voxels = np.stack([slice_hu(100 * seed + index) for index in range(slices)])
    stored = np.clip(np.rint(voxels) + 1024, 0, 4095).astype(np.uint16)
    spacing = (str(SPACING_MM), str(SPACING_MM))
    for index, dataset in enumerate(
        ct_series(
            slices, SIZE, SIZE, seed=seed, stored=stored, patient=patient, pixel_spacing=spacing
        )
    ):
        for keyword, value in tags.items():
            setattr(dataset, keyword, value)
        dataset.save_as(folder / f"{patient or 'nobody'}-{index}.dcm", enforce_file_format=True)


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six generated patients, two slices each."""
    folder = tmp_path_factory.mktemp("data") / "ct"
    for number in range(6):
        write_series(folder, f"P{number}", number + 1)
    return folder


@pytest.fixture
def config(patients: Path, tmp_path: Path) -> TrainConfig:
    """A run of a few seconds; `write_config` gives the same as a file."""
    return load_config(write_config(patients, tmp_path))


def write_config(patients: Path, tmp_path: Path, **changes: object) -> Path:
    (tmp_path / "card.md").write_text("# {name} {version}\nGain {gain_db[0]:.1f} dB.\n")
    data = {
        "name": "debug",
        "version": "0.1.0",
        "recipe": "supervised",
        "seed": 3,
        "runs": str(tmp_path / "runs"),
        "package": str(tmp_path / "package"),
        "card": str(tmp_path / "card.md"),
        "save_every": 4,
        "data": {
            "kind": "low_dose",
            "root": str(patients.parent),
            "split": str(tmp_path / "split.yaml"),
            "folders": [{"path": "ct", "collection": "generated"}],
            "validation_fraction": 0.17,
            "test_fraction": 0.34,
        },
        "low_dose": {"realisations": 2, "views": 36},
        "details": {"share": 0.5},
        "generator": {"architecture": "residual_denoiser", "options": {"width": 8, "blocks": 1}},
        "optimisation": {"steps": 8, "batch_size": 4, "patch": 32},
        **changes,
    }
    path = tmp_path / "debug.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def samples(patients: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """The slices of the six patients, with their noise."""
    folder = tmp_path_factory.mktemp("samples")
    config = load_config(write_config(patients, folder))
    return load_samples(config.data, config.low_dose, 1, folder / "cache")[0]


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    recipe = train.build_recipe(config)
    assert load_checkpoint(config.out / "checkpoint.pt", recipe, config.digest())
    return recipe.results()["forward"].state_dict()


# --- the whole run


def test_training_ends_in_a_package_that_removes_noise(patients: Path, tmp_path: Path) -> None:
    overrides = ["optimisation.steps=150", "save_every=150", "optimisation.learning_rate=0.003"]
    train.main([str(write_config(patients, tmp_path)), *overrides])
    model = load_model(read_package(tmp_path / "package"))
    clean = slice_hu(77)
    rng = np.random.default_rng(1)
    low = insert_low_dose(clean, own_noise_again(clean, SPACING_MM, 1, rng, views=60)[0], 0.25)
    stored = np.clip(np.rint(low) + 1024, 0, 4095).astype(np.uint16)
    source, _ = volume_from_datasets(ct_series(2, SIZE, SIZE, stored=np.stack([stored] * 2)))
    body, window = body_mask(clean), (-160.0, 240.0)
    result = predict(model, source).voxels[0]
    assert psnr(result, clean, body, window) > psnr(low, clean, body, window) + 1.0


def test_the_card_and_the_manifest_hold_the_same_figures(patients: Path, tmp_path: Path) -> None:
    train.main([str(write_config(patients, tmp_path))])
    package = read_package(tmp_path / "package")
    gain = package.manifest.validation["gain_db"][0]
    assert (package.path / "MODEL_CARD.md").read_text() == f"# debug 0.1.0\nGain {gain:.1f} dB.\n"
    assert package.manifest.training["patients"] == {"train": 3, "validation": 1, "test": 2}


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    patients: Path, tmp_path: Path
) -> None:
    path = write_config(patients, tmp_path)
    train.main([str(path)])
    uninterrupted = weights(load_config(path))
    elsewhere = f"runs={tmp_path / 'other'}"
    train.main([str(path), elsewhere, "stop_at=3"])
    torch.manual_seed(99)  # a new process would start elsewhere
    train.main([str(path), elsewhere])
    resumed = weights(load_config(path, [elsewhere]))
    assert uninterrupted.keys() == resumed.keys()
    for name, value in uninterrupted.items():
        assert torch.equal(resumed[name], value), name


def test_the_command_says_what_is_wrong_without_a_traceback(patients: Path, tmp_path: Path) -> None:
    path = write_config(patients, tmp_path, colour="blue")
    done = subprocess.run(
        [sys.executable, "training/train.py", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "debug.yaml: unknown keys: colour"


def test_the_evaluation_prints_the_figures_of_the_package(patients: Path, tmp_path: Path) -> None:
    path = write_config(patients, tmp_path)
    train.main([str(path)])
    done = subprocess.run(
        [sys.executable, "training/evaluate.py", str(path), "compare=yes"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    manifest = read_package(tmp_path / "package").manifest
    mean, low, high = manifest.validation["gain_db"]
    assert "2 patients, 4 slices" in done.stdout
    assert f"{mean:8.3f}  [{low:.3f}, {high:.3f}]" in done.stdout
    assert "network turned down to the PSNR of that non-local means" in done.stdout


# --- configuration


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optimisation.momentum=1", "optimisation: unknown keys: momentum"),
        ("optimisation.steps=many", r"optimisation\.steps: want int"),
        ("recipe=magic", r"recipe: 'magic' is not one of"),
        ("window=[0]", "window: want two values"),
        ("seed.deep=1", "seed has no keys below it"),
        ("steps", "want key=value"),
        ("data.root=*/CT", r"data\.root: \*/CT is no YAML; put it in quotes"),
    ],
)
def test_a_wrong_key_is_refused(patients: Path, tmp_path: Path, override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(write_config(patients, tmp_path), [override])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "training/configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_config_can_be_read(path: Path) -> None:
    config = load_config(path)
    assert (ROOT / config.card).exists()
    assert (ROOT / config.data.split).exists()


def test_what_does_not_shape_the_weights_does_not_change_the_digest(config: TrainConfig) -> None:
    moved = replace(config, runs="/elsewhere", stop_at=5, threads=1)
    assert moved.digest() == config.digest()
    assert replace(config, seed=4).digest() != config.digest()


# --- checkpoints


def test_a_truncated_checkpoint_is_an_error_and_not_a_new_start(config: TrainConfig) -> None:
    path, recipe = config.out / "checkpoint.pt", train.build_recipe(config)
    save_checkpoint(path, recipe, 5, config.digest())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TrainingError, match="damaged"):
        load_checkpoint(path, recipe, config.digest())


def test_a_checkpoint_of_other_settings_is_refused(config: TrainConfig) -> None:
    path, recipe = config.out / "checkpoint.pt", train.build_recipe(config)
    save_checkpoint(path, recipe, 5, "other")
    with pytest.raises(TrainingError, match="other settings"):
        load_checkpoint(path, recipe, config.digest())


def test_a_crash_while_saving_leaves_the_old_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, recipe = config.out / "checkpoint.pt", train.build_recipe(config)
    save_checkpoint(path, recipe, 5, config.digest())

    def power_cut(descriptor: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        save_checkpoint(path, recipe, 6, config.digest())
    assert load_checkpoint(path, recipe, config.digest()) == 5


# --- data and split


def test_the_same_pixels_in_two_folders_count_once(config: TrainConfig, tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_series(root / "ct", "P1", 1)
    shutil.copytree(root / "ct", root / "again")
    folders = (replace_path(config, "ct"), replace_path(config, "again"))
    data = replace(config.data, root=str(root), folders=folders)
    samples, left_out = load_samples(data, config.low_dose, 1, tmp_path / "cache")
    assert len(samples) == 2
    assert left_out["DUPLICATE_PIXELS"] == 2


def test_slices_of_excluded_kernels_are_left_out(config: TrainConfig, tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_series(root / "ct", "P1", 1, ConvolutionKernel="BONEPLUS")
    write_series(root / "ct", "P2", 2, ConvolutionKernel="STANDARD")
    data = replace(config.data, root=str(root), exclude={"ConvolutionKernel": ("BONE*",)})
    samples, left_out = load_samples(data, config.low_dose, 1, tmp_path / "cache")
    assert len(samples) == 2
    assert left_out["EXCLUDED_ConvolutionKernel"] == 2


def test_an_instance_without_a_patient_stops_the_run(config: TrainConfig, tmp_path: Path) -> None:
    write_series(tmp_path / "data" / "ct", "", 1)
    data = replace(config.data, root=str(tmp_path / "data"))
    with pytest.raises(TrainingError, match="no PatientID"):
        load_samples(data, config.low_dose, 1, tmp_path / "cache")


def test_an_empty_folder_is_named(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    data = replace(config.data, root=str(tmp_path), folders=(replace_path(config, "empty"),))
    with pytest.raises(TrainingError, match=r"no \.dcm files in .*empty"):
        load_samples(data, config.low_dose, 1, tmp_path / "cache")


def replace_path(config: TrainConfig, path: str) -> Folder:
    return replace(config.data.folders[0], path=path)


def test_cached_slices_equal_fresh_ones(
    config: TrainConfig, samples: list[Sample], tmp_path: Path
) -> None:
    fresh, _ = load_samples(config.data, config.low_dose, 1, tmp_path / "cache")
    np.testing.assert_array_equal(fresh[3].noise, samples[3].noise)
    cached, _ = load_samples(config.data, config.low_dose, 1, tmp_path / "cache")
    for one, other in zip(fresh, cached, strict=True):
        np.testing.assert_array_equal(one.hu, other.hu)
        np.testing.assert_array_equal(one.noise, other.noise)


PARTS = {"validation_fraction": 0.2, "test_fraction": 0.3, "seed": 1}


def test_a_split_is_written_once_and_then_kept(tmp_path: Path) -> None:
    everyone = [f"p{number}" for number in range(20)]
    first = split_patients(tmp_path / "s.yaml", everyone, ["p3"], **PARTS)
    again = split_patients(tmp_path / "s.yaml", reversed(everyone), ["p3"], **{**PARTS, "seed": 2})
    assert first == again
    assert "p3" in first["train"]
    assert sorted(patient for part in first.values() for patient in part) == sorted(everyone)


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ({"train": ["a", "b"], "validation": ["c"], "test": ["b"]}, "more than one place: b"),
        ({"train": ["a", "a"], "validation": ["b"], "test": ["c"]}, "more than one place: a"),
        ({"train": ["b"], "validation": [], "test": ["a", "c"]}, "are held out"),
        ({"train": ["a"], "validation": ["b"], "test": []}, "1 patients of the data are in no"),
        ({"train": ["a"], "test": ["b"]}, "want the keys"),
    ],
)
def test_a_split_that_would_leak_is_refused(
    tmp_path: Path, split: dict[str, list[str]], reason: str
) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(split))
    with pytest.raises(TrainingError, match=reason):
        split_patients(tmp_path / "s.yaml", ["a", "b", "c"], ["a"], **PARTS)


def test_a_batch_is_a_function_of_seed_and_step(config: TrainConfig, samples: list[Sample]) -> None:
    def batch(step: int) -> torch.Tensor:
        rng = np.random.default_rng([1, step])
        window = window_of(config)
        return draw_batch(samples, window, config.low_dose, config.details, 4, 32, rng).source

    assert torch.equal(batch(5), batch(5))
    assert not torch.equal(batch(5), batch(6))


def test_full_dose_samples_are_their_own_target(config: TrainConfig, samples: list[Sample]) -> None:
    batch = draw_batch(
        samples,
        window_of(config),
        LowDose(full_dose_share=1.0),
        Details(share=1.0),
        4,
        32,
        np.random.default_rng(0),
    )
    assert torch.equal(batch.source, batch.target)
    assert batch.weight.max() > 1


def test_details_are_small_and_of_the_declared_contrast() -> None:
    settings = Details(most=1, faintest_hu=20, strongest_hu=80)
    spots = [draw_details(settings, 64, np.random.default_rng(seed)) for seed in range(30)]
    assert max(np.abs(spot).max() for spot in spots) <= 80
    assert np.mean([(spot != 0).mean() for spot in spots]) < 0.05


# --- lower dose


def test_the_noise_of_a_slice_is_measured_in_its_uniform_tissue() -> None:
    noisy, noisier = (measure_noise(slice_hu(1, photons), SPACING_MM) for photons in (3e6, 7.5e5))
    assert noisier.deviation_hu / noisy.deviation_hu == pytest.approx(2.0, rel=0.25)


@pytest.mark.parametrize("dose", [0.5, 0.25, 0.1])
def test_a_lower_dose_measures_as_one(dose: float) -> None:
    hu = slice_hu(1, 3e6)
    extra = own_noise_again(hu, SPACING_MM, 1, np.random.default_rng(0), views=60)[0]
    low = insert_low_dose(hu, extra, dose)
    ratio = measure_noise(low, SPACING_MM).deviation_hu / measure_noise(hu, SPACING_MM).deviation_hu
    assert ratio == pytest.approx(math.sqrt(1 / dose), rel=0.15)


def test_full_dose_is_the_slice_itself() -> None:
    hu = slice_hu(1)
    np.testing.assert_array_equal(insert_low_dose(hu, np.ones_like(hu), 1.0), hu)


def test_a_slice_without_soft_tissue_cannot_be_measured() -> None:
    with pytest.raises(TrainingError, match="soft tissue"):
        measure_noise(np.full((64, 64), -1000, np.float32), 1.0)


# --- figures


def test_psnr_looks_only_into_mask_and_window() -> None:
    truth = np.zeros((32, 32), np.float32)
    result = truth + 40
    mask = np.ones_like(truth, np.bool_)
    assert psnr(result, truth, mask, (-160.0, 240.0)) == pytest.approx(20.0)
    result[0, 0], truth[1, 1] = 5000, 5000
    mask[0, 0] = mask[1, 1] = False
    assert psnr(result, truth, mask, (-160.0, 240.0)) == pytest.approx(20.0)


def test_the_body_holds_its_lung_and_not_the_table() -> None:
    hu = slice_hu(1).copy()
    hu[124:127, 20:100] = 100
    mask = body_mask(hu)
    assert mask[58, 88]
    assert not mask[125, 60]
    assert not mask[2, 2]


def test_a_shift_is_found_in_its_tissue_only() -> None:
    hu = slice_hu(1)
    tissues = tissue_masks(hu, SPACING_MM, body_mask(hu))
    shifted = hu + np.where(tissues["lung"], 7.0, 0.0)
    error = {name: float((shifted - hu)[mask].mean()) for name, mask in tissues.items()}
    assert error["lung"] == pytest.approx(7.0)
    assert error["soft tissue"] == error["bone"] == error["fat"] == 0.0


def test_noise_does_not_pass_for_edges_and_blur_costs_them() -> None:
    hu = slice_hu(1)
    body = body_mask(hu)
    noisy = hu + np.random.default_rng(0).normal(0, 20, hu.shape).astype(np.float32)
    blurred = ndimage.gaussian_filter(hu, 1.5)
    assert edge_retention(hu, hu, SPACING_MM, body) == pytest.approx(1.0)
    assert edge_retention(noisy, hu, SPACING_MM, body) == pytest.approx(1.0, abs=0.15)
    assert edge_retention(blurred, hu, SPACING_MM, body) < 0.7


def test_an_insert_is_recovered_as_far_as_it_is_let_through() -> None:
    hu = slice_hu(1)
    inserted = insert_image(hu, SPACING_MM, Insert(10.0, -30.0), np.random.default_rng(0))
    assert inserted.min() == -30
    assert insert_recovery(hu + inserted, hu, inserted) == pytest.approx(1.0, abs=1e-3)
    assert insert_recovery(hu, hu, inserted) == 0.0
    through = [
        insert_recovery(gaussian(hu + inserted, 1, [s])[0], gaussian(hu, 1, [s])[0], inserted)
        for s in (0.5, 1.0, 2.0)
    ]
    assert 1 > through[0] > through[1] > through[2] > 0


def test_non_local_means_removes_noise_and_keeps_a_strong_edge() -> None:
    truth = np.zeros((64, 64), np.float32)
    truth[:, 32:] = 300
    noisy = truth + np.random.default_rng(0).normal(0, 20, truth.shape).astype(np.float32)
    result = non_local_means(noisy, 20.0, [0.6])[0]
    assert np.std(result[10:50, 8:24]) < 8
    assert result[:, 40].mean() - result[:, 24].mean() == pytest.approx(300, abs=5)


def test_figures_are_means_over_patients_and_not_over_slices() -> None:
    def figure(patient: str, gain: float) -> SliceFigures:
        return SliceFigures(patient, 20.0, 20.0 + gain, {}, 1.0, (1.0, 1.0), 1.0)

    figures = Figures([figure("a", 1.0)] * 9 + [figure("b", 3.0)])
    assert figures.gain_db[0] == pytest.approx(2.0)
    assert math.isnan(figures.bias_hu("bone")[0])


def test_a_network_that_changes_nothing_gains_nothing_and_loses_nothing(
    config: TrainConfig, samples: list[Sample]
) -> None:
    untrained = train.build_recipe(config).results()["forward"]
    figures = evaluate_samples(denoiser(untrained, window_of(config)), samples[:3])
    assert figures.gain_db == (0.0, 0.0, 0.0)
    assert figures.noise[0] == pytest.approx(1.0)
    assert figures.insert(0)[0] == pytest.approx(1.0, abs=1e-3)


def test_a_network_turned_down_to_a_filters_psnr_has_that_psnr(
    config: TrainConfig, samples: list[Sample]
) -> None:
    held_out, dose = samples[:2], 0.1
    strong = evaluate_samples(lambda low: gaussian(low, 1, [1.0])[0], held_out, dose)
    weak = evaluate_samples(lambda low: gaussian(low, 1, [0.4])[0], held_out, dose)
    lowered = turned_down(lambda low: gaussian(low, 1, [1.0])[0], held_out, dose, weak)
    assert weak.psnr[0] < strong.psnr[0]
    assert lowered.psnr[0] == pytest.approx(weak.psnr[0], abs=0.2)


def test_a_filter_of_equal_noise_leaves_that_noise(samples: list[Sample]) -> None:
    goal = evaluate_samples(lambda low: gaussian(low, SPACING_MM, [1.2])[0], samples[:2], 0.25)
    matched = filter_at_same_noise("Gaussian", samples[:2], 0.25, goal)
    assert matched.noise[0] == pytest.approx(goal.noise[0], abs=1e-6)


def test_an_interval_holds_its_mean_and_shrinks_to_it_without_spread() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert low < mean == 2.5 < high
    assert interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_the_log_has_a_line_per_checkpoint(patients: Path, tmp_path: Path) -> None:
    path = write_config(patients, tmp_path)
    train.main([str(path)])
    lines = (load_config(path).out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8]


def test_a_two_way_gan_trains_on_lowered_doses_and_ends_in_a_package(
    patients: Path, tmp_path: Path
) -> None:
    adversarial = {
        "gan": "wgangp",
        "cycle_weight": 1.0,
        "discriminator": {"width": 8, "layers": 2},
        "pool": 2,
    }
    path = write_config(patients, tmp_path, recipe="gan_circle", adversarial=adversarial, threads=1)
    train.main([str(path), "optimisation.steps=2"])
    model = load_model(read_package(tmp_path / "package"))
    assert model.package.manifest.training["recipe"] == "gan_circle"
    assert model.package.manifest.output.residual
    batch = load_material(load_config(path)).batch(0)
    apart = (batch.source - batch.target).abs().mean()  # low dose of one place, full of another
    paired = load_material(load_config(path, ["recipe=supervised"])).batch(0)
    assert apart > 3 * (paired.source - paired.target).abs().mean()


def test_lowered_doses_give_no_second_package(config: TrainConfig, tmp_path: Path) -> None:
    backward = {"name": "x", "package": "x", "card": "x", "publish": {}}
    with pytest.raises(ConfigError, match="backward"):
        load_config(tmp_path / "debug.yaml", [f"backward={yaml.safe_dump(backward)}"])
