"""Derived UIDs: the same for the same input, no two alike for any other (derived.md 2.7, 6.7)."""

import re
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset

from dicomnode.derived import OutputOptions
from tests.factories import changed, ct_series, enhanced, mr_series
from tests.tasks import KINDS, package_for
from tests.test_derived import DENOISER, derive

SLICES = 5


def uids(datasets: list[Dataset], **options: Any) -> set[str]:
    """Series and SOP Instance UIDs of what is derived."""
    derived = derive(datasets, **options)[2]
    return {str(uid) for ds in derived for uid in (ds.SeriesInstanceUID, ds.SOPInstanceUID)}


def test_the_same_input_twice_and_in_any_order_gives_the_same_uids() -> None:
    first = uids(ct_series(SLICES))
    assert len(first) == SLICES + 1
    assert uids(ct_series(SLICES)) == first
    assert uids(ct_series(SLICES)[::-1]) == first


@pytest.mark.parametrize(
    "options",
    [
        {"identity": replace(DENOISER, digest="cd" * 32)},  # other weights, version or manifest
        {"options": OutputOptions(series_number=77)},
        {"options": OutputOptions(description="{source} [SYN other]")},
        {"options": OutputOptions(generation=1)},
    ],
    ids=["package", "series number", "description", "generation"],
)
def test_another_package_option_or_generation_shares_no_uid(options: dict[str, Any]) -> None:
    assert not uids(ct_series(SLICES)) & uids(ct_series(SLICES), **options)


def one_less(series: list[Dataset]) -> list[Dataset]:
    return series[:-1]


def one_pixel(series: list[Dataset]) -> list[Dataset]:
    pixels = series[2].pixel_array.copy()
    pixels[3, 3] += 1
    return [*series[:2], *changed([series[2]], PixelData=pixels.tobytes()), *series[3:]]


@pytest.mark.parametrize("change", [one_less, one_pixel])
def test_another_set_of_images_shares_no_uid(
    change: Callable[[list[Dataset]], list[Dataset]],
) -> None:
    assert not uids(ct_series(SLICES)) & uids(change(ct_series(SLICES)))


def test_a_package_of_another_version_or_with_other_weights_has_another_digest(
    tmp_path: Path,
) -> None:
    kind = KINDS["denoise"]
    packages = [
        package_for(kind, tmp_path / "a"),
        package_for(kind, tmp_path / "b", version="1.0.1"),
        package_for(replace(kind, offset=3.4), tmp_path / "c"),
    ]
    assert len({package.digest for package in packages}) == 3
    assert package_for(kind, tmp_path / "d").digest == packages[0].digest


def test_every_uid_is_a_version_5_uuid_of_at_most_44_characters() -> None:
    for uid in uids(ct_series(SLICES)) | uids(ct_series(2, seed=9)):
        assert re.fullmatch(r"2\.25\.[1-9][0-9]{0,38}", uid)
        assert len(uid) <= 44
        assert uuid.UUID(int=int(uid[5:])).version == 5


def test_the_frames_of_one_enhanced_instance_get_uids_of_their_own() -> None:
    source = enhanced(mr_series(SLICES))
    identity = replace(DENOISER, task="syn_ct")
    first = uids([source], identity=identity, unit="AU", to="HU")
    assert len(first) == SLICES + 1
    assert uids([source], identity=identity, unit="AU", to="HU") == first
