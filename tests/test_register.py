"""Registration: known motion is recovered, what went wrong is dropped, what is done stays done."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from dicomnode.errors import ConfigError
from tests.factories import ct_series, phantom_hu
from training import register
from training.alignment import body_of, dice, folded_share, normalised_mutual_information
from training.errors import TrainingError
from training.images import read_image, voxels_of
from training.registration import (
    Deformable,
    Quality,
    Rigid,
)
from training.registration import register as register_images

SHAPE = (20, 40, 48)
RIGID = Rigid((4, 2), (200, 100))


def body(seed: int = 1) -> NDArray[np.float32]:
    """A body with organs and texture, (slices, rows, columns), float32, HU."""
    shape = SHAPE
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = (x / 0.7) ** 2 + (y / 0.6) ** 2 < 1
    hu = np.where(inside, 20.0, -1000.0)
    for _ in range(12):
        place, size = rng.uniform(-0.5, 0.5, 3), rng.uniform(0.1, 0.3, 3)
        axes = zip((z, y, x), place, size, strict=True)
        organ = sum(((axis - at) / half) ** 2 for axis, at, half in axes) < 1
        hu = np.where(organ & inside, rng.uniform(-300, 700), hu)
    texture = ndimage.gaussian_filter(rng.normal(0, 1, shape), 1.5)
    hu = np.where(inside, hu + 100 * texture / texture.std(), hu)
    return ndimage.gaussian_filter(hu, 0.7).astype(np.float32)


def as_mr(hu: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same body as another kind of image shows it."""
    return np.where(hu > -600, 900 - 0.8 * np.minimum(hu, 400), 5).astype(np.float32)


def image_of(voxels: NDArray[np.float32]) -> Any:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing([3.0, 3.0, 4.0])
    image.SetOrigin([-80.0, -70.0, 10.0])
    return image


def turned() -> Any:
    """What the patient did between the two scans: millimetres and a few degrees."""
    motion = sitk.Euler3DTransform()
    motion.SetCenter((0.0, 0.0, 60.0))
    motion.SetRotation(0.04, -0.05, 0.10)
    motion.SetTranslation((9.0, -7.0, 5.0))
    return motion


def bent(grid: Any) -> Any:
    """A smooth deformation of some millimetres."""
    spline = sitk.BSplineTransformInitializer(grid, [2, 2, 1])
    count = len(spline.GetParameters())
    spline.SetParameters(np.random.default_rng(3).normal(0, 9, count).tolist())
    return spline


def moved_by(image: Any, motion: Any) -> Any:
    """The image whose point `motion(x)` shows what `image` shows at x."""
    displacement = sitk.TransformToDisplacementField(
        motion,
        sitk.sitkVectorFloat64,
        image.GetSize(),
        image.GetOrigin(),
        image.GetSpacing(),
        image.GetDirection(),
    )
    back = sitk.DisplacementFieldTransform(sitk.InvertDisplacementField(displacement, 50, 1e-3))
    return sitk.Resample(image, image, back, sitk.sitkLinear, 0.0)


def distances(image: Any, one: Any, other: Any) -> NDArray[np.float64]:
    """How far two transforms bring the points of the body apart, mm."""
    places = np.argwhere(body_of(image, "HU"))[::53]
    points = [image.TransformIndexToPhysicalPoint([int(i) for i in p[::-1]]) for p in places]
    return np.array([math.dist(one.TransformPoint(p), other.TransformPoint(p)) for p in points])


def identity() -> Any:
    return sitk.Transform(3, sitk.sitkIdentity)


# the method


def test_a_known_rigid_motion_is_recovered_across_kinds_of_images() -> None:
    fixed, motion = image_of(body()), turned()
    moving = moved_by(image_of(as_mr(body())), motion)
    result = register_images(fixed, moving, ("HU", "AU"), 0.0, RIGID, None)
    assert distances(fixed, identity(), motion).mean() > 10
    assert distances(fixed, result.transform, motion).max() < 1.0
    assert result.quality.nmi_after > result.quality.nmi_before + 0.1
    assert result.quality.dice_after > 0.95


def test_a_known_deformation_is_recovered_by_b_splines_and_not_by_turning() -> None:
    fixed = image_of(body())
    motion = bent(fixed)
    moving = moved_by(image_of(as_mr(body())), motion)
    splines = Deformable(60.0, (2, 1), (10, 6))
    rigid = register_images(fixed, moving, ("HU", "AU"), 0.0, RIGID, None)
    result = register_images(fixed, moving, ("HU", "AU"), 0.0, RIGID, splines)
    before = distances(fixed, rigid.transform, motion).mean()
    after = distances(fixed, result.transform, motion).mean()
    assert before > 2.5
    assert after < 0.6 * before
    assert result.quality.nmi_after > rigid.quality.nmi_after
    assert result.quality.folded == 0
    assert result.stages[-1].startswith("B-spline level 2")


