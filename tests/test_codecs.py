"""Every lossless transfer syntax gives the same values, as foreign decoders see them too."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.pixels import has_decoder, is_lossy, pixel_digest, stored_values
from dicomnode.imaging.volume import volume_from_datasets
from tests.factories import JPEG_TOOL, changed, ct_series, enhanced, write_series
from tests.judges import require

DECOMPRESS = {  # by DCMTK
    JPEGLossless: Path("/usr/bin/dcmdjpeg"),
    JPEGLosslessSV1: Path("/usr/bin/dcmdjpeg"),
    JPEGLSLossless: Path("/usr/bin/dcmdjpls"),
    RLELossless: Path("/usr/bin/dcmdrle"),
}
ENCODINGS = [(9, False), (10, False), (12, False), (12, True), (16, False), (16, True)]


def noise(bits: int, signed: bool) -> NDArray[np.int64]:
    """(2, 40, 36): every stored value is as likely, both limits occur."""
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    values = np.random.default_rng(bits).integers(low, high + 1, (2, 40, 36))
    values[:, 0, :2] = low, high
    return values


@pytest.mark.parametrize(("bits", "signed"), ENCODINGS)
@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1], ids=lambda s: s.name
)
def test_full_range_noise_survives_every_codec(syntax: UID, bits: int, signed: bool) -> None:
    if syntax == JPEGLosslessSV1:
        require(JPEG_TOOL)
    values = noise(bits, signed)
    series = ct_series(2, 40, 36, bits_stored=bits, signed=signed, stored=values, syntax=syntax)
    for ds, plane in zip(series, values, strict=True):
        assert ds.file_meta.TransferSyntaxUID == syntax
        assert np.array_equal(stored_values(ds), plane)


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless], ids=lambda s: s.name)
@pytest.mark.parametrize("has_table", [True, False])
def test_a_frame_in_several_fragments_is_one_image(syntax: UID, has_table: bool) -> None:
    plain = ct_series(3, 64, 64)
    series = ct_series(3, 64, 64, syntax=syntax)
    for ds in series:
        (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
        ds.PixelData = encapsulate([frame], fragments_per_frame=4, has_bot=has_table)
    a, b = volume_from_datasets(plain)[0], volume_from_datasets(series)[0]
    assert np.array_equal(a.voxels, b.voxels)


def test_frames_are_found_by_an_extended_offset_table() -> None:
    plain = ct_series(3)
    whole = enhanced(plain, syntax=JPEGLSLossless)
    frames = list(generate_frames(whole.PixelData, number_of_frames=3))
    whole.PixelData, offsets, lengths = encapsulate_extended(frames)
    whole.ExtendedOffsetTable, whole.ExtendedOffsetTableLengths = offsets, lengths
    a, b = volume_from_datasets(plain)[0], volume_from_datasets([whole])[0]
    assert np.array_equal(a.voxels, b.voxels)


@pytest.mark.parametrize(
    "syntax", [*DECOMPRESS, JPEG2000Lossless, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K]
)
def test_a_decoder_is_installed_for_every_syntax_that_is_promised(syntax: UID) -> None:
    assert get_decoder(syntax).is_available
    ds = ct_series(1)[0]
    ds.file_meta.TransferSyntaxUID = syntax
    assert has_decoder(ds)


def test_htj2k_is_lossy_unless_it_says_otherwise() -> None:
    ds = ct_series(1)[0]
    for syntax, lossy in ((HTJ2K, True), (HTJ2KLossless, False), (HTJ2KLosslessRPCL, False)):
        ds.file_meta.TransferSyntaxUID = syntax
        assert is_lossy(ds) is lossy


@pytest.mark.parametrize(
    "syntax", [JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1], ids=lambda s: s.name
)
def test_an_image_of_another_size_than_its_header_says_is_undecodable(syntax: UID) -> None:
    """With as many pixels it would decode, to a scrambled image."""
    if syntax == JPEGLosslessSV1:
        require(JPEG_TOOL)
    series = changed(ct_series(3, 32, 40, syntax=syntax), Rows=40, Columns=32)
    with pytest.raises(SeriesRefused) as caught:
        volume_from_datasets(series)
    assert caught.value.code == "UNDECODABLE"


def real_files(root: Path, pattern: str) -> list[Dataset]:
    found = [dcmread(path) for path in sorted((root / "codecs").glob(pattern))]
    assert found
    return found


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("mr_mosaic_9_syntaxes/*.dcm", 9),
        ("one_ct_slice_all_syntaxes/*.dcm", 10),
        ("nema_wg04/*/CT1_*.dcm", 4),
        ("nema_wg04/*/CT2_*.dcm", 4),
    ],
)
def test_one_real_image_in_every_lossless_syntax_is_one_image(
    real_dicom: Path, pattern: str, count: int
) -> None:
    lossless = [ds for ds in real_files(real_dicom, pattern) if not is_lossy(ds)]
    assert len(lossless) == count
    assert len({pixel_digest(stored_values(ds)) for ds in lossless}) == 1


@pytest.mark.parametrize("process", ["6_8", "10_12", "2_4"])
def test_real_images_without_decoder_are_undecodable(real_dicom: Path, process: str) -> None:
    (ds,) = real_files(real_dicom, f"one_ct_slice_all_syntaxes/CT_JPEGProcess{process}_*.dcm")
    for allow_lossy in (False, True):
        with pytest.raises(SeriesRefused) as caught:
            volume_from_datasets([ds], min_slices=1, allow_lossy=allow_lossy)
        assert caught.value.code == "UNDECODABLE"
        assert str(ds.SOPInstanceUID) in caught.value.message


@pytest.mark.parametrize("name", ["JPEG2000_1", "JPEGLSLossy"])
def test_a_real_lossy_image_is_used_only_where_allowed(real_dicom: Path, name: str) -> None:
    (ds,) = real_files(real_dicom, f"one_ct_slice_all_syntaxes/CT_{name}*.dcm")
    (plain,) = real_files(real_dicom, "one_ct_slice_all_syntaxes/CT_original.dcm")
    with pytest.raises(SeriesRefused) as caught:
        volume_from_datasets([ds], min_slices=1)
    assert caught.value.code == "LOSSY"
    volume, _ = volume_from_datasets([ds], min_slices=1, allow_lossy=True)
    whole, _ = volume_from_datasets([plain], min_slices=1)
    assert 0 < np.abs(volume.voxels - whole.voxels).mean() < 20


@pytest.mark.parametrize(
    "folder",
    [
        "ct/noncontrast_chest_RICORD-1A-001012_jpeglossless",
        "ct/chest_contrast_LIDC-IDRI-0001_jpegls",
        "odd/mr_encapsulated_fragments_jpeglossless",
        "odd/mr_encapsulated_fragments_jpeg2000lossless",
        "pet/fdg_wholebody_STS_001_GE_BQML",
    ],
)
def test_gdcm_reads_the_same_values_from_real_series(real_dicom: Path, folder: str) -> None:
    paths = sorted((real_dicom / folder).glob("*.dcm"))[:6]
    for path in paths:
        ds = dcmread(path)
        unit: Any = {"CT": "HU", "MR": "AU", "PT": "BQML"}[ds.Modality]
        volume, _ = volume_from_datasets([ds], unit, min_slices=1)
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.SetOutputPixelType(sitk.sitkFloat64)
        judged = sitk.GetArrayFromImage(reader.Execute())
        assert np.allclose(volume.voxels, judged, rtol=1e-6, atol=1e-3)


@pytest.mark.peers
@pytest.mark.parametrize("syntax", list(DECOMPRESS), ids=lambda s: s.name)
def test_dcmtk_decompresses_to_the_same_values(syntax: UID, tmp_path: Path) -> None:
    require(DECOMPRESS[syntax], JPEG_TOOL)
    made = JPEGLosslessSV1 if syntax == JPEGLossless else syntax
    series = ct_series(2, 64, 48, bits_stored=16, signed=True, padding=-2000, syntax=made)
    for path, ds in zip(write_series(series, tmp_path), series, strict=True):
        if syntax == JPEGLossless:
            subprocess.run([JPEG_TOOL, "+el", path, path], check=True, capture_output=True)
            ds = dcmread(path)
            assert ds.file_meta.TransferSyntaxUID == JPEGLossless
        plain = tmp_path / "plain.dcm"
        subprocess.run([DECOMPRESS[syntax], path, plain], check=True, capture_output=True)
        raw = np.frombuffer(dcmread(plain).PixelData, "<i2").reshape(64, 48)
        assert np.array_equal(stored_values(ds), raw)
