"""Pairs of limbs: bones are found, what the two do not agree on is marked, errors are weighed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from numpy.typing import NDArray

from dicomnode.errors import DicomNodeError
from dicomnode.imaging.phantoms import thigh_ct, thigh_mr
from tests.factories import write_series
from training import leave_out, limbs, prepare_limbs
from training.augment import Emphasis
from training.config import Images, load_config
from training.errors import TrainingError
from training.images import read_image, voxels_of
from training.pairs import draw_batch, find_images, patient_of
from training.proofs import mr_ct
from training.proofs.case import Case
from training.split import read_split


@pytest.fixture(scope="module")
def thigh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """CT and MR of the phantom, 6 slices of 96 x 96, SimpleITK images, one upon the other."""
    found = []
    for name, series, unit in (("ct", thigh_ct(), "HU"), ("mr", thigh_mr(), "AU")):
        folder = tmp_path_factory.mktemp(name)
        write_series(series, folder)
        found.append(sitk.Shrink(read_image(folder, unit)[:, :, :6], [2, 2, 1]))
    return found[0], found[1]


def shifted(image: Any, rows: int, columns: int) -> Any:
    """What is in the image lies so many pixels further down and right."""
    moved = np.roll(voxels_of(image), (rows, columns), (1, 2))
    result = sitk.GetImageFromArray(moved)
    result.CopyInformation(image)
    return result


def bone_of(hu: NDArray[np.float32]) -> NDArray[np.bool_]:
    return hu > 600


def overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    return float((first & second).sum() / (first | second).sum())


def test_a_bone_that_lay_beside_itself_is_laid_on_itself(thigh: tuple[Any, Any]) -> None:
    ct, mr = thigh
    true = bone_of(voxels_of(ct))
    moved = shifted(ct, 6, -4)
    assert overlap(bone_of(voxels_of(moved)), true) < 0.3
    aligned = limbs.align(moved, mr)
    assert overlap(bone_of(aligned.hu), true) > 0.8
    assert aligned.moved.startswith("rigid")
    assert aligned.dark_before < 0.6 < 0.9 < aligned.dark_after
    assert aligned.alike > prepare_limbs.LEAST_ALIKE


def test_bones_that_are_no_bones_in_the_mr_are_left_out(
    thigh: tuple[Any, Any], tmp_path: Path
) -> None:
    ct, mr = thigh
    noise = sitk.GetImageFromArray(
        np.random.default_rng(1).normal(300, 60, voxels_of(mr).shape).astype(np.float32)
    )
    noise.CopyInformation(mr)
    for name, image in (("ct", ct), ("mr", noise)):
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    words = prepare_limbs.prepare(tmp_path / "out", tmp_path / "mr.nii.gz", tmp_path / "ct.nii.gz")
    assert words.startswith("left out")
    assert not (tmp_path / "out").exists()


def test_a_limb_without_bone_is_not_aligned(thigh: tuple[Any, Any]) -> None:
    ct, mr = thigh
    with pytest.raises(TrainingError, match="no bone"):
        limbs.align(sitk.Clamp(ct, sitk.sitkFloat32, -1000.0, 100.0), mr)


def test_where_the_two_disagree_on_the_body_nothing_is_learned(
    thigh: tuple[Any, Any], tmp_path: Path
) -> None:
    ct, mr = thigh
    signal = voxels_of(mr).copy()
    signal[:, :30] = 0  # the MR shows less
    less = sitk.GetImageFromArray(signal)
    less.CopyInformation(mr)
    prepare_limbs.write(tmp_path, less, limbs.align(ct, less))
    whole, sure = (
        voxels_of(sitk.ReadImage(str(tmp_path / f"{n}.nii.gz"))) for n in ("ct", "ct-sure")
    )
    assert (sure[:, :27] == prepare_limbs.UNSURE_HU).all()
    assert (whole[:, :27] > -1100).all()
    known = sure > prepare_limbs.UNSURE_HU
    assert known[:, 36:].mean() > 0.9
    inside = sure > -300
    assert np.array_equal(sure[inside], whole[inside])
    marked = voxels_of(sitk.ReadImage(str(tmp_path / "mr-sure.nii.gz")))
    assert np.array_equal(marked == prepare_limbs.UNSURE_AU, ~known)


def test_a_table_is_no_limb() -> None:
    hu = np.full((2, 80, 80), -1000, np.float32)
    hu[:, 20:60, 20:60] = 40
    hu[:, 70:73] = 300
    body = limbs.body_of_ct(hu)
    assert body[:, 25:55, 25:55].all()
    assert not body[:, 65:].any()


def test_a_batch_weighs_bone_more_and_what_is_not_sure_not_at_all(tmp_path: Path) -> None:
    limbs_below(tmp_path / "pairs", 3)
    config = load_config(
        settings_of(tmp_path),
        [
            "data.rotate_degrees=0",
            "data.vary=null",
            "data.mirror=false",
            "data.body_above=-950",
            "data.emphasis.weight=2",
        ],
    )
    assert isinstance(config.data, Images)
    found = find_images(config.data)
    rng = np.random.default_rng(1)
    batch = draw_batch(found, sorted(found.patients), config.data, 8, 40, rng)
    hu = config.data.target.intensity.from_network(batch.target.numpy())  # type: ignore[union-attr]
    assert set(np.unique(batch.weight)) == {0, 1, 2}
    assert (batch.weight.numpy()[hu > 700] == 2).all()
    assert (batch.weight.numpy()[(hu > -110) & (hu < 60)] == 1).all()
    assert (batch.weight.numpy()[hu < -960] == 0).all()


def test_what_is_rare_counts_more_and_air_less() -> None:
    rule = Emphasis(above=150, weight=3, below=-900, least_weight=0.25)
    weights = rule.weight_of(np.array([-1000, -900, 0, 150, 151], np.float32))
    assert weights.tolist() == [0.25, 1, 1, 1, 3]
    assert weights.dtype == np.float32


def with_marks(tmp_path: Path, **changes: Any) -> Path:
    """Settings and their pairs, whose bone is marked 2, muscle 1, in a label image beside."""
    limbs_below(tmp_path / "pairs", 2)
    for truth in sorted((tmp_path / "pairs").glob("*/ct-sure.nii.gz")):
        hu = sitk.GetArrayFromImage(sitk.ReadImage(str(truth)))
        labels = np.select([hu > 400, np.abs(hu - 50) < 60], [2, 1]).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(truth.with_name("labels.nii.gz")))
    path = settings_of(tmp_path)
    settings = yaml.safe_load(path.read_text())
    del settings["data"]["emphasis"]
    settings["data"]["marked"] = {"file": "labels.nii.gz", "labels": [2], "weight": 8, **changes}
    path.write_text(yaml.safe_dump(settings))
    return path


def test_errors_count_more_where_a_label_image_marks_the_target(tmp_path: Path) -> None:
    config = load_config(with_marks(tmp_path), ["data.rotate_degrees=0", "data.vary=null"])
    assert isinstance(config.data, Images)
    found = find_images(config.data)
    batch = draw_batch(found, sorted(found.patients), config.data, 8, 40, np.random.default_rng(1))
    hu = config.data.target.intensity.from_network(batch.target.numpy())  # type: ignore[union-attr]
    weight = batch.weight.numpy()
    assert set(np.unique(weight)) <= {0, 1, 8}
    assert (weight[hu > 700] == 8).all()
    assert (hu > 700).any()
    assert (weight[(hu > -110) & (hu < 60)] == 1).all()


def test_marks_turn_with_their_patch(tmp_path: Path) -> None:
    config = load_config(with_marks(tmp_path), ["data.rotate_degrees=180"])
    assert isinstance(config.data, Images)
    found = find_images(config.data)
    batch = draw_batch(found, sorted(found.patients), config.data, 8, 40, np.random.default_rng(1))
    hu = config.data.target.intensity.from_network(batch.target.numpy())  # type: ignore[union-attr]
    weight = batch.weight.numpy()
    assert weight[hu > 750].min() > 6
    assert weight[(hu > -110) & (hu < 60)].mean() < 1.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"file": "none.nii.gz"}, "is missing or cannot be read"),
        ({"file": "../labels.nii.gz"}, "without folders"),
        ({"labels": []}, "one label or more"),
        ({"weight": 0}, "weight above 0"),
    ],
)
def test_marks_that_cannot_be_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(DicomNodeError, match=rf"data\.marked: .*{said}"):
        find_images(load_config(with_marks(tmp_path, **changes)).data)  # type: ignore[arg-type]


def test_marks_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = with_marks(tmp_path)
    small = sitk.GetImageFromArray(np.zeros((1, 48, 48), np.uint8))
    for labels in (tmp_path / "pairs").glob("*/labels.nii.gz"):
        sitk.WriteImage(small, str(labels))
    with pytest.raises(TrainingError, match="its target has"):
        find_images(load_config(path).data)  # type: ignore[arg-type]


def test_marks_need_a_truth_and_its_lattice(tmp_path: Path) -> None:
    path = with_marks(tmp_path)
    with pytest.raises(DicomNodeError, match="no truth"):
        load_config(path, ["recipe=cyclegan", "data.slices=1"])
    with pytest.raises(DicomNodeError, match="not resampled"):
        load_config(path, ["data.spacing_mm=1.0"])


def limbs_below(root: Path, count: int) -> None:
    """Pairs of squares of fat, muscle and bone, as prepare_limbs.py leaves them."""
    for number in range(count):
        rng = np.random.default_rng(number)
        hu = np.full((4, 48, 48), -1000, np.float32)
        hu[:, 6:42, 6:42] = -100
        hu[:, 30:40] = np.where(hu[:, 30:40] == -100, 50, -1000)
        hu[:, 10:26, 16 + number : 32] = 800
        signal = np.select([hu == -100, hu == 50], [950, 330], 40).astype(np.float32)
        folder = root / f"{number:016x}"
        folder.mkdir(parents=True)
        for name, values in (("mr", signal), ("ct-sure", hu)):
            noisy = values + rng.normal(0, 2, hu.shape).astype(np.float32)
            sitk.WriteImage(sitk.GetImageFromArray(noisy), str(folder / f"{name}.nii.gz"))


def settings_of(tmp_path: Path) -> Path:
    """training/configs/mr-to-ct.yaml, made small."""
    settings = yaml.safe_load(Path("training/configs/mr-to-ct.yaml").read_text())
    settings["runs"] = str(tmp_path / "runs")
    settings["data"] |= {"root": str(tmp_path / "pairs"), "slices": 1}
    settings["generator"]["options"] = {"blocks": 1, "width": 8, "shuffle": 4}
    settings["optimisation"] |= {"steps": 2, "batch_size": 2, "patch": 32}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_every_patient_is_left_out_once_and_never_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limbs_below(tmp_path / "pairs", 3)
    leave_out.main([str(settings_of(tmp_path))])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line[2:6].strip(" |") for line in said[2:]] == ["1", "2", "3", "mean"]
    splits = [read_split(path) for path in sorted((tmp_path / "runs").glob("*.split.yaml"))]
    held = [split["test"] for split in splits]
    assert len(splits) == len(set(held)) == 3
    assert [(len(split["train"]), len(split["validation"])) for split in splits] == [(2, 0)] * 3


def test_leaving_out_spares_the_test_patients_and_one_validates_where_the_run_stops_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limbs_below(tmp_path / "pairs", 4)
    path = settings_of(tmp_path)
    names = [patient_of(f"{number:016x}/", "^([0-9a-f]+)/") for number in range(4)]
    split = {"train": names[:2], "validation": names[2:3], "test": names[3:]}
    (tmp_path / "split.yaml").write_text(yaml.safe_dump(split))
    (tmp_path / "pairs" / f"{3:016x}" / "mr.nii.gz").write_bytes(b"not read")
    stopping = "stopping={figure: mae, patience: 1}"
    leave_out.main([str(path), "spare=test", f"data.split={tmp_path / 'split.yaml'}", stopping])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(said) == 2 + 3 + 1
    splits = [read_split(path) for path in sorted((tmp_path / "runs").glob("*.split.yaml"))]
    assert {split["test"][0] for split in splits} == set(names[:3])
    assert [(len(split["train"]), len(split["validation"])) for split in splits] == [(1, 1)] * 3


def test_the_proof_knows_a_perfect_result_and_that_intensity_tells_no_bone(tmp_path: Path) -> None:
    limbs_below(tmp_path / "pairs", 3)
    config = load_config(settings_of(tmp_path))
    assert isinstance(config.data, Images)
    found = find_images(config.data)
    one, two, three = sorted(found.patients)
    truth = {id(s): t.physical for s, t in zip(found.sources, found.targets, strict=True)}
    split = {"train": (one,), "validation": (two,), "test": (three,)}
    case = Case(config.data, found, split, "test", lambda plane: truth[id(plane)])
    figures = {name: both[0] for name, both in mr_ct.beside_intensity(case).items()}
    assert figures["MAE, HU"][0] == 0 < min(figures["MAE, HU"][1:])
    assert figures["IoU bone"][0] == 1