def test_a_pair_that_lies_well_is_left_where_it_is() -> None:
    fixed, moving = image_of(body()), image_of(as_mr(body()))
    splines = Deformable(60.0, (2,), (6,))
    result = register_images(fixed, moving, ("HU", "AU"), 0.0, RIGID, splines)
    assert distances(fixed, result.transform, identity()).mean() < 0.5
    assert result.quality.nmi_after >= result.quality.nmi_before


def test_another_frame_of_reference_is_no_obstacle() -> None:
    fixed, moving = image_of(body()), image_of(body())
    moving.SetOrigin([700.0, 900.0, -2000.0])
    result = register_images(fixed, moving, ("HU", "HU"), -1000.0, RIGID, None)
    assert np.abs(voxels_of(result.moved) - body()).mean() < 5
    assert result.moved.GetOrigin() == fixed.GetOrigin()


def test_two_single_slices_are_registered_in_their_plane() -> None:
    plane = body()[10]
    fixed, moving = image_of(plane[None]), image_of(ndimage.shift(plane, (3, -4), cval=-1000)[None])
    moving.SetOrigin([-80.0, -70.0, 400.0])
    result = register_images(fixed, moving, ("HU", "HU"), -1000.0, RIGID, None)
    assert np.abs(voxels_of(result.moved)[0] - plane)[10:-10, 10:-10].mean() < 25
    assert np.abs(voxels_of(moving)[0] - plane)[10:-10, 10:-10].mean() > 80


def test_a_slice_cannot_be_registered_to_a_volume() -> None:
    with pytest.raises(TrainingError, match="too few slices"):
        register_images(image_of(body()), image_of(body()[:1]), ("HU", "HU"), -1000.0, RIGID, None)


def test_mutual_information_is_2_for_oneself_and_1_for_strangers() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1, 200_000).astype(np.float32)
    other = rng.normal(0, 1, 200_000).astype(np.float32)
    assert normalised_mutual_information(values, values) == pytest.approx(2.0)
    assert normalised_mutual_information(values, -3 * values + 5) == pytest.approx(2.0, abs=0.1)
    assert normalised_mutual_information(values, other) == pytest.approx(1.0, abs=0.01)


def test_dice_of_halves_and_of_nothing() -> None:
    left, all_ = np.array([True, False]), np.array([True, True])
    assert dice(left, all_) == pytest.approx(2 / 3)
    assert dice(left, ~left) == 0
    assert dice(np.zeros(2, np.bool_), np.zeros(2, np.bool_)) == 1


def test_space_turned_inside_out_is_counted() -> None:
    grid = image_of(body())
    mirror = sitk.AffineTransform(3)
    mirror.SetMatrix([-1.0, 0, 0, 0, 1, 0, 0, 0, 1])
    whole = np.ones(SHAPE, np.bool_)
    assert folded_share(mirror, grid, whole) > 0.8  # at the border differences are one-sided
    assert folded_share(turned(), grid, whole) == 0


# the command


