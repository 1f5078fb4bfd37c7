"""MR values by percentiles of the volume: the same window for training and serving, and back."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from pydicom import Dataset
from scipy import ndimage
from skimage.filters import threshold_otsu

from dicomnode.errors import PackageError, SeriesRefused
from dicomnode.imaging.counting import Distribution
from dicomnode.imaging.inference import load_model, predict
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.manifest import (
    Bounds,
    DicomSpec,
    GeneratorSpec,
    InputSpec,
    Manifest,
    OutputSpec,
    Tiling,
    manifest_from_yaml,
    manifest_to_yaml,
)
from dicomnode.imaging.package import read_package, write_package
from dicomnode.imaging.percentiles import Percentiles, Whole, foreground, otsu_threshold
from dicomnode.imaging.volume import Volume, volume_from_datasets
from dicomnode.qa import assess
from tests.factories import mr_series
from tests.test_package import reseal

few_or_many = st.one_of(
    st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)
HU = Window(-1024.0, 3071.0)
TO_CT = Manifest(
    format=1,
    name="affine-syn-ct",
    version="1.0.0",
    task="syn_ct",
    generator=GeneratorSpec("affine", {"scale": 0.5, "offset": 0.1}),
    input=InputSpec("MR", "AU", Percentiles(1.0, 99.0)),
    output=OutputSpec("CT", "HU", HU),
    normalisation="none",
    tiling=Tiling(True, 0),
    bounds=Bounds(("MR",)),
    dicom=DicomSpec("affine", "test", "1.0.0"),
    licence="MIT",
    intended_use="Tests only.",
)
BACK = replace(  # an MR of the MR: the result has the source's own window
    TO_CT,
    generator=GeneratorSpec("identity"),
    output=OutputSpec("MR", "AU", Percentiles(1.0, 99.0)),
)


def patient(seed: int = 1, gain: float = 1.0) -> NDArray[np.float32]:
    """(6, 48, 48), AU: a bright patient, with a dark hole, in a noisy background."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices((6, 48, 48))
    inside = (y - 24) ** 2 + (x - 24) ** 2 < 18**2
    hole = (y - 20) ** 2 + (x - 24) ** 2 < 9
    values = np.where(inside & ~hole, rng.normal(600, 60, z.shape), rng.normal(20, 8, z.shape))
    return (gain * np.abs(values)).astype(np.float32)


def test_the_foreground_is_the_patient_with_its_holes() -> None:
    voxels = patient()
    voxels[:, :4, :4] = 500  # something small beside the patient
    y, x = np.indices((48, 48))
    assert np.array_equal(foreground(voxels)[2], (y - 24) ** 2 + (x - 24) ** 2 < 18**2)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_otsu_is_the_threshold_of_scikit_image(seed: int) -> None:
    values = patient(seed).ravel()
    ours = otsu_threshold(values)
    assert np.mean((values > ours) != (values > threshold_otsu(values))) < 1e-3  # other bins
    spiked = np.append(values, np.float32(1e6))
    assert np.array_equal(spiked > otsu_threshold(spiked), spiked > ours)


@settings(max_examples=30, deadline=None)
@given(gain=st.floats(1e-3, 1e3), slices=st.permutations(range(6)))
def test_percentiles_do_not_depend_on_gain_or_slice_order(gain: float, slices: list[int]) -> None:
    plain, scaled = patient(), patient(gain=gain)[slices]
    one = Percentiles().window_of(Whole(plain)).to_network(plain)[slices]
    other = Percentiles().window_of(Whole(scaled)).to_network(scaled)
    assert np.allclose(one, other, atol=2e-3)


@settings(max_examples=60, deadline=None)
@given(
    values=arrays(np.float32, array_shapes(max_dims=2, max_side=30), elements=few_or_many),
    pieces=st.integers(1, 5),
    low=st.floats(0, 60),
    high=st.floats(60, 100),
)
def test_counted_values_have_the_percentiles_of_numpy_to_the_bit(
    values: NDArray[np.float32], pieces: int, low: float, high: float
) -> None:
    given_bit_by_bit = Distribution()
    for piece in np.array_split(values.ravel(), pieces):
        given_bit_by_bit.add(piece)
    both = np.percentile(values, (low, high))
    assert given_bit_by_bit.percentiles(low, high) == tuple(both)
    assert given_bit_by_bit.percentile(high) == np.percentile(values, high)
    distinct, numbers = given_bit_by_bit.counted()
    assert np.array_equal(np.repeat(distinct, numbers), np.sort(values, axis=None))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=st.tuples(*[st.integers(1, 7)] * 3))
