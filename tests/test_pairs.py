"""Two kinds of images: any format, one lattice, no leak; every recipe ends in a served package."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from dicomnode.errors import ConfigError
from dicomnode.imaging.inference import load_model, predict
from dicomnode.imaging.package import read_package
from dicomnode.imaging.volume import Volume, volume_from_datasets
from tests.factories import ct_series
from training import train
from training.config import Images, load_config
from training.errors import TrainingError
from training.images import image_of, onto, read_image, voxels_of, with_spacing
from training.pairs import draw_batch, find_images

SIZE = 40


def anatomy(seed: int, slices: int = 4) -> NDArray[np.float32]:
    """A body with organs, (slices, 40, 40), float32, HU."""
    rng = np.random.default_rng(seed)
    row, column = np.indices((SIZE, SIZE)) - SIZE / 2
    hu = np.full((slices, SIZE, SIZE), -1000.0, np.float32)
    hu[:, np.hypot(row / 15, column / 18) < 1] = 0.0
    for _ in range(4):
        place, size = rng.uniform(-9, 9, 2), rng.uniform(2, 5)
        hu[:, np.hypot(row - place[0], column - place[1]) < size] = rng.uniform(-150, 300)
    return hu + rng.normal(0, 3, hu.shape).astype(np.float32)


def as_mr(hu: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the second kind of image shows of the same body."""
    return np.where(hu > -500, 400 - 0.8 * hu, 0).astype(np.float32)


