"""A series becomes the same volume in whatever order and encoding it comes."""

import random
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from scipy.spatial.transform import Rotation

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.pixels import Encoding, encode, encoding_of, without_loss
from dicomnode.imaging.positions import stack_from_positions
from dicomnode.imaging.volume import volume_from_datasets
from tests.factories import (
    AXIAL,
    CORONAL,
    JPEG_TOOL,
    SAGITTAL,
    TILTED,
    changed,
    ct_series,
    enhanced,
    localizer,
    not_an_image,
    secondary_capture,
)
from tests.judges import require

REAL = Path(__file__).parents[1].parent / "shared" / "data" / "dicom"
POSITIONS = ("HFS", "HFP", "FFS", "FFP", "HFDL", "HFDR", "FFDL", "FFDR")
SYNTAXES = (
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
    JPEG2000Lossless,
)


def real_series(folder: str, count: int | None = None) -> list[Dataset]:
    """The first files of a real series; skips where the data is absent."""
    if not (REAL / folder).is_dir():
        pytest.skip(f"no real data at {REAL / folder}")
    return [dcmread(path) for path in sorted((REAL / folder).rglob("*.dcm"))[:count]]


def code_of(datasets: list[Dataset], **options: Any) -> str:
    """The code with which a series is refused."""
    with pytest.raises(SeriesRefused) as caught:
        volume_from_datasets(datasets, **options)
    assert caught.value.remedy
    return caught.value.code


@settings(max_examples=40, deadline=None)
@given(
    shuffle=st.randoms(use_true_random=False),
    orientation=st.sampled_from([AXIAL, CORONAL, SAGITTAL, TILTED, (-1.0, 0, 0, 0, -1.0, 0)]),
    patient_position=st.sampled_from(POSITIONS),
    reverse=st.booleans(),
)
def test_any_order_of_any_orientation_gives_the_same_volume(
    shuffle: random.Random, orientation: tuple[float, ...], patient_position: str, reverse: bool
) -> None:
    normal = np.cross(orientation[:3], orientation[3:])
    series = ct_series(
        5,
        8,
        9,
        orientation=orientation,
        patient_position=patient_position,
        travel=-normal if reverse else normal,
        # numbered against the stack, as scanners do
        InstanceNumber=1,
    )
    volume, ordered = volume_from_datasets(series)
    arrived = series.copy()
    shuffle.shuffle(arrived)
    again, ordered_again = volume_from_datasets(arrived)
    assert np.array_equal(again.voxels, volume.voxels)
    assert np.array_equal(again.positions, volume.positions)
    assert [ds.SOPInstanceUID for ds in ordered_again] == [ds.SOPInstanceUID for ds in ordered]
    assert np.all(np.diff(volume.positions @ normal) > 0)
    assert np.allclose(volume.spacing_mm, (2.5, 0.703125, 0.6), atol=1e-5)


@st.composite
def grids(draw: st.DrawFn) -> dict[str, Any]:
    """Any grid: plane, oblique by up to 40 degrees, spacing, origin, gantry tilt, direction."""
    axes = np.asarray(draw(st.sampled_from([AXIAL, CORONAL, SAGITTAL]))).reshape(2, 3)
    turn = Rotation.from_euler("xyz", draw(st.tuples(*[st.integers(-40, 40)] * 3)), degrees=True)
    axes = turn.apply(axes)
    normal = np.cross(axes[0], axes[1])
    tilt = np.tan(np.radians(draw(st.integers(-25, 25))))
    return {
        "orientation": tuple(axes.ravel()),
        "travel": draw(st.sampled_from([1, -1])) * (normal + tilt * axes[1]),
        "step_mm": draw(st.sampled_from([0.625, 1.25, 3.27, 5.0])),
        "pixel_spacing": draw(
            st.sampled_from([("0.7", "0.7"), ("0.9765625", "0.5"), ("3.27", "1")])
        ),
        "origin": draw(st.tuples(*[st.integers(-300, 300)] * 3)),
        "patient_position": draw(st.sampled_from(POSITIONS)),
    }


