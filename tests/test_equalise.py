"""Histogram equalisation: what it does to grey values, equal in training and serving, never HU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from skimage import exposure

from dicomnode.derived import OutputOptions
from dicomnode.errors import ConfigError, PackageError, SeriesRefused
from dicomnode.imaging.equalise import Equalisation, equalised, with_equalised
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.intensity import Equalised, Window
from dicomnode.imaging.manifest import (
    Bounds,
    DicomSpec,
    GeneratorSpec,
    InputSpec,
    Manifest,
    OutputSpec,
    Tiling,
)
from dicomnode.imaging.networks import build_generator, run_slices
from dicomnode.imaging.package import ModelPackage, read_package, write_package
from dicomnode.imaging.volume import volume_from_datasets
from dicomnode.pipeline import translate_series
from tests import judges
from tests.factories import ct_series, phantom_hu
from tests.tasks import NOW
from tests.test_pairs import images_of, write_config, write_nifti
from training import train
from training.config import Images, load_config
from training.pairs import Plane, find_images

METHODS: tuple[Equalisation, ...] = ("global", "clahe")
PLANES = arrays(np.float32, (2, 20, 24), elements=st.floats(-1, 1, width=32, allow_nan=False))


# what it does


@pytest.mark.parametrize("method", METHODS)
@given(PLANES)
@settings(max_examples=30, deadline=None)
def test_any_slice_stays_in_range_and_is_independent_of_its_neighbours(
    method: Equalisation, planes: NDArray[np.float32]
) -> None:
    result = equalised(planes, method)
    assert result.dtype == np.float32
    assert result.shape == planes.shape
    assert np.isfinite(result).all()
    assert result.min() >= -1
    assert result.max() <= 1
    assert np.array_equal(equalised(planes[:1], method)[0], result[0])


@given(PLANES)
@settings(max_examples=30, deadline=None)
def test_of_the_whole_slice_the_order_of_grey_values_is_kept(planes: NDArray[np.float32]) -> None:
    before, after = planes[0].ravel(), equalised(planes[:1], "global")[0].ravel()
    order = np.argsort(before, kind="stable")
    assert (np.diff(after[order]) >= 0).all()


def test_grey_values_of_the_whole_slice_are_evenly_used() -> None:
    rng = np.random.default_rng(1)
    skewed = np.clip(rng.normal(-0.6, 0.05, (1, 128, 128)), -1, 1).astype(np.float32)
    shares, _ = np.histogram(equalised(skewed, "global"), bins=8, range=(-1, 1))
    assert shares == pytest.approx(np.full(8, 128 * 128 / 8), rel=0.2)


def test_the_whole_slice_is_equalised_as_scikit_image_does() -> None:
    rng = np.random.default_rng(2)
    plane = rng.beta(2, 5, (96, 96)).astype(np.float32) * 2 - 1
    theirs = exposure.equalize_hist((plane + 1) / 2, nbins=4096) * 2 - 1
    assert np.abs(equalised(plane[None], "global")[0] - theirs).max() < 0.01


def test_in_tiles_faint_contrast_is_raised_and_noise_only_so_far() -> None:
    rng = np.random.default_rng(3)
    plane = np.full((128, 128), -0.5, np.float32)
    plane[40:60, 40:60] += 0.04
    plane[:, 100:] = 0.8
    plane += rng.normal(0, 0.004, plane.shape).astype(np.float32)
    result = equalised(plane[None], "clahe")[0]
    assert result[45:55, 45:55].mean() - result[70:90, 20:40].mean() > 2 * 0.04
    assert result[70:90, 20:40].std() < 6 * 0.004  # a level counts at most 3 times the mean


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [-1.0, 0.25, 1.0])
def test_a_slice_of_one_value_is_dark_and_no_division_by_zero(
    method: Equalisation, value: float
) -> None:
    assert (equalised(np.full((1, 16, 16), value, np.float32), method) == -1).all()


def test_slices_smaller_than_the_tiles_and_of_odd_sizes_are_taken() -> None:
    for shape in ((1, 3, 5), (1, 17, 31), (1, 8, 8), (1, 65, 9)):
        plane = np.random.default_rng(4).uniform(-1, 1, shape).astype(np.float32)
        assert equalised(plane, "clahe").shape == shape


def test_the_way_back_gives_grey_values_and_not_hu() -> None:
    scale = Equalised(-1024, 1500)
    assert scale.from_network(np.array([-1.0, 1.0], np.float32)).tolist() == [0.0, 4095.0]
    with pytest.raises(PackageError, match="empty"):
        Equalised(5, 5)


def test_the_channel_more_comes_first_and_the_middle_stays_the_middle() -> None:
    for count in (1, 3, 5):
        x = np.random.default_rng(5).uniform(-1, 1, (2, count, 9, 9)).astype(np.float32)
        more = with_equalised(x, "global")
        assert more.shape[1] == count + 1
        assert np.array_equal(more[:, (count + 1) // 2], x[:, count // 2])
        assert np.array_equal(more[:, 0], equalised(x[:, count // 2], "global"))


# the same in training and serving


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five patients, CT without and with contrast on one lattice."""
    for number in range(5):
        hu = phantom_hu(3, 40, 40, seed=number).astype(np.float32)
        write_nifti(tmp_path / "data" / f"P{number}" / "MR.nii.gz", hu)
        write_nifti(tmp_path / "data" / f"P{number}" / "CT.nii.gz", hu + 40 * (hu > 0))
    return tmp_path / "data"


