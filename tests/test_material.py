"""What a run is fed: units by the node's code, patients that do not leak, patches, bad input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset

from dicomnode.errors import ConfigError
from dicomnode.imaging.percentiles import Percentiles, Whole
from dicomnode.imaging.volume import volume_from_datasets
from tests.factories import changed, ct_series, mr_series, pet_series, phantom_hu
from tests.peers import shared_data
from tests.test_pairs import SOURCE, TARGET, as_mr, images_of, write_config, write_nifti
from tests.test_units import philips, suv_factor
from training import prove, train
from training.augment import Change, brightened, cut, cut_weight
from training.config import load_config
from training.errors import TrainingError
from training.images import read_image, voxels_of
from training.leaks import alike_slices, names_of_one_patient
from training.material import ImagePairs
from training.pairs import Found, draw_batch, find_images, patient_of
from training.split import read_split, split_patients


def save(series: list[Dataset], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, dataset in enumerate(series):
        dataset.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


# units, as the node has them


def _midnight() -> list[Dataset]:
    times = {"SeriesTime": "002000", "AcquisitionTime": "002000"}
    return pet_series(3, tracer={"RadiopharmaceuticalStartTime": "232000"}, **times)


def _by_date() -> list[Dataset]:
    tracer = {"RadiopharmaceuticalStartDateTime": "20250101232000"}
    times = {"SeriesTime": "002000", "AcquisitionTime": "002000"}
    return pet_series(3, tracer=tracer, **times)


ACTIVITIES: dict[str, tuple[Callable[[], list[Dataset]], float]] = {
    "START": (lambda: pet_series(3), suv_factor(3600)),
    "ADMIN": (lambda: changed(pet_series(3), DecayCorrection="ADMIN"), suv_factor(0)),
    "over midnight, without a date": (_midnight, suv_factor(3600)),
    "over midnight, with dates": (_by_date, suv_factor(3600)),
    "GML": (lambda: changed(pet_series(3), Units="GML", SUVType="BW"), 1.0),
    "CNTS with Philips' SUV": (lambda: philips(pet_series(3), suv="0.002"), 0.002),
    "CNTS with Philips' Bq/ml": (
        lambda: philips(pet_series(3), activity="2.5"),
        2.5 * suv_factor(3600),
    ),
}


@pytest.mark.parametrize("name", ACTIVITIES)
def test_the_training_reader_gives_the_suv_that_the_node_gives(name: str, tmp_path: Path) -> None:
    make, factor = ACTIVITIES[name]
    series = make()
    read = voxels_of(read_image(save(series, tmp_path / "pet"), "SUV"))
    stored = np.stack([ds.pixel_array * float(ds.RescaleSlope) for ds in series])
    assert np.allclose(read, stored * factor, rtol=1e-6)
    assert np.array_equal(read, volume_from_datasets(series, "SUV")[0].voxels)


def test_the_training_reader_gives_the_activity_that_the_node_gives(tmp_path: Path) -> None:
    series = pet_series(3)
    read = voxels_of(read_image(save(series, tmp_path / "pet"), "BQML"))
    assert np.array_equal(read, volume_from_datasets(series, "BQML")[0].voxels)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: changed(pet_series(3), PatientWeight=None), "NO_WEIGHT"),
        (lambda: changed(pet_series(3), DecayCorrection="NONE"), "NOT_CORRECTED"),
        (lambda: changed(pet_series(3), CorrectedImage=["SCAT"]), "NOT_CORRECTED"),
        (lambda: pet_series(3, tracer={"RadionuclideTotalDose": None}), "NO_DOSE"),
        (lambda: changed(pet_series(3), Units="CNTS"), "NOT_BQML"),
        (lambda: ct_series(3), "NOT_PET"),
    ],
)
def test_pet_that_has_no_suv_is_refused_with_the_nodes_reason(
    make: Callable[[], list[Dataset]], code: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=code):
        read_image(save(make(), tmp_path / "pet"), "SUV")


def pet_pairs(root: Path, folder: Path, **changes: Any) -> Found:
    """Early and delayed PET of four patients as DICOM folders, read as pairs."""
    for number in range(4):
        hu = (phantom_hu(3, 32, 32, seed=number) + 1000) * 5
        for name, share in (("early", 0.6), ("late", 1.0)):
            stored = np.clip(hu * share, 0, 32767)
            series = pet_series(3, 32, 32, stored=stored, patient=f"P{number}", slopes=["2"] * 3)
            save(series, root / f"P{number}" / name)
    side = {"modality": "PT", "unit": "SUV", "intensity": {"kind": "window", "low": 0, "high": 10}}
    return find_images(
        images_of(
            root,
            folder,
            source={"files": "*/early", **side},
            target={"files": "*/late", **side},
            body_above=0.05,
            **changes,
        )
    )


def test_folders_of_pet_are_pairs_in_suv(tmp_path: Path) -> None:
    found = pet_pairs(tmp_path / "data", tmp_path)
    assert len(found.sources) == 12
    body = found.targets[0].body
    ratio = found.sources[0].physical[body] / found.targets[0].physical[body]
    assert np.median(ratio) == pytest.approx(0.6, abs=0.01)
    assert 0.1 < np.median(found.targets[0].physical[body]) < 10


def test_without_a_pattern_dicom_goes_by_patient_id_and_nobody_is_warned(tmp_path: Path) -> None:
    named = pet_pairs(tmp_path / "data", tmp_path)
    by_id = pet_pairs(tmp_path / "data", tmp_path, patient="")
    assert by_id.patients == named.patients
    assert not any("no patient ids" in words for words in by_id.warnings)


def test_mr_is_scaled_by_the_whole_volume_and_not_by_the_slice(tmp_path: Path) -> None:
    hu = phantom_hu(4, 40, 40).astype(np.float32)
    mr = as_mr(hu)
    mr[0] *= 0.5
    for number, gain in enumerate((1.0, 7.5)):
        write_nifti(tmp_path / "data" / f"P{number}" / "MR.nii.gz", mr * gain)
        write_nifti(tmp_path / "data" / f"P{number}" / "CT.nii.gz", hu + number)
    scale = {"kind": "percentiles", "low": 0.5, "high": 99.5}
    data = images_of(tmp_path / "data", tmp_path, source=SOURCE | {"intensity": scale})
    found = find_images(data).sources
    first, second = (
        np.stack([p.network[0] for p in found if p.patient == patient])
        for patient in sorted({p.patient for p in found})
    )
    assert np.abs(first - second).max() < 1e-4
    wanted = Percentiles(0.5, 99.5).window_of(Whole(mr)).to_network(mr)
    assert min(np.abs(wanted - one).max() for one in (first, second)) < 1e-6


# bad input


def test_values_that_cannot_be_in_their_unit_are_refused(tmp_path: Path) -> None:
    for name, values, unit, words in (
        ("scaled", [0.0, 1.0], "HU", "values from 0 to 1 are not HU"),
        ("grey", [0.0, 255.0], "HU", "values from 0 to 255 are not HU"),
        ("activity", [0.0, 90000.0], "SUV", "are not SUV"),
        ("huge", [0.0, 1e6], "HU", "are not HU"),
        ("broken", [0.0, np.nan], "HU", "not finite"),
    ):
        np.save(tmp_path / f"{name}.npy", np.array([values] * 2, np.float32))
        with pytest.raises(TrainingError, match=words):
            read_image(tmp_path / f"{name}.npy", unit)  # type: ignore[arg-type]


def test_8_bit_volumes_are_refused_in_every_format(tmp_path: Path) -> None:
    grey = np.full((4, 9, 9), 200, np.uint8)
    for name in ("a.nii.gz", "a.mha", "a.nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(grey), str(tmp_path / name))
    np.save(tmp_path / "a.npy", grey)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(TrainingError, match="8-bit"):
            read_image(path, "HU")


def test_colour_and_time_are_refused_and_one_slice_is_taken(tmp_path: Path) -> None:
    colour = sitk.GetImageFromArray(np.zeros((4, 9, 9, 3), np.int16), isVector=True)
    sitk.WriteImage(colour, str(tmp_path / "colour.mha"))
    with pytest.raises(TrainingError, match="colour"):
        read_image(tmp_path / "colour.mha", "HU")
    sitk.WriteImage(sitk.Image([9, 9, 4, 3], sitk.sitkInt16), str(tmp_path / "moving.nii.gz"))
    with pytest.raises(TrainingError, match="4 axes"):
        read_image(tmp_path / "moving.nii.gz", "HU")
    slope = np.arange(81, dtype=np.int16).reshape(9, 9)
    sitk.WriteImage(sitk.GetImageFromArray(slope), str(tmp_path / "slice.mha"))
    assert voxels_of(read_image(tmp_path / "slice.mha", "HU")).shape == (1, 9, 9)


def test_an_empty_folder_and_a_truncated_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match=r"empty: no DICOM instance"):
        read_image(tmp_path / "empty", "HU")
    noise = np.random.default_rng(1).normal(0, 100, (9, 40, 40)).astype(np.float32)
    for name in ("a.nii", "a.nii.gz", "a.mha", "a.nrrd", "a.npy"):  # ITK: half a NIfTI is zeros
        if name == "a.npy":
            np.save(tmp_path / name, noise)
        else:
            sitk.WriteImage(sitk.GetImageFromArray(noise), str(tmp_path / name))
        assert voxels_of(read_image(tmp_path / name, "HU")).shape == noise.shape
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(TrainingError, match=name):
            read_image(tmp_path / name, "HU")
    folder = save(ct_series(3), tmp_path / "cut")
    whole = (folder / "1.dcm").read_bytes()
    (folder / "1.dcm").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingError, match="cut"):
        read_image(folder, "HU")


def test_slices_of_two_sizes_are_no_series(tmp_path: Path) -> None:
    folder = save(ct_series(3, 32, 40), tmp_path / "mixed")
    ct_series(4, 40, 40)[3].save_as(folder / "9.dcm", enforce_file_format=True)
    with pytest.raises(TrainingError, match="MIXED_MATRIX"):
        read_image(folder, "HU")


def test_slices_of_two_patients_are_no_series(tmp_path: Path) -> None:
    folder = save(ct_series(3), tmp_path / "mixed")
    ct_series(4, patient="P2")[3].save_as(folder / "9.dcm", enforce_file_format=True)
    with pytest.raises(TrainingError, match="MIXED"):
        read_image(folder, "HU")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": SOURCE | {"unit": "HU"}}, "data.source.unit: HU is of CT, not MR"),
        ({"target": TARGET | {"unit": "SUV"}}, "data.target.unit: SUV is of PT, not CT"),
        ({"jitter": 0.1, "source": TARGET | {"files": "*/MR.nii.gz"}}, "data.jitter: HU"),
        ({"vary": {"shade": 0.1}, "source": TARGET | {"files": "*/MR.nii.gz"}}, "data.vary: HU"),
    ],
)
def test_settings_with_a_wrong_unit_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(write_config(tmp_path, tmp_path, data=changes))


def test_mr_in_a_folder_of_ct_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="NOT_CT"):
        read_image(save(mr_series(3), tmp_path / "mr"), "HU")


def test_16_bits_survive(tmp_path: Path) -> None:
    stored = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(stored).save(tmp_path / "a.png")
    assert np.array_equal(voxels_of(read_image(tmp_path / "a.png", "AU"))[0], stored)
    np.save(tmp_path / "a.npy", stored)
    assert np.array_equal(voxels_of(read_image(tmp_path / "a.npy", "AU"))[0], stored)


# patients do not leak


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    for number in range(6):
        hu = phantom_hu(3, 40, 40, seed=number).astype(np.float32)
        hu[:, 10 + 2 * number : 14 + 2 * number, 14:26] = 300 * (-1) ** number
        write_nifti(folder / f"P{number}" / "CT.nii.gz", hu)
        write_nifti(folder / f"P{number}" / "MR.nii.gz", as_mr(hu))
    return folder


def test_a_patient_id_under_two_names_stops_the_run(tmp_path: Path) -> None:
    pet_pairs(tmp_path / "data", tmp_path)
    (tmp_path / "data" / "P3").rename(tmp_path / "data" / "P9")
    for kind in ("early", "late"):
        series = pet_series(3, 32, 32, patient="P0", seed=5, slopes=["2"] * 3)
        save(series, tmp_path / "data" / "P9" / kind)
    pet = {"modality": "PT", "unit": "SUV", "intensity": SOURCE["intensity"]}
    early, late = (pet | {"files": f"*/{kind}"} for kind in ("early", "late"))
    data = images_of(tmp_path / "data", tmp_path, source=early, target=late)
    with pytest.raises(TrainingError, match="1 PatientIDs stand under more than one name"):
        find_images(data)


def test_names_without_a_patient_id_are_not_held_against_each_other() -> None:
    assert names_of_one_patient([("a", ""), ("b", ""), ("a", "1"), ("a", "1"), ("c", "2")]) == 0
    assert names_of_one_patient([("a", "1"), ("b", "1"), ("c", "2"), ("d", "2")]) == 2


def test_slices_that_look_like_another_patients_are_counted_and_told(
    root: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    planes = [rng.normal(0, 1, (48, 64)).astype(np.float32) for _ in range(6)]
    planes[5] = planes[0] * 3 + rng.normal(0, 0.05, (48, 64)).astype(np.float32)
    found = alike_slices(planes, list("abcdef"))
    assert (found.slices, found.patients) == (2, 2)
    assert alike_slices(planes, list("abcdea")).slices == 0
    assert alike_slices([], []).slices == 0
    flat = [np.zeros((40, 40), np.float32)] * 2
    assert alike_slices(flat, ["a", "b"]).slices == 0


def test_a_patient_in_two_parts_stops_the_run_and_is_named(root: Path, tmp_path: Path) -> None:
    path = write_config(root, tmp_path)
    config = load_config(path)
    ImagePairs(config, config.data)  # type: ignore[arg-type]
    split = read_split(tmp_path / "split.yaml")
    text = (tmp_path / "split.yaml").read_text()
    (tmp_path / "split.yaml").write_text(text.replace("test:\n", f"test:\n- {split['train'][0]}\n"))
    with pytest.raises(TrainingError, match=f"more than one place: {split['train'][0]}"):
        train.main([str(path)])


def test_no_patient_of_a_drawn_split_is_in_two_parts(tmp_path: Path) -> None:
    split = split_patients(
        tmp_path / "split.yaml",
        [f"p{n}" for n in range(40)],
        [],
        validation_fraction=0.15,
        test_fraction=0.2,
        seed=1,
    )
    everyone = [patient for part in split.values() for patient in part]
    assert len(everyone) == len(set(everyone)) == 40
    assert {part: len(split[part]) for part in split} == {"train": 26, "validation": 6, "test": 8}


# patches


def test_patches_turned_and_mirrored_still_show_one_place(root: Path, tmp_path: Path) -> None:
    data = images_of(root, tmp_path, rotate_degrees=12.0)
    found = find_images(data)
    batch = draw_batch(found, sorted(found.patients), data, 24, 24, np.random.default_rng(2))
    straight = images_of(root, tmp_path)
    other = draw_batch(found, sorted(found.patients), straight, 24, 24, np.random.default_rng(2))
    assert not np.array_equal(batch.target.numpy(), other.target.numpy())
    inside = np.zeros((24, 1, 24, 24), np.bool_)
    hu = (batch.target.numpy() + 1) / 2 * 1624 - 1024
    mr = (batch.source.numpy() + 1) / 2 * 600
    inside = (batch.weight.numpy() > 0) & (np.abs(hu - 40) < 60)  # away from edges: linear there
    assert inside.sum() > 1000
    assert np.median(np.abs(mr - np.clip(as_mr(hu), 0, 600))[inside]) < 1


def test_a_patch_turned_by_a_right_angle_is_that_patch() -> None:
    planes = np.random.default_rng(1).normal(0, 1, (2, 20, 20)).astype(np.float32)
    at = slice(4, 12), slice(6, 14)
    turned = cut(planes, at, Change(degrees=90.0))
    assert (
        np.abs(turned - np.rot90(planes[..., *at], 1, (1, 2))).max() < 1e-4
        or np.abs(turned - np.rot90(planes[..., *at], -1, (1, 2))).max() < 1e-4
    )
    assert np.array_equal(
        cut(planes, at, Change(mirrored=True)), planes[..., 4:12, 6:14][..., ::-1]
    )


def test_what_is_turned_in_from_beyond_the_slice_weighs_nothing() -> None:
    weight = np.ones((1, 20, 20), np.float32)
    turned = cut_weight(weight, (slice(0, 20), slice(0, 20)), Change(degrees=45.0))
    assert set(np.unique(turned)) == {0.0, 1.0}
    assert turned[0, 0, 0] == 0
    assert turned[0, 8:12, 8:12].all()


def test_contrast_and_brightness_change_the_source_only(root: Path, tmp_path: Path) -> None:
    data = images_of(root, tmp_path, jitter=0.2, mirror=False)
    plain = images_of(root, tmp_path, mirror=False)
    found = find_images(data)
    first = sorted(found.patients)[:1]
    one, other = (
        draw_batch(found, first, kind, 1, 40, np.random.default_rng(3)) for kind in (data, plain)
    )
    assert np.array_equal(one.target, other.target)
    assert not np.array_equal(one.source, other.source)
    assert one.source.abs().max() <= 1
    x = np.linspace(-1, 1, 9).astype(np.float32)
    assert np.array_equal(brightened(x, Change()), x)
    assert brightened(x, Change(gain=1.1, offset=0.05))[4] == pytest.approx(0.05)


def test_a_patch_twice_as_large_shows_half_of_it() -> None:
    row, column = np.indices((40, 40), np.float32)
    planes = np.stack([row, column])
    at = slice(10, 26), slice(12, 28)
    wide, large = cut(planes, at, Change()), cut(planes, at, Change(scale=2.0))
    for own, other in zip(wide, large, strict=True):  # about the middle
        assert np.allclose(other - other.mean(), (own - own.mean()) / 2, atol=1e-3)
        assert other.mean() == pytest.approx(own.mean(), abs=1e-3)
    small = cut_weight(
        np.ones((1, 16, 16), np.float32), (slice(0, 16), slice(0, 16)), Change(scale=0.5)
    )
    assert small[0, 0, 0] == 0
    assert small[0, 5:11, 5:11].all()


def test_a_curve_leaves_dark_and_bright_and_a_shade_goes_from_side_to_side() -> None:
    x = np.linspace(-1, 1, 9, dtype=np.float32)[None, None].repeat(5, axis=1)
    bent = brightened(x, Change(curve=0.5))
    assert bent[0, 0, [0, -1]].tolist() == [-1, 1]
    assert (bent[0, 0, 1:-1] > x[0, 0, 1:-1]).all()
    flat = np.full((2, 7, 9), -0.5, np.float32)
    shaded = brightened(flat, Change(slope=(0.2, 0.0))) + 1
    assert np.allclose(shaded[:, -1] / 0.5, np.exp(0.2))
    assert np.allclose(shaded[:, 0] / 0.5, np.exp(-0.2))
    assert np.allclose(brightened(np.full_like(flat, -1), Change(slope=(0.2, 0.3))), -1)


def test_size_and_values_vary_and_source_and_target_still_show_one_place(
    root: Path, tmp_path: Path
) -> None:
    data = images_of(root, tmp_path, mirror=False, vary={"scale": 0.4})
    found = find_images(data)
    patients = sorted(found.patients)
    batch = draw_batch(found, patients, data, 24, 24, np.random.default_rng(2))
    hu = (batch.target.numpy() + 1) / 2 * 1624 - 1024
    mr = (batch.source.numpy() + 1) / 2 * 600
    inside = (batch.weight.numpy() > 0) & (np.abs(hu - 40) < 60)
    assert inside.sum() > 1000
    assert np.median(np.abs(mr - np.clip(as_mr(hu), 0, 600))[inside]) < 1
    bent = images_of(root, tmp_path, mirror=False, vary={"scale": 0.4, "curve": 0.5})
    other = draw_batch(found, patients, bent, 1, 24, np.random.default_rng(2))
    first = draw_batch(found, patients, data, 1, 24, np.random.default_rng(2))
    assert np.array_equal(other.target, first.target)
    assert not np.array_equal(other.source, first.source)


def test_who_is_left_out_is_not_read(root: Path, tmp_path: Path) -> None:
    out = patient_of("P1/", r"(P\d+)/")
    found = find_images(images_of(root, tmp_path, without=[out]))
    assert len(found.patients) == 5
    assert out not in found.patients


def test_a_split_without_validation_patients_trains_but_cannot_stop_early(
    root: Path, tmp_path: Path
) -> None:
    names = [patient_of(f"P{number}/", r"(P\d+)/") for number in range(6)]
    split = {"train": names[:4], "validation": [], "test": names[4:]}
    path = write_config(root, tmp_path)
    (tmp_path / "split.yaml").write_text(yaml.safe_dump(split))
    train.main([str(path), "optimisation.steps=1"])
    assert (tmp_path / "mr-to-ct" / "manifest.yaml").exists()
    with pytest.raises(TrainingError, match="no slice is in validation"):
        train.main([str(path), "stopping={figure: mae}", "name=other"])


def test_all_patients_may_train_if_the_split_says_so(root: Path, tmp_path: Path) -> None:
    names = [patient_of(f"P{number}/", r"(P\d+)/") for number in range(6)]
    split: dict[str, list[str]] = {"train": names, "validation": [], "test": []}
    path = write_config(root, tmp_path, card=str(tmp_path / "card.md"))
    (tmp_path / "card.md").write_text("{name}: {patients[train]} train, {patients_tested} test\n")
    (tmp_path / "split.yaml").write_text(yaml.safe_dump(split))
    train.main([str(path), "optimisation.steps=1"])
    assert (tmp_path / "mr-to-ct" / "MODEL_CARD.md").read_text() == "mr-to-ct: 6 train, 0 test\n"
    with pytest.raises(TrainingError, match=r"no patient is in test; .*leave_out"):
        prove.main([str(path)])
    split = {"train": names, "validation": [], "test": ["0" * 16]}
    (tmp_path / "split.yaml").write_text(yaml.safe_dump(split))
    with pytest.raises(TrainingError, match="no slice is in test"):
        train.main([str(path), "name=other"])


def test_what_is_switched_off_draws_no_random_number(root: Path, tmp_path: Path) -> None:
    data = images_of(root, tmp_path)
    found = find_images(data)
    patients = sorted(found.patients)
    batches = [
        draw_batch(found, patients, data, 4, 24, np.random.default_rng([7, step]))
        for step in (1, 1, 2)
    ]
    assert np.array_equal(batches[0].source, batches[1].source)
    assert not np.array_equal(batches[0].source, batches[2].source)


def test_keys_that_came_later_and_are_not_used_change_no_digest(root: Path, tmp_path: Path) -> None:
    plain = load_config(write_config(root, tmp_path)).digest()
    spelled = {"equalised": "none", "rotate_degrees": 0.0, "jitter": 0.0, "vary": None}
    assert load_config(write_config(root, tmp_path, data=spelled)).digest() == plain
    used = {"rotate_degrees": 5.0}
    assert load_config(write_config(root, tmp_path, data=used)).digest() != plain


# real data


def test_real_pet_is_read_in_suv() -> None:
    folder = shared_data() / "dicom/pet/fdg_wholebody_STS_001_GE_BQML"
    if not folder.exists():
        pytest.skip("no real data beside the checkout")
    image = read_image(folder, "SUV")
    voxels: NDArray[np.float32] = voxels_of(image)
    assert len(voxels) == 267
    assert voxels.min() >= 0
    assert 5 < np.percentile(voxels, 99.99) < 100
