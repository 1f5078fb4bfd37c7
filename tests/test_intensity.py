"""Physical values and network values are each other's inverse, or the package is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dicomnode.errors import PackageError
from dicomnode.imaging.intensity import Unscaled, Window

CT = Window(-1024.0, 3071.0)


@given(arrays(np.float32, (4, 4), elements=st.floats(-1024, 3071, width=32)))
def test_inside_the_window_less_than_a_thousandth_of_a_hounsfield_is_lost(hu: np.ndarray) -> None:
    assert np.abs(CT.from_network(CT.to_network(hu)) - hu).max() < 1e-3


@given(arrays(np.float32, (4, 4), elements=st.floats(-1e6, 1e6, width=32)))
def test_networks_see_only_minus_one_to_one(hu: np.ndarray) -> None:
    assert np.abs(CT.to_network(hu)).max() <= 1


def test_every_stored_value_of_twelve_bits_comes_back() -> None:
    hu = np.arange(-1024, 3072, dtype=np.float32)
    np.testing.assert_array_equal(np.rint(CT.from_network(CT.to_network(hu))), hu)


def test_the_ends_of_the_window_are_minus_one_and_one() -> None:
    np.testing.assert_array_equal(
        CT.to_network(np.array([-1024, 3071], np.float32)), np.array([-1, 1], np.float32)
    )


def test_a_network_that_overshoots_is_not_clipped_silently() -> None:
    assert CT.from_network(np.array([1.1], np.float32))[0] > 3071


def test_float32_stays_float32() -> None:
    hu = np.zeros(3, np.float32)
    assert CT.to_network(hu).dtype == CT.from_network(hu).dtype == np.float32


def test_unscaled_values_pass_as_they_are() -> None:
    hu = np.array([-3024.0, 0.25, 30000.0], np.float32)
    np.testing.assert_array_equal(Unscaled().from_network(Unscaled().to_network(hu)), hu)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(PackageError, match="empty"):
        Window(100.0, 100.0)