def write(folder: Path, voxels: NDArray[np.float32], name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image_of(voxels), str(folder / name))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patients: one moved, one whose second file is damaged, one with noise for a partner."""
    root = tmp_path_factory.mktemp("unregistered")
    for name in ("P1", "P2", "P3"):
        write(root / name, body(), "CT.nii.gz")
    sitk.WriteImage(moved_by(image_of(as_mr(body())), turned()), str(root / "P1" / "MR.nii.gz"))
    (root / "P2" / "MR.nii.gz").write_bytes(b"no image")
    rng = np.random.default_rng(5)
    noise = np.zeros(SHAPE, np.float32)
    noise[:, 16:24, 34:42] = rng.normal(500, 50, (20, 8, 8))
    write(root / "P3", noise, "MR.nii.gz")
    return root


def config_file(data: Path, out: Path, **changes: Any) -> Path:
    settings = {
        "root": str(data),
        "out": str(out / "pairs"),
        "patient": r"(P\d)/",
        "fixed": {"files": "*/CT.nii.gz", "unit": "HU"},
        "moving": {"files": "*/MR.nii.gz", "unit": "AU"},
        "rigid": {"shrink": [4], "iterations": [100]},
        "deformable": None,
        "limits": {"least_dice": 0.9},
        **changes,
    }
    path = out / "register.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "quality.json").read_text())
    return found


def test_the_command_keeps_what_went_well_and_says_why_it_dropped_the_rest(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(data, tmp_path)
    register.main([str(path)])
    printed = capsys.readouterr().out
    folders = sorted((tmp_path / "pairs").iterdir())
    by_reason = {told(folder)["reason"]: folder for folder in folders}
    assert sorted(by_reason) == ["BODIES_DIFFER", "KEPT", "UNUSABLE"]
    assert "kept 1 of 3" in printed
    assert "Dice of the bodies" in printed
    assert "P2" not in printed
    kept = by_reason["KEPT"]
    moved, ours = (voxels_of(read_image(kept / f"{n}.nii.gz", "AU")) for n in ("moving", "fixed"))
    inside = ndimage.binary_erosion(ours > -600, iterations=4)
    assert np.abs(moved - as_mr(ours))[inside].mean() < 40
    assert sitk.ReadTransform(str(kept / "transform.h5")).GetDimension() == 3
    for reason in ("KEPT", "BODIES_DIFFER"):
        with Image.open(by_reason[reason] / "before-after.png") as shown:
            assert shown.size == (640, 640)
    assert not list(by_reason["BODIES_DIFFER"].glob("*.nii.gz"))


def test_a_finished_pair_is_not_done_again_and_a_cut_off_one_is(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"files": "P1/CT.nii.gz", "unit": "HU"}, {"files": "P1/MR.nii.gz", "unit": "AU"}
    path = config_file(data, tmp_path, fixed=one[0], moving=one[1])
    register.main([str(path)])
    (folder,) = (tmp_path / "pairs").iterdir()
    written = (folder / "moving.nii.gz").stat().st_mtime_ns
    register.main([str(path)])
    assert "done before" in capsys.readouterr().out
    assert (folder / "moving.nii.gz").stat().st_mtime_ns == written
    (folder / "quality.json").write_text('{"kept": tr')  # cut off in the middle
    register.main([str(path)])
    assert (folder / "moving.nii.gz").stat().st_mtime_ns != written
    register.main([str(path), "limits={most_folded: 0.1}"])
    assert "done before" not in capsys.readouterr().out.splitlines()[-2]


def test_dicom_and_nifti_can_be_paired(tmp_path: Path) -> None:
    rows = phantom_hu(6, 40, 48)
    (tmp_path / "P1" / "CT").mkdir(parents=True)
    for number, dataset in enumerate(ct_series(6, 40, 48, pixel_spacing=("3", "3"), step_mm=4.0)):
        dataset.save_as(tmp_path / "P1" / "CT" / f"{number}.dcm", enforce_file_format=True)
    write(tmp_path / "P1", as_mr(rows.astype(np.float32)), "MR.nii.gz")
    fixed = {"files": "*/CT", "unit": "HU"}
    register.main([str(config_file(tmp_path, tmp_path, fixed=fixed))])
    (folder,) = (tmp_path / "pairs").iterdir()
    assert told(folder)["kept"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moving": {"files": "*/XX.nii", "unit": "AU"}}, "no file"),
        ({"moving": {"files": "P1/MR.nii.gz", "unit": "AU"}}, "2 patients have only one kind"),
        ({"patient": "(nobody)"}, "names no patient"),
        ({"rigid": {"shrink": [4], "iterations": [1, 2]}}, "as many iterations"),
        ({"colour": "red"}, "unknown keys: colour"),
        ({"fixed": {"files": "*/CT.nii.gz", "unit": "mm"}}, "not one of: HU"),
    ],
)
def test_settings_that_cannot_be_used_say_why(
    data: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises((TrainingError, ConfigError), match=words):
        register.main([str(config_file(data, tmp_path, **changes))])


@pytest.mark.parametrize(
    ("quality", "reason"),
    [
        (Quality(1.1, 1.2, 0.9, 0.95, 0.0, 1.0), "KEPT"),
        (Quality(1.1, 1.2, 0.9, 0.7, 0.0, 1.0), "BODIES_DIFFER"),
        (Quality(1.1, 1.2, 0.9, 0.95, 0.01, 1.0), "FOLDED"),
        (Quality(1.1, 1.0, 0.9, 0.95, 0.0, 1.0), "NO_GAIN"),
        (Quality(1.1, 1.2, 0.9, 0.95, 0.0, 0.1), "LITTLE_OVERLAP"),
        (Quality(1.1, float("nan"), 0.9, 0.95, 0.0, 1.0), "NO_GAIN"),
    ],
)
def test_a_pair_is_dropped_for_the_limit_it_breaks(quality: Quality, reason: str) -> None:
    assert register.judge(quality, register.Limits())[0] == reason


def test_the_shipped_settings_can_be_read() -> None:
    folder = Path(register.__file__).parent / "preparation"
    assert [register.read_config(path).patient for path in folder.glob("register-*.yaml")]