def test_slice_by_slice_the_largest_part_is_that_of_the_whole_volume(
    data: st.DataObject, shape: tuple[int, int, int]
) -> None:
    """The foreground as it is defined: `scipy` on all slices at once. Small volumes have ties."""
    bright = data.draw(arrays(np.bool_, shape))
    padding = data.draw(arrays(np.bool_, shape))
    voxels = np.where(bright, np.float32(100), np.float32(1))
    image = bright & ~padding
    wanted = np.zeros(shape, np.bool_)
    if image.any() and (~bright & ~padding).any():  # else there is nothing to part
        parts, _ = ndimage.label(image)
        largest = parts == 1 + int(np.bincount(parts.ravel())[1:].argmax())
        wanted = np.stack([ndimage.binary_fill_holes(plane) for plane in largest]) & ~padding
    assert np.array_equal(foreground(voxels, padding), wanted)


def test_percentiles_of_the_foreground_are_the_ends_of_the_network_range() -> None:
    voxels = patient()
    window = Percentiles(5, 95).window_of(Whole(voxels))
    inside = window.to_network(voxels)[foreground(voxels)]
    assert abs(float((inside <= -1 + 1e-6).mean()) - 0.05) < 0.002
    assert abs(float((inside >= 1 - 1e-6).mean()) - 0.05) < 0.002
    kept = np.abs(inside) < 1 - 1e-6
    back = window.from_network(inside)[kept]
    assert np.allclose(back, voxels[foreground(voxels)][kept], rtol=1e-5)


def test_padding_is_no_foreground() -> None:
    voxels = patient()
    padding = np.zeros(voxels.shape, dtype=bool)
    padding[:, :, :10] = padding[:, 30:32, 22:24] = True
    padded = np.where(padding, np.float32(30000), voxels)
    assert not foreground(padded, padding)[padding].any()
    high = Percentiles().window_of(Whole(padded, padding)).high
    assert abs(high - Percentiles().window_of(Whole(voxels)).high) < 20


def test_a_volume_of_one_value_has_no_contrast() -> None:
    for voxels in (np.zeros((2, 8, 8), np.float32), np.full((2, 8, 8), 7, np.float32)):
        with pytest.raises(SeriesRefused) as caught:
            Percentiles().window_of(Whole(voxels))
        assert caught.value.code == "NO_CONTRAST"


def test_percentiles_that_are_none_are_refused() -> None:
    with pytest.raises(PackageError, match="percentiles"):
        Percentiles(60, 40)


def mr(slices: int = 5, **options: object) -> list[Dataset]:
    """MR slices, 40 x 48, of a bright patient in the air."""
    stored = patient(int(options.pop("seed", 1)))[:slices, :40]  # type: ignore[call-overload]
    return mr_series(len(stored), 40, 48, stored=np.rint(stored), **options)


def volume(datasets: list[Dataset]) -> Volume:
    return volume_from_datasets(datasets, "AU")[0]


def write(path: Path, manifest: Manifest, golden: NDArray[np.float32] | None = None) -> Path:
    source = patient()[:1] if golden is None else golden
    return write_package(path, manifest, {}, source, "# Tests\n").path


def test_a_manifest_with_percentiles_reads_back_equal() -> None:
    for manifest in (TO_CT, BACK):
        text = manifest_to_yaml(manifest)
        assert "kind: percentiles" in text
        assert manifest_from_yaml(text.encode()) == manifest


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("low: 1.0", "low: 99.5", r"percentiles 99\.5 and 99"),
        ("low: 1.0", "lower: 1.0", r"manifest\.input\.intensity: unknown keys: lower"),
        (
            "kind: percentiles",
            "kind: median",
            "'median' is not one of: window, none, equalised, percentiles",
        ),
        ("unit: AU", "unit: HU", "HU has a scale; use a window"),
    ],
)
def test_wrong_percentiles_are_refused_with_their_key(old: str, new: str, reason: str) -> None:
    text = manifest_to_yaml(TO_CT)
    with pytest.raises(PackageError, match=reason):
        manifest_from_yaml(text.replace(old, new, 1).encode())


