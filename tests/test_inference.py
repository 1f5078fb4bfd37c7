"""A loaded model has passed its self-test; a prediction lies on its source's grid."""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dicomnode.errors import PackageError
from dicomnode.imaging.grid import Regrid
from dicomnode.imaging.inference import Model, load_model, predict
from dicomnode.imaging.manifest import GeneratorSpec, Manifest, Padding, Range, Tiling
from dicomnode.imaging.package import FILES, read_package
from dicomnode.imaging.volume import Volume
from tests.peers import identity_package
from tests.test_package import DENOISER, reseal, write


def volume(slices: int = 4, rows: int = 65, columns: int = 70, unit: str = "HU") -> Volume:
    rng = np.random.default_rng(5)
    return Volume(
        rng.normal(40, 60, (slices, rows, columns)).astype(np.float32),
        unit,  # type: ignore[arg-type]
        np.array([[0.0, 0.0, 2.5 * i] for i in range(slices)]),
        np.array([1.0, 0, 0, 0, 1, 0]),
        (2.5, 0.7, 0.7),
        "",
        None,
    )


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(read_package(write(tmp_path_factory.mktemp("models") / "m")))


def test_a_prediction_keeps_the_grid_and_changes_the_voxels(denoiser: Model) -> None:
    source = volume()
    prediction = predict(denoiser, source)
    assert prediction.voxels.shape == source.voxels.shape
    assert prediction.spacing_mm == source.spacing_mm
    np.testing.assert_array_equal(prediction.positions, source.positions)
    assert prediction.unit == "HU"
    assert np.abs(prediction.voxels - source.voxels).mean() > 0.1


def test_the_identity_returns_every_value_exactly(tmp_path: Path) -> None:
    model = load_model(read_package(identity_package(tmp_path)))
    source = volume()
    source.voxels[0, 0, :3] = [-8192.0, 0.1, 32767.0]
    np.testing.assert_array_equal(predict(model, source).voxels, source.voxels)


def test_slice_order_does_not_change_a_bit(denoiser: Model) -> None:
    source = volume()
    order = [2, 0, 3, 1]
    shuffled = source.with_voxels(source.voxels[order], "HU")
    np.testing.assert_array_equal(
        predict(denoiser, shuffled).voxels, predict(denoiser, source).voxels[order]
    )


def test_one_thread_or_two_and_a_second_time_give_the_same_bits(denoiser: Model) -> None:
    source, threads = volume(), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(predict(denoiser, source).voxels)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[1], results[2])


def test_padding_voxels_come_back_as_they_were(denoiser: Model) -> None:
    source = volume()
    padding = np.zeros(source.voxels.shape, np.bool_)
    padding[:, :10] = True
    source.voxels[padding] = -3024
    padded = replace(source, padding=padding)
    assert (predict(denoiser, padded).voxels[padding] == -3024).all()


def test_a_volume_in_another_unit_is_refused(denoiser: Model) -> None:
    with pytest.raises(PackageError, match="takes HU, got BQML"):
        predict(denoiser, volume(unit="BQML"))


def test_a_failed_self_test_stops_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    with np.load(path / "golden.npz") as arrays:
        wrong = {name: arrays[name] for name in arrays.files}
    wrong["result"] = wrong["result"] + np.float32(0.2)
    np.savez(path / "golden.npz", **wrong)
    reseal(path)
    with pytest.raises(PackageError, match=r"self-test on cpu differs by 0\.2"):
        load_model(read_package(path))


def test_a_result_that_is_not_a_number_fails_the_self_test(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    with np.load(path / "golden.npz") as arrays:
        wrong = {name: arrays[name] for name in arrays.files}
    wrong["source"][0, 0, 0] = np.nan
    np.savez(path / "golden.npz", **wrong)
    reseal(path)
    with pytest.raises(PackageError, match="self-test"):
        load_model(read_package(path))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    small = write(tmp_path / "small")
    other = replace(DENOISER.generator, options={"width": 4, "blocks": 1})
    large = write(tmp_path / "large", replace(DENOISER, generator=other))
    (small / "weights.safetensors").write_bytes((large / "weights.safetensors").read_bytes())
    reseal(small)
    with pytest.raises(PackageError, match="size mismatch"):
        load_model(read_package(small))


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    (path / "weights.safetensors").write_bytes(b"\x80\x04pickle")
    reseal(path)
    with pytest.raises(PackageError, match="not a file of weights"):
        load_model(read_package(path))


def test_a_device_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="cannot load on nowhere"):
        load_model(read_package(write(tmp_path / "m")), device="nowhere")


def test_a_prediction_is_reproducible_from_the_package_alone(tmp_path: Path) -> None:
    sums = []
    for name in ("a", "b"):
        model = load_model(read_package(write(tmp_path / name)))
        sums.append(hashlib.sha256(predict(model, volume()).voxels.tobytes()).hexdigest())
    assert sums[0] == sums[1]
    assert set(FILES) < {p.name for p in (tmp_path / "a").iterdir()}


def test_weights_in_another_number_format_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    state = load_file(path / "weights.safetensors")
    save_file({key: value.half() for key, value in state.items()}, path / "weights.safetensors")
    reseal(path)
    with pytest.raises(PackageError, match="weights must be float32"):
        load_model(read_package(path))


