"""The noise of a lower dose is what physics says it is: how much, where, and how it looks."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from dicomnode.imaging.projection import WATER_PER_MM, project, quantum_noise, reconstruct

SPACING_MM = 2.4
SIZE = 128
ROW, COLUMN = np.indices((SIZE, SIZE)) - (SIZE - 1) / 2


def body() -> NDArray[np.float32]:
    """A water cylinder of 240 mm across with a lung and a bone, (128, 128), float32, HU."""
    hu = np.where(np.hypot(ROW, COLUMN) < 50, 0.0, -1000.0)
    hu[np.hypot(ROW, COLUMN - 24) < 14] = -800
    hu[np.hypot(ROW, COLUMN + 27) < 6] = 800
    return hu.astype(np.float32)


def noise(before: float, after: float, seed: int = 0, **options: float) -> NDArray[np.float32]:
    hu = np.repeat(body()[None], 6, axis=0)
    rng = np.random.default_rng(seed)
    return quantum_noise(hu, SPACING_MM, before, after, rng, views=60, **options)


def spot(row: float, column: float, radius: float = 7) -> NDArray[np.bool_]:
    return np.asarray(np.hypot(ROW - row, COLUMN - column) < radius)


def test_reconstruction_gives_back_the_hounsfield_units_that_were_projected() -> None:
    sinogram = project(body()[None], SPACING_MM, views=180)
    hu = reconstruct(sinogram, SPACING_MM, (SIZE, SIZE))[0] / WATER_PER_MM * 1000 - 1000
    for expected, where in ((0, spot(30, 0)), (-800, spot(0, 24)), (800, spot(0, -27, 3))):
        assert hu[where].mean() == pytest.approx(expected, abs=4)


def test_a_line_through_the_middle_of_water_is_its_diameter_times_its_attenuation() -> None:
    disc = np.where(np.hypot(ROW, COLUMN) < 50, 0.0, -1000.0).astype(np.float32)
    sinogram = project(disc[None], SPACING_MM, views=12)
    middle = sinogram[0, :, sinogram.shape[2] // 2]
    np.testing.assert_allclose(middle, 100 * SPACING_MM * WATER_PER_MM, rtol=0.01)


def test_a_quarter_of_the_dose_has_four_times_the_variance() -> None:
    full, quarter = noise(math.inf, 4e5).var(), noise(math.inf, 1e5, seed=1).var()
    assert quarter / full == pytest.approx(4.0, rel=0.05)


def test_what_is_inserted_and_what_was_there_add_up_to_the_lower_dose() -> None:
    held, inserted = noise(math.inf, 4e5), noise(4e5, 1e5, seed=1)
    assert (held + inserted).var() == pytest.approx(noise(math.inf, 1e5, seed=2).var(), rel=0.05)


def test_the_same_dose_inserts_nothing() -> None:
    assert (noise(1e5, 1e5) == 0).all()


def test_noise_shifts_no_hounsfield_units() -> None:
    added = noise(math.inf, 1e5)
    for where in (spot(0, 24), spot(30, 0), spot(0, -27, 5), spot(0, 58, 5)):
        error = added[:, where].std() / math.sqrt(6 * where.sum() / 4)  # neighbours correlate
        assert abs(added[:, where].mean()) < 4 * error


def test_the_middle_of_a_body_is_noisier_than_its_rim() -> None:
    added = noise(math.inf, 1e5)
    assert added[:, spot(0, 0)].std() > 1.2 * added[:, spot(42, 0)].std()


def test_noise_is_correlated_between_neighbours_as_the_kernel_leaves_it() -> None:
    middle = noise(math.inf, 1e5, cutoff_per_mm=0.25)[:, 46:82, 46:82]
    lag_1 = (middle[..., 1:] * middle[..., :-1]).mean() / middle.var()
    assert 0.3 < lag_1 < 0.9


def test_a_sharper_kernel_gives_more_and_less_correlated_noise() -> None:
    soft, sharp = (noise(math.inf, 1e5, cutoff_per_mm=cutoff) for cutoff in (0.15, 0.4))
    assert sharp.std() > 1.3 * soft.std()
    neighbours = [(n[..., 1:] * n[..., :-1]).mean() / n.var() for n in (soft, sharp)]
    assert neighbours[0] > neighbours[1] + 0.1


def test_slices_have_independent_noise() -> None:
    added = noise(math.inf, 1e5)
    assert abs((added[0] * added[1]).mean() / added.var()) < 0.05


def test_the_detectors_own_noise_adds_to_the_quantum_noise() -> None:
    assert noise(math.inf, 1e4, electronic=30.0).std() > 1.05 * noise(math.inf, 1e4).std()


def test_the_same_seed_gives_the_same_bits() -> None:
    np.testing.assert_array_equal(noise(math.inf, 1e5, seed=7), noise(math.inf, 1e5, seed=7))
    assert (noise(math.inf, 1e5, seed=7) != noise(math.inf, 1e5, seed=8)).any()


@pytest.mark.parametrize(("before", "after"), [(1e4, 1e5), (math.inf, 0.0), (1e5, -1.0)])
def test_a_dose_that_is_not_lower_is_refused(before: float, after: float) -> None:
    with pytest.raises(ValueError, match="photons_after"):
        noise(before, after)