def _at(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the patient holds at points (..., 3), LPS mm: a plane wave in general direction."""
    return np.rint(2000 + 1500 * np.sin(points @ (0.013, 0.021, -0.017)))


def _points(positions: Any, orientation: Any, spacing: Any, shape: tuple[int, ...]) -> Any:
    """LPS mm of every voxel, (slices, rows, columns, 3), as PS3.3 C.7.6.2.1.1 has it."""
    across, down = np.asarray(orientation, float).reshape(2, 3)
    rows, columns = np.indices(shape[1:])
    step = rows[..., None] * (spacing[0] * down) + columns[..., None] * (spacing[1] * across)
    return np.asarray(positions)[:, None, None, :] + step


@settings(max_examples=60, deadline=None)
@given(grid=grids(), shuffle=st.randoms(use_true_random=False), multi_frame=st.booleans())
def test_every_voxel_of_any_grid_lies_where_the_patient_has_it(
    grid: dict[str, Any], shuffle: random.Random, multi_frame: bool
) -> None:
    blank = ct_series(4, 5, 6, **grid)
    positions = [[float(v) for v in ds.ImagePositionPatient] for ds in blank]
    spacing = [float(v) for v in blank[0].PixelSpacing]
    stored = _at(_points(positions, grid["orientation"], spacing, (4, 5, 6)))
    series = ct_series(4, 5, 6, stored=stored, intercept="0", **grid)
    shuffle.shuffle(series)
    volume, ordered = volume_from_datasets([enhanced(series)] if multi_frame else series)
    there = _points(volume.positions, volume.orientation, volume.spacing_mm[1:], (4, 5, 6))
    assert np.abs(volume.voxels - _at(there)).max() <= 1  # rounding at the edge of a step
    normal = np.cross(volume.orientation[:3], volume.orientation[3:])
    assert np.all(np.diff(volume.positions @ normal) > 0)
    assert abs(volume.spacing_mm[0] - grid["step_mm"]) < 1e-4
    aside = grid["travel"] - (grid["travel"] @ normal) * normal
    assert volume.sheared == (np.linalg.norm(aside) > 1e-3)
    assert len(ordered) == 4


def test_a_tilted_gantry_is_known_and_positions_are_kept() -> None:
    series = ct_series(4, orientation=TILTED, travel=(0, 0, 1))
    volume, ordered = volume_from_datasets(series)
    assert volume.sheared
    assert abs(volume.tilt_degrees - 18.5) < 0.01
    assert volume.positions.tolist() == [
        [float(v) for v in d.ImagePositionPatient] for d in ordered
    ]
    assert not volume_from_datasets(ct_series(4))[0].sheared


def test_spacing_comes_from_positions_whatever_headers_say() -> None:
    lies = {"SpacingBetweenSlices": "-10", "SliceThickness": "7", "SliceLocation": "0"}
    volume, _ = volume_from_datasets(changed(ct_series(4, step_mm=1.25), **lies))
    assert abs(volume.spacing_mm[0] - 1.25) < 1e-6


def test_each_slice_has_its_own_slope_and_intercept() -> None:
    series = ct_series(3, bits_stored=16, signed=True)
    stored = [ds.pixel_array for ds in series]
    scaled = [
        changed([ds], RescaleSlope=f"{0.5 + k}", RescaleIntercept=f"{-1000 - k}")[0]
        for k, ds in enumerate(series)
    ]
    volume, _ = volume_from_datasets(scaled)
    for k, plane in enumerate(volume.voxels):
        assert np.array_equal(plane, (stored[k] * (0.5 + k) - 1000 - k).astype(np.float32))


def test_monochrome1_changes_the_display_not_the_values() -> None:
    series = ct_series(3)
    plain, _ = volume_from_datasets(series)
    inverse, _ = volume_from_datasets(changed(series, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(plain.voxels, inverse.voxels)


def test_a_voxel_lies_where_its_instance_says() -> None:
    series = ct_series(3, 6, 7, orientation=CORONAL, seed=3)
    volume, ordered = volume_from_datasets(series[::-1])
    for index, ds in enumerate(ordered):
        assert np.array_equal(volume.positions[index], np.asarray(ds.ImagePositionPatient, float))
        assert np.array_equal(volume.voxels[index], ds.pixel_array * 1.0 - 1024)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
def test_every_lossless_transfer_syntax_gives_the_same_voxels_and_digests(syntax: UID) -> None:
    plain, _ = volume_from_datasets(ct_series(3))
    packed, _ = volume_from_datasets(ct_series(3, syntax=syntax))
    assert np.array_equal(plain.voxels, packed.voxels)
    assert plain.digests == packed.digests


def test_jpeg_lossless_of_signed_16_bit_gives_the_same_voxels() -> None:
    require(JPEG_TOOL)
    options: dict[str, Any] = {"signed": True, "bits_stored": 16, "padding": -2000}
    plain, _ = volume_from_datasets(ct_series(3, **options))
    packed, _ = volume_from_datasets(ct_series(3, **options, syntax=JPEGLosslessSV1))
    assert np.array_equal(plain.voxels, packed.voxels)
    assert plain.digests == packed.digests


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_a_truncated_frame_is_undecodable(syntax: UID) -> None:
    if syntax == JPEGLosslessSV1:
        require(JPEG_TOOL)
    series = ct_series(3, 64, 64, syntax=syntax)
    whole = get_frame(series[1].PixelData, 0, number_of_frames=1)
    series[1].PixelData = encapsulate([whole[: len(whole) // 2]])
    assert code_of(series) == "UNDECODABLE"


@pytest.mark.parametrize("broken", [0, 1, 4])
def test_an_undecodable_slice_is_left_out_at_an_end_and_refuses_the_stack_within(
    broken: int,
) -> None:
    series = ct_series(5, 64, 64, syntax=JPEG2000Lossless)
    whole = get_frame(series[broken].PixelData, 0, number_of_frames=1)
    series[broken].PixelData = encapsulate([whole[: len(whole) // 2]])
    if broken == 1:
        assert code_of(series) == "UNDECODABLE"
        return
    volume, ordered = volume_from_datasets(series[::-1])
    rest = [ds for ds in series if ds is not series[broken]]
    assert [ds.SOPInstanceUID for ds in ordered] == [ds.SOPInstanceUID for ds in rest]
    assert np.array_equal(volume.voxels, volume_from_datasets(rest)[0].voxels)
    assert len(volume.positions) == len(volume.digests) == 4
    assert [item.code for item in volume.left_out] == ["UNDECODABLE"]
    assert volume.left_out[0].sop_instance_uid == series[broken].SOPInstanceUID


def test_a_stack_with_many_broken_slices_is_refused() -> None:
    series = ct_series(9, syntax=JPEGLSLossless)
    for ds in series[:4]:
        ds.PixelData = encapsulate([b"broken"])
    assert code_of(series) == "UNDECODABLE"
    assert volume_from_datasets(series[1:])[0].voxels.shape[0] == 5


def test_a_stack_that_is_too_small_without_its_broken_slice_is_refused() -> None:
    series = ct_series(2, 64, 64, syntax=JPEGLSLossless)
    series[0].PixelData = encapsulate([b"broken"])
    assert code_of(series) == "SINGLE_SLICE"


@pytest.mark.parametrize("syntax", ["53", "55", "51"])
def test_a_syntax_without_decoder_is_undecodable_even_where_lossy_is_allowed(syntax: str) -> None:
    series = ct_series(3, LossyImageCompression="01")
    for ds in series:
        ds.PixelData = encapsulate([bytes(64)])
        ds["PixelData"].is_undefined_length = True
        ds.file_meta.TransferSyntaxUID = UID(f"1.2.840.10008.1.2.4.{syntax}")
    assert code_of(series) == "UNDECODABLE"
    assert code_of(series, allow_lossy=True) == "UNDECODABLE"


def test_padding_is_known_even_if_written_as_unsigned_beside_signed_pixels() -> None:
    series = ct_series(
        3, signed=True, bits_stored=16, intercept="0", padding=-2000, padding_vr="US"
    )
    volume, _ = volume_from_datasets(series)
    assert series[0]["PixelPaddingValue"].VR == "US"
    assert volume.padding is not None
    assert np.array_equal(volume.padding, volume.voxels == -2000)
    assert volume.padding[:, :2, :3].all()
    assert int(volume.padding.sum()) == 18


def test_a_series_without_padded_voxels_has_no_padding() -> None:
    assert volume_from_datasets(ct_series(3))[0].padding is None


def test_unused_bits_are_not_part_of_the_value() -> None:
    series = ct_series(2)
    plain, _ = volume_from_datasets(series)
    for ds in series:  # as old overlays in bit 12 to 15
        ds.PixelData = (ds.pixel_array | 0x5000).astype("<u2").tobytes()
    overlaid, _ = volume_from_datasets(series)
    assert np.array_equal(plain.voxels, overlaid.voxels)


@settings(max_examples=200, deadline=None)
@given(
    bits_stored=st.integers(8, 16),
    signed=st.booleans(),
    slope=st.sampled_from([1.0, 0.5, 0.25, 0.1, 2.0, 1.7, -1.0]) | st.floats(0.05, 8),
    intercept=st.sampled_from([-1024.0, 0.0, -8192.0, 1000.0]) | st.floats(-8192, 8192),
    data=st.data(),
)
def test_there_and_back_loses_at_most_half_a_quantum(
    bits_stored: int, signed: bool, slope: float, intercept: float, data: st.DataObject
) -> None:
    plain = Encoding(bits_stored, signed, slope, intercept)
    padding = data.draw(st.none() | st.integers(*plain.limits))
    pair = None if padding is None else (padding, padding)
    encoding = Encoding(bits_stored, signed, slope, intercept, pair)
    stored = np.asarray(data.draw(st.lists(st.integers(*plain.limits), min_size=4, max_size=4)))
    assert np.array_equal(encoding.to_stored(encoding.to_physical(stored)), stored)

    share = data.draw(st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4))
    ends = encoding.to_physical(np.asarray(plain.limits)).astype(np.float64)
    physical = (ends[0] + (ends[1] - ends[0]) * np.asarray(share)).astype(np.float32)
    written = encode(encoding, physical, None, 0)
    assert without_loss(encoding, physical, True)
    assert written.min() >= plain.limits[0]
    assert written.max() <= plain.limits[1]
    error = np.abs(written * np.float64(slope) + intercept - physical)
    moved = plain.to_stored(physical) == padding
    assert np.all(error <= abs(slope) * np.where(moved, 1.5, 0.5) * (1 + 1e-9))
    assert encoding.is_padding(written) is None


def test_values_beyond_the_stored_bits_do_not_fit() -> None:
    encoding = Encoding(12, False, 1.0, -1024.0)
    assert without_loss(encoding, np.float32([-1024.4, 3071.4]), True)
    assert not without_loss(encoding, np.float32([-1024.6]), True)
    assert not without_loss(encoding, np.float32([3071.6]), True)
    assert without_loss(encoding, np.float32([5000]), np.array([False]))


def test_a_gap_is_a_whole_multiple_of_the_median_step() -> None:
    stack = stack_from_positions([(0, 0, z) for z in (10, 0, 2.5, 5, 17.6, 20)], AXIAL)
    assert stack.order == (1, 2, 3, 0, 4, 5)
    assert stack.gaps == (2, 3)
    assert stack.missing == 3


@pytest.mark.parametrize(
    "steps", [[4.0] * 6 + [1.08] + [7.0] * 5, [3.19, 3.27, 3.29, 3.2], [1.0, 1.0, 1.5, 1.0], [5.0]]
)
def test_other_irregular_steps_are_not_gaps(steps: list[float]) -> None:
    positions = [(0.0, 0.0, z) for z in np.cumsum([0.0, *steps])]
    assert stack_from_positions(positions, AXIAL).gaps == ()


@given(
    st.integers(4, 30).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(1, n - 2), st.randoms(use_true_random=False))
    ),
    st.floats(0.3, 10),
    st.sampled_from([AXIAL, CORONAL, SAGITTAL, TILTED]),
)
def test_one_slice_missing_inside_is_always_found(
    case: tuple[int, int, random.Random], step: float, orientation: tuple[float, ...]
) -> None:
    count, missing, shuffle = case
    normal = np.cross(orientation[:3], orientation[3:])
    kept = [index for index in range(count) if index != missing]
    shuffle.shuffle(kept)
    stack = stack_from_positions([index * step * normal for index in kept], orientation)
    assert stack.gaps == (missing - 1,)
    assert stack.missing == 1
    assert [kept[index] for index in stack.order] == sorted(kept)


def test_what_is_no_slice_is_set_aside_and_the_rest_is_used() -> None:
    series = ct_series(4)
    extra = [localizer(series[0]), not_an_image(series[0]), secondary_capture(series[0])]
    plain, _ = volume_from_datasets(series)
    volume, ordered = volume_from_datasets([extra[0], *series, *extra[1:], series[2]])
    assert np.array_equal(volume.voxels, plain.voxels)
    assert [ds.SOPInstanceUID for ds in ordered] == [ds.SOPInstanceUID for ds in series]


def test_frames_replaced_in_every_slice_are_none_in_common() -> None:
    series = ct_series(3)
    for index, ds in enumerate(series):
        ds.FrameOfReferenceUID = f"1.2.{index}"
    assert volume_from_datasets(series)[0].frame_of_reference_uid == ""


def test_a_lossy_source_is_used_only_if_the_route_says_so() -> None:
    series = changed(ct_series(3), LossyImageCompression="01")
    assert code_of(series) == "LOSSY"
    assert volume_from_datasets(series, allow_lossy=True)[0].voxels.shape[0] == 3


@pytest.mark.parametrize(
    ("code", "attributes"),
    [
        ("NOT_CT", {"SOPClassUID": UID("1.2.840.10008.5.1.4.1.1.4")}),
        ("NOT_AN_IMAGE", {"PixelData": None}),
        ("NO_GEOMETRY", {"SOPClassUID": EnhancedCTImageStorage}),
        ("NOT_SINGLE_FRAME", {"NumberOfFrames": 2}),
        ("MOSAIC", {"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}),
        ("NOT_CT_MR_PET", {"SOPClassUID": SecondaryCaptureImageStorage}),
        ("LOCALIZER", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
        ("COLOUR", {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}),
        ("NOT_16_BIT", {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}),
        ("NOT_16_BIT", {"HighBit": 15}),
        ("BURNED_IN", {"BurnedInAnnotation": "YES"}),
        ("MULTI_ENERGY", {"MultienergyCTAcquisition": "YES"}),
        ("NOT_HU", {"RescaleType": "US"}),
        ("NOT_HU", {"RescaleSlope": "0"}),
        ("NOT_HU", {"RescaleSlope": None}),
        ("NO_GEOMETRY", {"ImageOrientationPatient": None}),
        ("NO_GEOMETRY", {"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]}),
        ("NO_GEOMETRY", {"ImagePositionPatient": None}),
        ("NO_GEOMETRY", {"PixelSpacing": ["0", "1"]}),
        ("DUPLICATE_POSITIONS", {"ImagePositionPatient": ["1", "2", "3"]}),
    ],
)
def test_a_series_of_this_kind_is_refused(code: str, attributes: dict[str, Any]) -> None:
    assert code_of(changed(ct_series(3), **attributes)) == code


@pytest.mark.parametrize(
    ("code", "attributes"),
    [
        ("MIXED_ORIENTATION", {"ImageOrientationPatient": ["0", "1", "0", "0", "0", "-1"]}),
        ("MIXED_MATRIX", {"PixelSpacing": ["0.8", "0.6"]}),
        ("MIXED_MATRIX", {"Rows": 16, "Columns": 80}),
        ("MIXED_FRAME", {"FrameOfReferenceUID": "1.2.3"}),
        ("MIXED_SERIES", {"StudyInstanceUID": "1.2.3"}),
        ("MIXED_SERIES", {"SeriesInstanceUID": None}),
        ("NO_GEOMETRY", {"SOPClassUID": EnhancedCTImageStorage}),
    ],
)
def test_one_slice_that_does_not_belong_refuses_the_series(
    code: str, attributes: dict[str, Any]
) -> None:
    series = ct_series(4)
    assert code_of([*series[:3], *changed(series[3:], **attributes)]) == code


def test_too_few_slices_are_refused() -> None:
    series = ct_series(3)
    assert code_of(series[:1]) == "SINGLE_SLICE"
    assert code_of(series, min_slices=4) == "TOO_FEW_SLICES"
    assert code_of([]) == "NOT_AN_IMAGE"
    assert volume_from_datasets(series[:1], min_slices=1)[0].voxels.shape[0] == 1


def test_a_missing_slice_is_refused_with_the_place() -> None:
    series = ct_series(6)
    with pytest.raises(SeriesRefused, match="first after slice 2 of 5") as caught:
        volume_from_datasets(series[:2] + series[3:])
    assert caught.value.code == "MISSING_SLICES"


def test_a_refusal_says_nothing_of_the_patient() -> None:
    series = ct_series(3, patient="SECRET-ID", BurnedInAnnotation="YES")
    with pytest.raises(SeriesRefused) as caught:
        volume_from_datasets(series)
    assert "SECRET" not in str(caught.value)
    assert "hler" not in str(caught.value)


def test_a_damaged_number_is_a_refusal_without_its_text() -> None:
    series = ct_series(3)
    buffer = BytesIO()
    series[1].save_as(buffer, enforce_file_format=True)
    series[1] = dcmread(BytesIO(buffer.getvalue().replace(b"0.703125", b"SECRET! ")))
    with pytest.raises(SeriesRefused) as caught:
        volume_from_datasets(series)
    assert caught.value.code == "NO_GEOMETRY"
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "shape", "step"),
    [
        ("ct/chest_contrast_LIDC-IDRI-0001_jpegls", (5, 512, 512), 2.5),
        ("ct/noncontrast_chest_RICORD-1A-001012_jpeglossless", (5, 512, 512), 1.25),
        ("ct/contrast_abdomen_GE_CRLM-CT-1004", (5, 512, 512), 5.0),
        ("ct/brain_gantry_tilt_18.5deg_GE", (5, 512, 512), 4.0019),
    ],
)
def test_a_real_ct_series_is_a_volume(
    folder: str, shape: tuple[int, int, int], step: float
) -> None:
    series = real_series(folder)
    positions = [[float(value) for value in ds.ImagePositionPatient] for ds in series]
    order = stack_from_positions(positions, [float(v) for v in series[0].ImageOrientationPatient])
    volume, ordered = volume_from_datasets([series[index] for index in order.order[:5]][::-1])
    assert volume.voxels.shape == shape
    assert abs(volume.spacing_mm[0] - step) < 1e-3
    assert order.gaps == ()
    for plane, ds in zip(volume.voxels, ordered, strict=True):
        hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        assert np.array_equal(plane, hu)


@pytest.mark.parametrize(
    ("folder", "code"),
    [
        ("odd/ct_inconsistent_slice_increment_GE", "MISSING_SLICES"),
        ("odd/ct_same_position_bolus_monitoring", "DUPLICATE_POSITIONS"),
        ("odd/enhanced_ct_supplemental_color", "COLOUR"),
        ("odd/enhanced_mr_Philips", "NOT_CT"),
        ("odd/mr_mixed_orientation_Philips", "NOT_CT"),
    ],
)
def test_a_real_odd_series_is_refused(folder: str, code: str) -> None:
    assert code_of(real_series(folder)) == code


def test_real_mixed_orientation_is_refused() -> None:
    series = real_series("odd/mr_mixed_orientation_Philips")
    one = [ds for ds in series if ds.SeriesInstanceUID == series[0].SeriesInstanceUID]
    assert code_of(one, unit="AU") == "MIXED_ORIENTATION"


def test_one_real_slice_in_every_lossless_syntax_has_one_digest() -> None:
    lossless = ("Endian", "Deflated", "2000LosslessOnly", "LSLossless", "Process14", "RLE")
    series = [
        ds
        for ds in real_series("codecs/one_ct_slice_all_syntaxes")
        if any(name in str(ds.filename) for name in lossless)
    ]
    assert len(series) == 9
    digests = {volume_from_datasets([ds], min_slices=1)[0].digests for ds in series}
    assert len(digests) == 1


def test_encodings_of_pydicoms_own_ct_files_are_read() -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests" / "98892001"
    series = [dcmread(path) for path in sorted((folder / "CT5N").iterdir())]
    volume, _ = volume_from_datasets(series)
    assert series[0].SOPClassUID == CTImageStorage
    assert volume.voxels.shape == (5, 16, 16)
    assert encoding_of(series[0]).slope == 1.0