INSTANCE = replace(
    DENOISER,
    name="instance",
    generator=GeneratorSpec("resnet", {"width": 4, "blocks": 1, "head": "linear"}),
    input=replace(
        DENOISER.input,
        matrix=Range(64, 64),
        field_of_view_mm=Range(40.0, 50.0),
        padding=Padding("reflect", 4),
    ),
    normalisation="instance",
    tiling=Tiling(),
)
"""A model that looks at the statistics of a slice: 64 x 64 pixels of 40 to 50 mm."""


def _loaded(path: Path, manifest: Manifest, grid: str | None = None) -> Model:
    spec = replace(manifest.input, grid=grid)
    return load_model(read_package(write(path, replace(manifest, input=spec))))


def _smooth(rows: int, columns: int, row_mm: float, column_mm: float) -> Volume:
    """Two slices of slow waves, given by place in mm from the centre, whatever the pixels."""
    down = (np.arange(rows) - (rows - 1) / 2) * row_mm
    right = (np.arange(columns) - (columns - 1) / 2) * column_mm
    plane = 100 * np.cos(down / 9)[:, None] * np.cos(right / 11)[None]
    voxels = np.stack([plane, plane + 20]).astype(np.float32)
    source = volume(2, rows, columns)
    return replace(source, voxels=voxels, spacing_mm=(2.5, row_mm, column_mm))


def test_a_model_with_statistics_takes_its_own_grid(tmp_path: Path) -> None:
    model = _loaded(tmp_path / "m", INSTANCE)
    assert predict(model, _smooth(64, 64, 0.7, 0.7)).voxels.shape == (2, 64, 64)


@pytest.mark.parametrize(
    ("rows", "columns", "spacing"), [(80, 80, 0.5625), (64, 64, 0.9), (64, 60, 0.7), (64, 64, 0.5)]
)
def test_a_model_with_statistics_refuses_another_grid(
    tmp_path: Path, rows: int, columns: int, spacing: float
) -> None:
    model = _loaded(tmp_path / "m", INSTANCE)
    with pytest.raises(PackageError, match="takes slices of 64 to 64 pixels, 40 to 50 mm a side"):
        predict(model, _smooth(rows, columns, spacing, spacing))


def test_another_grid_is_resampled_to_the_trained_one_and_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = _loaded(tmp_path / "m", INSTANCE, "resample")
    own, fine = _smooth(64, 64, 0.7, 0.7), _smooth(128, 128, 0.35, 0.35)
    with caplog.at_level(logging.INFO):
        result = predict(model, fine)
    assert "resampled from 128 x 128 of 0.35 x 0.35 mm to 64 x 64 of 0.7 mm and back" in caplog.text
    regrid = Regrid(128, 128, (0.35, 0.35), 64, 0.7)
    trained = own.with_voxels(regrid.there(fine.voxels), "HU")
    change = predict(model, trained).voxels - trained.voxels
    np.testing.assert_array_equal(result.voxels, fine.voxels + regrid.back(change))
    assert np.abs(change).mean() > 1


def test_what_a_residual_model_leaves_alone_is_kept_to_the_bit_when_resampled() -> None:
    source = volume(2, 60, 90).voxels
    regrid = Regrid(60, 90, (0.7, 0.5), 64, 0.72)
    np.testing.assert_array_equal(regrid.run(source, lambda v: v, residual=True), source)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 128), (50, 80), (33, 127)])
def test_resampling_keeps_every_place_where_it_is(rows: int, columns: int) -> None:
    row_mm, column_mm = 44.8 / rows, 40.0 / columns
    source = _smooth(rows, columns, row_mm, column_mm)
    there = Regrid(rows, columns, (row_mm, column_mm), 64, 0.7).there(source.voxels)
    expected = _smooth(64, 64, 0.7, 0.7).voxels
    inner = (slice(None), slice(6, -6), slice(6, -6))
    np.testing.assert_allclose(there[inner], expected[inner], atol=1.0)


def test_around_a_smaller_field_of_view_lies_air() -> None:
    source = _smooth(32, 32, 0.7, 0.7).voxels
    there = Regrid(32, 32, (0.7, 0.7), 64, 0.7).there(source)
    np.testing.assert_allclose(there[:, 16:48, 16:48], source, atol=1e-4)
    assert (there[:, :16] == source.min()).all()


def test_a_field_of_view_that_would_be_cut_off_is_refused(tmp_path: Path) -> None:
    model = _loaded(tmp_path / "m", INSTANCE, "resample")
    with pytest.raises(PackageError, match="at most 50 mm of field of view"):
        predict(model, _smooth(64, 64, 0.9, 0.9))


def test_a_model_of_three_slices_sees_its_neighbours_alone(tmp_path: Path) -> None:
    options = {"width": 8, "blocks": 1, "slices": 3}
    manifest = replace(
        DENOISER,
        generator=GeneratorSpec("unshuffle_resnet", options),
        input=replace(DENOISER.input, slices=3, padding=Padding("reflect", 4)),
        tiling=Tiling(),
    )
    model = load_model(read_package(write(tmp_path / "m", manifest)))
    source = volume(7)
    before = predict(model, source).voxels
    source.voxels[6] += 300
    after = predict(model, source).voxels
    changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False] * 5 + [True] * 2


def test_a_slice_larger_than_a_tile_comes_out_as_if_it_were_whole(tmp_path: Path) -> None:
    cut = replace(DENOISER, tiling=Tiling(True, 24, side=256))
    tiled = load_model(read_package(write(tmp_path / "tiled", cut)))
    whole = load_model(read_package(write(tmp_path / "whole")))
    source = volume(2, 300, 270)
    np.testing.assert_array_equal(predict(tiled, source).voxels, predict(whole, source).voxels)
