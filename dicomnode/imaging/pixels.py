"""One instance's stored pixel values, and the physical values they stand for."""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    CTImageStorage,
    EnhancedCTImageStorage,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
    PositronEmissionTomographyImageStorage,
)

from dicomnode.errors import SeriesRefused

_ALWAYS_LOSSY = {JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless}
_PERHAPS_LOSSY = {JPEG2000, HTJ2K}  # lossless only if LossyImageCompression says so

_STRICT_PLUGIN = {  # others, if installed, give an image for a truncated frame, silently
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
}


_LARGEST_VALUE = 1e30  # far from what float32 can hold, and from anything physical
_START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # ISO 10918-1, 14495-1
_CT = {CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage}
_NEEDED = {  # type 1 there (PS3.3 C.8.2.1, C.8.9.4): without, nobody knows what values stand for
    **dict.fromkeys(_CT, ("RescaleSlope", "RescaleIntercept")),
    PositronEmissionTomographyImageStorage: ("RescaleSlope",),
}
_NEEDED_TO_DECODE = ("SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation")


@dataclass(frozen=True, slots=True)
class Encoding:
    """How an instance stores values: ``value = slope * stored + intercept`` (PS3.3 C.11.1).

    Attributes:
        bits_stored: 1 to 16, of 16 allocated.
        signed: PixelRepresentation 1.
        slope, intercept: RescaleSlope and RescaleIntercept.
        padding: lowest and highest stored value that means "no image here" (PS3.3 C.7.5.1.1.2).
    """

    bits_stored: int
    signed: bool
    slope: float
    intercept: float
    padding: tuple[int, int] | None = None

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest stored value that fits."""
        if self.signed:
            return -(1 << (self.bits_stored - 1)), (1 << (self.bits_stored - 1)) - 1
        return 0, (1 << self.bits_stored) - 1

    def to_physical(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Stored integers as physical values, float32, same shape."""
        return (stored * np.float64(self.slope) + self.intercept).astype(np.float32)

    def to_stored(self, physical: NDArray[np.float32]) -> NDArray[np.float64]:
        """The nearest whole stored values, float64, same shape; they may lie outside `limits`."""
        return np.rint((physical.astype(np.float64) - self.intercept) / self.slope)

    def is_padding(self, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
        """True where `stored` is padding, same shape; None if nothing is."""
        if self.padding is None:
            return None
        mask: NDArray[np.bool_] = (stored >= self.padding[0]) & (stored <= self.padding[1])
        return mask if mask.any() else None


SIGNED_16 = Encoding(16, True, 1.0, 0.0)
"""What is written when values do not fit the source's encoding: whole HU."""


def without_loss(encoding: Encoding, physical: NDArray[np.float32], native: Any) -> bool:
    """Whether values fit an encoding to half a rescale quantum.

    Args:
        physical: (rows, columns), float32, in the unit the encoding is for.
        native: (rows, columns), bool: where `physical` counts; or True for everywhere.
    """
    stored = encoding.to_stored(physical)
    low, high = encoding.limits
    if encoding.padding is not None:
        first, last = encoding.padding
        if first != last and np.any((stored >= first) & (stored <= last) & native):
            return False
        low, high = (low + (first == low), high - (last == high))
    return bool(np.all(((stored >= low) & (stored <= high)) | np.logical_not(native)))


def encode(
    encoding: Encoding,
    physical: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    padded: NDArray[Any] | int,
) -> NDArray[Any]:
    """Stored values, (rows, columns), int16 or uint16, of values that fit the encoding.

    Args:
        physical: (rows, columns), float32, in the unit the encoding is for.
        mask: (rows, columns), bool: True where padding belongs; None: nowhere.
        padded: the stored value, or values (rows, columns), to put there.

    A native value that would be stored as padding is moved by one to the side it is nearer to,
    since no native pixel may equal the padding value (PS3.3 C.7.5.1.1.2).
    """
    stored = encoding.to_stored(physical)
    if encoding.padding is not None:
        clash = encoding.is_padding(stored)
        if clash is not None:
            exact = (physical.astype(np.float64) - encoding.intercept) / encoding.slope
            first, last = encoding.padding
            low, high = encoding.limits
            up = ((exact >= stored) & (last < high)) | (first == low)
            stored[clash] = np.where(up, last + 1, first - 1)[clash]
    if mask is not None:
        stored[mask] = np.broadcast_to(padded, stored.shape)[mask]
    return stored.astype(np.int16 if encoding.signed else np.uint16)


def encoding_of(dataset: Dataset) -> Encoding:
    """The encoding of an instance that has pixel data.

    Raises:
        SeriesRefused: NOT_16_BIT: it has none; and as `declared_encoding` does.
    """
    if "PixelData" not in dataset:
        raise refused("NOT_16_BIT", dataset, "has no integer pixel data", "send the original")
    return declared_encoding(dataset)


def declared_encoding(header: Dataset) -> Encoding:
    """The encoding that a header declares.

    PixelPaddingValue is read by its bits, since real files carry it as US beside signed pixels.

    Raises:
        SeriesRefused: NOT_16_BIT; NOT_HU (CT without usable rescale, or to something else than HU);
            NO_RESCALE (MR or PET with a rescale that cannot be used, PET without one).
    """
    bits_stored, high_bit = header.get("BitsStored"), header.get("HighBit")
    if not isinstance(bits_stored, int):
        raise refused("NOT_16_BIT", header, "BitsStored is missing or wrong", "mend it")
    if header.get("BitsAllocated") != 16 or not 1 <= bits_stored <= 16:
        raise refused("NOT_16_BIT", header, "stores no 16-bit integers", "send the original")
    if high_bit != bits_stored - 1:
        raise refused("NOT_16_BIT", header, "HighBit is not BitsStored - 1", "send the original")
    signed = header.get("PixelRepresentation") == 1
    slope, intercept = _rescale(header)
    encoding = Encoding(bits_stored, signed, slope, intercept)
    padding = _padding(header, encoding)
    return Encoding(bits_stored, signed, slope, intercept, padding)


def _rescale(dataset: Dataset) -> tuple[float, float]:
    is_ct = dataset.get("SOPClassUID") in _CT
    code, remedy = ("NOT_HU", "send the CT image in HU") if is_ct else ("NO_RESCALE", "mend it")
    if is_ct and (dataset.get("RescaleType") or "HU") != "HU":
        raise refused(code, dataset, "RescaleType is not HU", remedy)
    if "ModalityLUTSequence" in dataset:
        raise refused(code, dataset, "has a Modality LUT instead of a rescale", remedy)
    for keyword in _NEEDED.get(dataset.get("SOPClassUID"), ()):
        if is_empty(dataset, keyword):
            raise refused(code, dataset, f"no {keyword}", remedy)
    slope = numbers_of(dataset, "RescaleSlope", 1, code, default=(1.0,))[0]
    intercept = numbers_of(dataset, "RescaleIntercept", 1, code, default=(0.0,))[0]
    if slope == 0:
        raise refused(code, dataset, "RescaleSlope is 0", remedy)
    if abs(slope) * 0x10000 + abs(intercept) > _LARGEST_VALUE:
        raise refused(code, dataset, "RescaleSlope or RescaleIntercept is too large", remedy)
    return slope, intercept


def _padding(dataset: Dataset, encoding: Encoding) -> tuple[int, int] | None:
    ends = []
    value = dataset.get("PixelPaddingValue")
    for end in (value, dataset.get("PixelPaddingRangeLimit", value)):
        if not isinstance(end, int):
            return None
        bits = end & 0xFFFF
        ends.append(bits - 0x10000 if encoding.signed and bits & 0x8000 else bits)
    low, high = encoding.limits
    return (min(ends), max(ends)) if low <= min(ends) and max(ends) <= high else None


def stored_values(dataset: Dataset) -> NDArray[Any]:
    """Decoded stored pixel values, (rows, columns), int16 or uint16; pydicom clears unused bits.

    Every lossless transfer syntax of the same image gives the same values.

    Raises:
        SeriesRefused: UNDECODABLE.
    """
    size = (dataset.Rows, dataset.Columns)
    for keyword in _NEEDED_TO_DECODE:
        if is_empty(dataset, keyword):
            raise refused("UNDECODABLE", dataset, f"{keyword} is missing", "mend it at the source")
    try:
        if dataset.file_meta.TransferSyntaxUID.is_encapsulated:  # decoders allocate what it says
            coded = _coded_size(get_frame(dataset.PixelData, 0, number_of_frames=1))
            if coded is not None and coded != size:
                what = f"holds an image of {coded}"
                raise refused("UNDECODABLE", dataset, what, "send it again")
        plugin = _STRICT_PLUGIN.get(dataset.file_meta.TransferSyntaxUID, "")
        stored = pixel_array(dataset, raw=True, decoding_plugin=plugin)
    except SeriesRefused:
        raise
    except Exception as error:  # decoders of four libraries, each with errors of its own
        raise refused(
            "UNDECODABLE", dataset, f"pixel data: {type(error).__name__}", "send it again"
        ) from error
    if stored.shape != size or stored.dtype.itemsize != 2:
        raise refused("UNDECODABLE", dataset, f"decodes to {stored.shape}", "send it again")
    return stored


def _coded_size(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 code stream says it has; None: unknown.

    Decoders are told only the number of pixels: they give a scrambled image if rows and columns
    are swapped.
    """
    if frame[:4] == b"\xff\x4f\xff\x51" and len(frame) >= 24:  # SOC, SIZ (ISO 15444-1 A.5.1)
        right, bottom, left, top = (
            int.from_bytes(frame[at : at + 4], "big") for at in (8, 12, 16, 20)
        )
        return bottom - top, right - left
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if marker in _START_OF_FRAME:
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(
                frame[at + 7 : at + 9], "big"
            )
        at += 1 if marker == 0xFF else 2 + length
    return None


def has_decoder(dataset: Dataset) -> bool:
    """Whether an instance's transfer syntax can be decoded at all, told without its pixels.

    JPEG with progressive or spectral selection (.53, .55) has no decoder, JPEG Extended (.51) only
    for 8 bits.
    """
    syntax = dataset.file_meta.TransferSyntaxUID if hasattr(dataset, "file_meta") else None
    if syntax is None:
        return False
    if not syntax.is_encapsulated:
        return True
    if syntax == JPEGExtended12Bit and dataset.get("BitsAllocated") != 8:
        return False
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def pixel_digest(stored: NDArray[Any]) -> str:
    """The sha256 (hex) of stored values, (rows, columns), as little-endian integers."""
    little = np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()


def is_lossy(dataset: Dataset) -> bool:
    """Whether an instance has, or may have, gone through lossy compression.

    LossyImageCompression is 00 or 01; what says something else, or only how it was compressed, has.
    """
    syntax = dataset.file_meta.TransferSyntaxUID if hasattr(dataset, "file_meta") else None
    declared = dataset.get("LossyImageCompression")
    how = any(dataset.get(f"LossyImageCompression{word}") for word in ("Ratio", "Method"))
    return (
        (declared or ("01" if how else "00")) != "00"
        or syntax in _ALWAYS_LOSSY
        or (syntax in _PERHAPS_LOSSY and declared != "00")
    )


def is_empty(dataset: Dataset, keyword: str) -> bool:
    """Whether an attribute is absent or has no value, whatever its value may be."""
    return keyword not in dataset or dataset.get_item(keyword).value in (None, "", b"")


def numbers_of(
    dataset: Dataset,
    keyword: str,
    count: int,
    code: str,
    default: tuple[float, ...] | None = None,
) -> tuple[float, ...]:
    """`count` finite numbers of an attribute, or a refusal that does not repeat its value."""
    try:
        value = dataset.get(keyword)
        if value is None and default is not None:
            return default
        numbers = tuple(float(number) for number in np.ravel(value))
    except (TypeError, ValueError, OverflowError) as error:
        raise refused(code, dataset, f"{keyword} is no number", "send it again") from error
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise refused(code, dataset, f"{keyword} is missing or wrong", "send it again")
    return numbers


def refused(code: str, dataset: Dataset, what: str, remedy: str) -> SeriesRefused:
    return SeriesRefused(code, f"instance {dataset.get('SOPInstanceUID')}: {what}", remedy)
