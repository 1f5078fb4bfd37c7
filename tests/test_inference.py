"""A loaded model has passed its self-test; a prediction lies on its source's grid."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dicomnode.errors import PackageError
from dicomnode.imaging.inference import Model, load_model, predict
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
    with pytest.raises(PackageError, match="cannot load on cpu"):
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