def ct(method: str = "", **changes: Any) -> dict[str, Any]:
    intensity = {"kind": "window", "low": -1024, "high": 1500}
    if method:
        intensity |= {"kind": "equalised", "method": method}
    return {
        "files": "*/MR.nii.gz",
        "modality": "CT",
        "unit": "HU",
        "intensity": intensity,
    } | changes


def first_patient(data: Images) -> list[Plane]:
    found = find_images(data).sources
    return [plane for plane in found if plane.patient == found[0].patient]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 3])
def test_training_gives_the_network_what_serving_does(
    root: Path, tmp_path: Path, method: Equalisation, count: int
) -> None:
    seen: list[NDArray[np.float32]] = []

    def network(x: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(x.copy())
        return x[:, :1]

    data = images_of(root, tmp_path, source=ct(), slices=count, equalised=method, body_above=None)
    planes = first_patient(data)
    hu = np.stack([plane.physical for plane in planes])
    scale = Window(-1024, 1500)
    run_slices(network, hu, scale, scale, (count, 1), residual=False, extra=method)
    assert np.array_equal(np.concatenate(seen), np.stack([plane.network for plane in planes]))
    seen.clear()
    data = images_of(root, tmp_path, source=ct(method), slices=count, body_above=None)
    planes = first_patient(data)
    equal = Equalised(-1024, 1500, method)
    run_slices(network, hu, equal, equal, (count, 1), residual=False)
    assert np.array_equal(np.concatenate(seen), np.stack([plane.network for plane in planes]))
    grey = np.stack([plane.physical for plane in planes])  # errors are in grey values, not in HU
    middle = np.stack([plane.network[count // 2] for plane in planes])
    assert np.array_equal(grey, equal.from_network(middle))


def settings_for(root: Path, folder: Path, **data: Any) -> dict[str, Any]:
    generator = {"architecture": "resnet", "options": {"blocks": 1, "width": 4, "norm": "none"}}
    publish = {
        "task": "ce_ct",
        "bounds": {"modality": ["CT"]},
        "licence": "MIT",
        "intended_use": "Tests only.",
        "algorithm_family": "test",
    }
    return {"generator": generator, "publish": publish, "recipe": "pix2pix", "data": data}


def trained(root: Path, folder: Path, channels: int, **data: Any) -> ModelPackage:
    changes = settings_for(root, folder, **data)
    changes["generator"]["options"]["slices"] = channels
    path = write_config(root, folder, **changes)
    train.main([str(path)])
    return read_package(Path(load_config(path).package))


def translated(package: ModelPackage, folder: Path) -> list[Any]:
    """What the node makes of a series with a package, as files."""
    made = translate_series(ct_series(3, 40, 40), load_model(package), OutputOptions(), NOW)
    folder.mkdir()
    datasets = list(made.derived)
    for number, dataset in enumerate(datasets):
        dataset.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return datasets


@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_equalised_images_gives_series_that_say_they_are_no_hu(
    root: Path, tmp_path: Path, method: str
) -> None:
    target = ct(method, files="*/CT.nii.gz", outside=-1000)
    package = trained(root, tmp_path, 1, source=ct(method), target=target)
    assert package.manifest.output.unit == "AU"
    derived = translated(package, tmp_path / "derived")
    for dataset in derived:
        assert dataset.RescaleType == "US"
        assert "NOT HU" in dataset.SeriesDescription
        assert (dataset.RescaleSlope, dataset.RescaleIntercept) == (1, 0)
        assert 0 <= dataset.SmallestImagePixelValue <= dataset.LargestImagePixelValue <= 4095
    with pytest.raises(SeriesRefused, match="RescaleType is not HU"):
        volume_from_datasets(derived, "HU")
    if judges.DCIODVFY.exists():
        (source := tmp_path / "source").mkdir()
        for number, dataset in enumerate(ct_series(3, 40, 40)):
            dataset.save_as(source / f"{number}.dcm", enforce_file_format=True)
        files = [sorted((tmp_path / name).iterdir()) for name in ("source", "derived")]
        assert judges.iod_findings(*files) == []


def test_with_an_equalised_channel_the_result_stays_in_hu(root: Path, tmp_path: Path) -> None:
    target = ct(files="*/CT.nii.gz", outside=-1000)
    package = trained(root, tmp_path, 2, source=ct(), target=target, equalised="clahe")
    assert (package.manifest.output.unit, package.manifest.input.equalised) == ("HU", "clahe")
    derived = translated(package, tmp_path / "derived")
    assert {dataset.RescaleType for dataset in derived} == {"HU"}
    assert not any("NOT HU" in dataset.SeriesDescription for dataset in derived)
    assert volume_from_datasets(derived, "HU")[0].voxels.shape == (3, 40, 40)


def test_a_residual_head_adds_to_the_slice_and_not_to_its_equalised_form() -> None:
    generator = build_generator(
        "resnet", {"blocks": 1, "width": 2, "norm": "none", "slices": 2, "head": "residual"}
    )
    for weight in generator.parameters():
        weight.data.zero_()
    scale, hu = Window(-1024, 1500), phantom_hu(2, 32, 32).astype(np.float32)

    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = generator(torch.from_numpy(x)).detach().numpy()
        return result

    result = run_slices(run, hu, scale, scale, (1, 4), residual=False, extra="global")
    assert np.abs(result - hu).max() < 0.01


# what does not fit


@pytest.mark.parametrize(
    ("data", "top", "words"),
    [
        ({"equalised": "clahe"}, {}, "takes 1 channels"),
        ({"equalised": "clahe"}, {"recipe": "cyclegan"}, "both ways"),
        ({"target": ct("global", files="*/CT.nii.gz")}, {"residual": True}, "nothing can be added"),
        ({"source": ct("loud")}, {}, "not one of: global, clahe"),
        ({"equalised": "loud"}, {}, "not one of: none, global, clahe"),
    ],
)
def test_a_run_that_does_not_fit_together_is_refused(
    root: Path, tmp_path: Path, data: dict[str, Any], top: dict[str, Any], words: str
) -> None:
    source = {"source": ct(), "target": ct(files="*/CT.nii.gz", outside=-1000)}
    changes = settings_for(root, tmp_path, **source | data) | top
    with pytest.raises(ConfigError, match=words):
        train.main([str(write_config(root, tmp_path, **changes))])


def manifest(output: OutputSpec, task: str = "ce_ct", remark: str = "") -> Manifest:
    return Manifest(
        format=1,
        name="equal",
        version="1",
        task=task,  # type: ignore[arg-type]
        generator=GeneratorSpec("identity"),
        input=InputSpec("CT", "HU", Equalised(-1024, 1500)),
        output=output,
        normalisation="none",
        tiling=Tiling(),
        bounds=Bounds(("CT",)),
        dicom=DicomSpec("equal", "test", "1", remark),
        licence="MIT",
        intended_use="Tests only.",
    )


def test_a_package_cannot_call_grey_values_hu(tmp_path: Path) -> None:
    grey = OutputSpec("CT", "AU", Equalised(-1024, 1500))
    with pytest.raises(PackageError, match="no unit: give AU"):
        manifest(OutputSpec("CT", "HU", Equalised(-1024, 1500)))
    with pytest.raises(PackageError, match="denoise gives HU"):
        manifest(grey, task="denoise")
    with pytest.raises(PackageError, match="beside NOT HU"):
        manifest(grey, remark="PHANTOM DEMO")
    body = phantom_hu(1, 16, 16).astype(np.float32)
    assert write_package(tmp_path / "equal", manifest(grey), {}, body, "#").manifest.not_hu