def write_nifti(path: Path, voxels: NDArray[np.float32], shift: int = 0) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing([1.5, 1.5, 3.0])
    image.SetOrigin([10.0 + 1.5 * shift, -20.0, 30.0])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients; the MR lattice begins four columns later and is smaller."""
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(6):
        hu = anatomy(number)
        write_nifti(folder / f"P{number}" / "CT.nii.gz", hu)
        write_nifti(folder / f"P{number}" / "MR.nii.gz", as_mr(hu)[:, :36, 4:38], shift=4)
    return folder


SOURCE = {
    "files": "*/MR.nii.gz",
    "modality": "MR",
    "unit": "AU",
    "intensity": {"kind": "window", "low": 0, "high": 600},
}
TARGET = {
    "files": "*/CT.nii.gz",
    "modality": "CT",
    "unit": "HU",
    "intensity": {"kind": "window", "low": -1024, "high": 600},
    "outside": -1000,
}
PUBLISH = {
    "task": "syn_ct",
    "bounds": {"modality": ["MR"]},
    "licence": "MIT",
    "intended_use": "Tests only.",
    "algorithm_family": "test",
}


def write_config(root: Path, folder: Path, **changes: Any) -> Path:
    (folder / "card.md").write_text("# {name}: {patients_tested} patients\n")
    data = {
        "kind": "images",
        "root": str(root),
        "split": str(folder / "split.yaml"),
        "source": SOURCE,
        "target": TARGET,
        "collection": "generated",
        "patient": r"(P\d+)/",
        "body_above": -500,
        **changes.pop("data", {}),
    }
    config = {
        "name": "mr-to-ct",
        "version": "0.1.0",
        "recipe": "supervised",
        "seed": 4,
        "threads": 1,
        "runs": str(folder / "runs"),
        "package": str(folder / "mr-to-ct"),
        "card": str(folder / "card.md"),
        "save_every": 10_000,
        "data": data,
        "publish": PUBLISH,
        "generator": {
            "architecture": "residual_denoiser",
            "options": {"width": 12, "blocks": 1, "gain": 1.0, "centre": 0.0},
        },
        "optimisation": {"steps": 4, "batch_size": 2, "patch": 32, "learning_rate": 0.003},
        "adversarial": {
            "discriminator": {"width": 8, "layers": 2},
            "learning_rate": 0.002,
            "constant_epochs": 10_000,
            "structure_divide": 16,
            "initial_spread": 0,
        },
        **changes,
    }
    path = folder / "pairs.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def images_of(root: Path, folder: Path, **changes: Any) -> Images:
    data = load_config(write_config(root, folder, data=changes)).data
    assert isinstance(data, Images)
    return data


# reading


def test_every_format_gives_the_same_voxels(tmp_path: Path) -> None:
    stored = np.random.default_rng(1).integers(0, 2000, (3, 20, 24)).astype(np.uint16)
    (tmp_path / "dicom").mkdir()
    for index, dataset in enumerate(ct_series(3, 20, 24, stored=stored)):
        dataset.save_as(tmp_path / "dicom" / f"{index}.dcm", enforce_file_format=True)
    hu = voxels_of(read_image(tmp_path / "dicom", "HU"))
    image = read_image(tmp_path / "dicom", "HU")
    for name in ("a.nii.gz", "a.mha", "a.nrrd"):
        sitk.WriteImage(image, str(tmp_path / name))
        assert np.array_equal(voxels_of(read_image(tmp_path / name, "HU")), hu), name
    np.save(tmp_path / "a.npy", hu)
    assert np.array_equal(voxels_of(read_image(tmp_path / "a.npy", "HU")), hu)
    Image.fromarray(stored[0]).save(tmp_path / "a.png")
    assert np.array_equal(voxels_of(read_image(tmp_path / "a.png", "AU"))[0], stored[0])


def test_dicom_keeps_its_place_and_direction(tmp_path: Path) -> None:
    volume, _ = volume_from_datasets(ct_series(4, 20, 24))
    image = image_of(volume)
    corner = image.TransformIndexToPhysicalPoint((0, 0, 3))
    assert corner == pytest.approx(tuple(volume.positions[3]))
    assert image.GetSpacing() == pytest.approx(tuple(reversed(volume.spacing_mm)))


def test_an_8_bit_image_is_refused_unless_its_grey_values_are_declared(tmp_path: Path) -> None:
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(TrainingError, match="8-bit"):
        read_image(tmp_path / "a.png", "HU")
    assert voxels_of(read_image(tmp_path / "a.png", "HU", (-1000, 500))).max() == 500
    assert voxels_of(read_image(tmp_path / "a.png", "HU", (0, 80))).min() >= 0  # a brain's window


@pytest.mark.parametrize("name", ["a.nii.gz", "a.npy", "a.png", "a.dcm", "a.txt"])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(TrainingError, match=name):
        read_image(tmp_path / name, "HU")


def test_a_lattice_that_differs_by_whole_voxels_gives_the_values_themselves(root: Path) -> None:
    grid = read_image(root / "P0" / "CT.nii.gz", "HU")
    image = read_image(root / "P0" / "MR.nii.gz", "AU")
    moved, covered = onto(image, grid, -1.0)
    assert np.array_equal(voxels_of(moved)[:, :36, 4:38], voxels_of(image))
    assert covered[:, :36, 4:38].all()
    assert covered.sum() == 4 * 36 * 34
    assert set(voxels_of(moved)[~covered]) == {-1.0}


def test_another_spacing_keeps_size_and_mean() -> None:
    image = sitk.GetImageFromArray(anatomy(3))
    image.SetSpacing([1.5, 1.5, 3.0])
    coarse = with_spacing(image, 3.0, -1000.0)
    assert coarse.GetSize() == (20, 20, 4)
    assert voxels_of(coarse).mean() == pytest.approx(voxels_of(image).mean(), abs=25)


# pairs


def test_pairs_show_the_same_place(root: Path, tmp_path: Path) -> None:
    found = find_images(images_of(root, tmp_path))
    assert len(found.sources) == len(found.targets) == 24
    for source, target in zip(found.sources, found.targets, strict=True):
        expected = as_mr(target.physical)
        assert np.abs(source.physical - expected)[target.body].max() < 1e-3
        assert (source.patient, source.number) == (target.patient, target.number)


def test_a_25d_source_has_its_neighbours_and_repeats_the_last(root: Path, tmp_path: Path) -> None:
    found = find_images(images_of(root, tmp_path, slices=3))
    first, second = found.sources[0], found.sources[1]
    assert first.network.shape[0] == 3
    assert np.array_equal(first.network[0], first.network[1])
    assert np.array_equal(second.network[0], first.network[1])


def test_a_patch_of_a_pair_shows_one_place_whatever_is_mirrored(root: Path, tmp_path: Path) -> None:
    data = images_of(root, tmp_path)
    found = find_images(data)
    rng = np.random.default_rng(2)
    batch = draw_batch(found, sorted(found.patients), data, 16, 24, rng)
    hu = (batch.target.numpy() + 1) / 2 * 1624 - 1024
    mr = (batch.source.numpy() + 1) / 2 * 600
    inside = batch.weight.numpy() > 0
    assert np.abs(mr - np.clip(as_mr(hu), 0, 600))[inside].max() < 0.01
    assert batch.source.shape == (16, 1, 24, 24)


def test_only_the_patients_asked_for_are_drawn(root: Path, tmp_path: Path) -> None:
    data = images_of(root, tmp_path)
    found = find_images(data)
    one = found.sources[0].patient
    batch = draw_batch(found, [one], data, 8, SIZE, np.random.default_rng(1))
    assert batch.source.shape == (8, 1, SIZE, SIZE)  # smaller slices are continued
    with pytest.raises(TrainingError, match="no slice"):
        draw_batch(found, ["nobody"], data, 8, 16, np.random.default_rng(1))


def test_slices_with_the_same_pixels_count_once(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    for number in range(2):
        for name in ("CT", "MR"):
            target = copy / f"P{number}" / f"{name}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((root / "P0" / f"{name}.nii.gz").read_bytes())
    found = find_images(images_of(copy, tmp_path))
    assert found.left_out == {"DUPLICATE_OF_ANOTHER": 4}
    assert "4 slices left out are those of another patient" in found.warnings[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patient": r"(nobody)"}, "names no patient"),
        ({"source": SOURCE | {"files": "*/XX.nii"}}, "no file"),
        ({"source": SOURCE | {"files": "P[0-3]/MR.nii.gz"}}, "2 patients have only one kind"),
        ({"body_above": 5000}, "no usable slice"),
    ],
)
def test_data_that_cannot_be_used_say_why(
    root: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(TrainingError, match=words):
        find_images(images_of(root, tmp_path, **changes))


def test_images_without_patients_warn_that_they_may_leak(root: Path, tmp_path: Path) -> None:
    found = find_images(
        load_config(
            write_config(root, tmp_path, recipe="cyclegan", data={"patient": "", "paired": False})
        ).data
    )
    assert "no patient ids" in found.warnings[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": "pix2pix", "data": {"paired": False}}, "needs pairs"),
        ({"recipe": "cyclegan", "data": {"slices": 3}}, "both ways"),
        ({"residual": True}, "different units"),
        ({"publish": None}, "publish: missing"),
        ({"data": {"slices": 2}}, "odd number"),
        ({"recipe": "gan_circle"}, "wgangp"),
        ({"recipe": "aps", "adversarial": {"discriminator": {"layers": 4}}}, "48 pixels or more"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    root: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = write_config(root, tmp_path, **changes)
    with pytest.raises(ConfigError, match=words):
        train.main([str(path)])


# whole runs

RECIPES: dict[str, dict[str, Any]] = {
    "supervised": {"optimisation": {"steps": 800, "charbonnier_hu": 1.0, "bias_weight": 0.0}},
    "pix2pix": {},
    "aps": {"adversarial": {"structure": "sc_map"}},
    "cyclegan": {},
    "sccyclegan": {"adversarial": {"structure": "mind"}},
    "gan_circle": {"adversarial": {"gan": "wgangp"}},
}


def served(package: Path, unit: Any, voxels: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the node makes of a volume with a package."""
    positions = np.array([[0, 0, 3.0 * index] for index in range(len(voxels))])
    orientation = np.array([1.0, 0, 0, 0, 1, 0])
    source = Volume(voxels, unit, positions, orientation, (3.0, 1.5, 1.5), "", None)
    return predict(load_model(read_package(package)), source).voxels


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_ends_in_a_package_that_the_node_serves(
    root: Path, tmp_path: Path, recipe: str
) -> None:
    two_ways = recipe in ("cyclegan", "sccyclegan", "gan_circle")
    back = PUBLISH | {"task": "syn_mr", "bounds": {"modality": ["CT"]}}
    card = str(tmp_path / "card.md")
    package = str(tmp_path / "ct-to-mr")
    backward = {"name": "ct-to-mr", "package": package, "card": card, "publish": back}
    changes = {key: dict(value) for key, value in RECIPES[recipe].items()}
    path = write_config(root, tmp_path, recipe=recipe)
    settings = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        settings[key] |= value
    if two_ways:
        settings |= {"backward": backward}
        settings["data"]["paired"] = False
    path.write_text(yaml.safe_dump(settings))
    train.main([str(path)])
    hu = anatomy(99)
    made = served(tmp_path / "mr-to-ct", "AU", as_mr(hu))
    assert made.shape == hu.shape
    assert np.isfinite(made).all()
    if recipe == "supervised":
        truth = np.concatenate([anatomy(seed, 1) for seed in range(100, 108)])
        body = truth > -500
        made = served(tmp_path / "mr-to-ct", "AU", as_mr(truth))
        error, tissue = np.abs(made - truth)[body], np.abs(truth - np.median(truth[body]))[body]
        assert error.mean() < 0.6 * tissue.mean()
    if two_ways:
        assert np.isfinite(served(tmp_path / "ct-to-mr", "HU", hu)).all()


def test_a_resumed_adversarial_run_equals_an_uninterrupted_one(root: Path, tmp_path: Path) -> None:
    path = write_config(root, tmp_path, recipe="aps")
    whole = _digest(path, [])
    other = [f"runs={tmp_path / 'other'}", f"package={tmp_path / 'other-package'}"]
    train.main([str(path), *other, "stop_at=2"])
    torch.manual_seed(77)
    assert _digest(path, other) == whole


def _digest(path: Path, overrides: list[str]) -> str:
    train.main([str(path), *overrides])
    return read_package(Path(load_config(path, overrides).package)).digest