def test_a_result_has_percentiles_only_of_its_source() -> None:
    for output in (
        OutputSpec("CT", "HU", Percentiles(1, 99)),
        OutputSpec("MR", "AU", Percentiles()),
    ):
        with pytest.raises(PackageError, match=r"manifest\.output\.intensity: percentiles"):
            replace(TO_CT, output=output)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(1, 50),
    slope=st.sampled_from(["1", "3.77", "0.01221", "250.5"]),
    intercept=st.sampled_from(["0", "-37.5"]),
)
def test_there_and_back_loses_less_than_half_a_stored_unit(
    seed: int, slope: str, intercept: str
) -> None:
    source = volume(mr(seed=seed, slope=slope, intercept=intercept))
    into, out_of = BACK.intensities_of(source)
    back = out_of.from_network(into.to_network(source.voxels))
    assert isinstance(into, Window)
    inside = (source.voxels >= into.low) & (source.voxels <= into.high)
    assert inside[foreground(source.voxels)].mean() > 0.97
    assert np.abs(back - source.voxels)[inside].max() < float(slope) / 2
    stored = np.rint((back - float(intercept)) / float(slope))
    np.testing.assert_array_equal(
        stored[inside], np.rint((source.voxels - float(intercept)) / float(slope))[inside]
    )


@settings(max_examples=15, deadline=None)
@given(shuffle=st.randoms(use_true_random=False))
def test_any_order_of_arrival_gives_the_same_window_to_the_bit(shuffle: random.Random) -> None:
    series = mr()
    one = TO_CT.intensities_of(volume(series))
    shuffle.shuffle(series)
    assert TO_CT.intensities_of(volume(series)) == one


def test_a_package_maps_the_volume_by_its_own_percentiles(tmp_path: Path) -> None:
    model = load_model(read_package(write(tmp_path / "m", TO_CT)))
    source = volume(mr())
    window = Percentiles(1, 99).window_of(source)
    made = predict(model, source)
    assert made.unit == "HU"
    expected = HU.from_network(window.to_network(source.voxels) * np.float32(0.5) + np.float32(0.1))
    np.testing.assert_allclose(made.voxels, expected, atol=1e-3)


def test_the_same_patient_at_another_gain_gives_the_same_ct(tmp_path: Path) -> None:
    model = load_model(read_package(write(tmp_path / "m", TO_CT)))
    one, other = (predict(model, volume(mr(slope=slope))).voxels for slope in ("1", "4"))
    np.testing.assert_allclose(one, other, atol=0.01)


def test_padding_changes_neither_the_window_nor_itself(tmp_path: Path) -> None:
    model = load_model(read_package(write(tmp_path / "m", TO_CT)))
    source = volume(mr())
    padding = np.zeros(source.voxels.shape, np.bool_)
    padding[:, :, :4] = True
    air = source.voxels.copy()
    air[padding] = 20
    source.voxels[padding] = 30000
    made = predict(model, replace(source, padding=padding)).voxels
    without = predict(model, replace(source, voxels=air, padding=padding)).voxels
    assert (made[padding] == 30000).all()
    np.testing.assert_array_equal(made[~padding], without[~padding])


def test_a_residual_keeps_what_lies_beyond_the_percentiles(tmp_path: Path) -> None:
    nothing = replace(
        BACK,
        generator=GeneratorSpec("affine", {"scale": 0.0, "offset": 0.0}),
        output=replace(BACK.output, residual=True),
    )
    source = volume(mr())
    made = predict(load_model(read_package(write(tmp_path / "m", nothing))), source)
    np.testing.assert_array_equal(made.voxels, source.voxels)
    assert all(f.ok for f in assess(source, made, read_package(tmp_path / "m")))


def test_a_volume_without_contrast_is_refused_by_the_model(tmp_path: Path) -> None:
    model = load_model(read_package(write(tmp_path / "m", TO_CT)))
    flat = volume(mr())
    flat.voxels[:] = 100
    with pytest.raises(SeriesRefused) as caught:
        predict(model, flat)
    assert caught.value.code == "NO_CONTRAST"


def test_a_package_whose_golden_input_has_no_contrast_does_not_load(tmp_path: Path) -> None:
    path = write(tmp_path / "m", TO_CT)
    with np.load(path / "golden.npz") as arrays:
        flat = {name: arrays[name] for name in arrays.files}
    flat["source"] = np.zeros_like(flat["source"])
    np.savez(path / "golden.npz", **flat)
    reseal(path)
    with pytest.raises(PackageError, match="no foreground"):
        load_model(read_package(path))
