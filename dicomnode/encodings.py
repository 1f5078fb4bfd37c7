"""How the values of a derived series are stored: stored integers, rescale, padding and window.

Each rule keeps a prediction to half a rescale quantum, or refuses it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.valuerep import format_number_as_ds

from dicomnode.attributes import copy_attributes
from dicomnode.errors import SeriesRefused
from dicomnode.imaging.pixels import SIGNED_16, Encoding, encode, encoding_of, without_loss
from dicomnode.imaging.units import calibrate
from dicomnode.imaging.volume import Volume

_HEAD = ("", "BRAIN", "HEAD", "SKULL")
"""BodyPartExamined of a head; what does not say is taken for one."""
_HEAD_WINDOW = ("40", "80", "BRAIN")
_BODY_WINDOW = ("40", "400", "SOFT TISSUE")
_AIR_HU = -1000.0
"""What stands in a CT made of MR where the MR has padding."""
_BELOW_ZERO = 0.01
"""How far, as a part of the largest value, a quantity that is never negative may undershoot."""
_WINDOW_SUV = 7.0
_PET_LARGEST = 32767
"""Stored value of the largest activity: the same whether a reader takes it as signed or not."""


@dataclass(frozen=True)
class Storage:
    """How every slice of one derived series is stored.

    Attributes:
        voxels: (slices, rows, columns), float32, in the unit of `encodings`.
        padding: (slices, rows, columns), bool: where the source has padding; None: nowhere.
        outside: what stands there if `encodings` have no single padding value for it: one number,
            or (slices, rows, columns), float32.
        encodings: one per slice.
        rescale: RescaleSlope and RescaleIntercept; "source": as the source writes them; None: the
            IOD has no Modality LUT.
        window: centre, width, name; None: the source's first.
        label: (rows, columns), bool: where a label is burned in, as bright as the brightest voxel
            of the series; their values are lost. None: nowhere.
    """

    voxels: NDArray[np.float32]
    padding: NDArray[np.bool_] | None
    outside: NDArray[np.float32] | float
    encodings: Sequence[Encoding]
    rescale: tuple[str, str] | Literal["source"] | None
    window: tuple[str, str, str] | None
    label: NDArray[np.bool_] | None = None

    def plane(self, index: int) -> NDArray[Any]:
        """Stored values of one slice, (rows, columns), int16 or uint16."""
        stored = self._without_label(index)
        if self.label is not None:
            bright = np.full((1, 1), self.brightest, np.float32)
            stored[self.label] = encode(self.encodings[index], bright, None, 0)[0, 0]
        return stored

    @cached_property
    def brightest(self) -> float:
        """The largest value of the series, padding aside."""
        native = True if self.padding is None else ~self.padding
        return float(self.voxels.max(initial=float(self.voxels.min()), where=native))

    def _without_label(self, index: int) -> NDArray[Any]:
        encoding = self.encodings[index]
        if self.padding is None:
            return encode(encoding, self.voxels[index], None, 0)
        padded: NDArray[Any] | int
        if encoding.padding is not None and encoding.padding[0] == encoding.padding[1]:
            padded = encoding.padding[0]
        else:
            outside = self.outside if isinstance(self.outside, float) else self.outside[index]
            padded = encoding.to_stored(np.asarray(outside, np.float32))
        return encode(encoding, self.voxels[index], self.padding[index], padded)

    def describe(self, derived: Dataset, source: Dataset, index: int) -> None:
        """Write one slice and what a reader must know of it (PS3.3 C.7.6.3, C.11.1, C.11.2)."""
        encoding, stored = self.encodings[index], self.plane(index)
        derived.Rows, derived.Columns = stored.shape
        derived.BitsStored, derived.HighBit = encoding.bits_stored, encoding.bits_stored - 1
        derived.PixelRepresentation = int(encoding.signed)
        vr = "SS" if encoding.signed else "US"
        if encoding.padding is not None:
            first, last = encoding.padding
            derived.add_new("PixelPaddingValue", vr, first)
            if first != last:
                derived.add_new("PixelPaddingRangeLimit", vr, last)
        derived.add_new("SmallestImagePixelValue", vr, int(stored.min()))
        derived.add_new("LargestImagePixelValue", vr, int(stored.max()))
        if self.rescale == "source":
            copy_attributes(derived, source, ("RescaleSlope", "RescaleIntercept"))
        elif self.rescale is not None:
            derived.RescaleSlope, derived.RescaleIntercept = self.rescale
        if self.window is not None:
            derived.WindowCenter, derived.WindowWidth = self.window[:2]
            derived.WindowCenterWidthExplanation = self.window[2]
        little = stored.astype(stored.dtype.newbyteorder("<"))
        derived.add_new("PixelData", "OW", little.tobytes())


def storage_for(
    rule: str, prediction: Volume, source: Volume, datasets: Sequence[Dataset]
) -> Storage:
    """How to store a prediction by one of the rules of outputs.py.

    Args:
        prediction: (slices, rows, columns), float32, on the grid of `source`.
        datasets: the source instances in slice order.

    Raises:
        SeriesRefused: OUTPUT_NOT_FINITE, OUTPUT_OUT_OF_RANGE.
    """
    if not np.isfinite(prediction.voxels).all():
        raise SeriesRefused("OUTPUT_NOT_FINITE", "the model gave NaN or infinity", _CHECK)
    return _RULES[rule](prediction, source, datasets)


_CHECK = "check the model"


def _as_source(prediction: Volume, source: Volume, datasets: Sequence[Dataset]) -> Storage:
    """As the source stores each slice if all fit, else signed 16-bit HU for all."""
    own = [encoding_of(dataset) for dataset in datasets]
    if _fit(own, prediction, source):
        rescale: tuple[str, str] | Literal["source"] = "source"
        if all((one.slope, one.intercept) == (1.0, 0.0) for one in own):
            rescale = ("1", "0")
        return Storage(prediction.voxels, source.padding, source.voxels, own, rescale, None)
    whole = [_whole_hu(encoding) for encoding in own]
    if not _fit(whole, prediction, source):
        raise SeriesRefused("OUTPUT_OUT_OF_RANGE", "values beyond 16 bits", _CHECK)
    return Storage(prediction.voxels, source.padding, source.voxels, whole, ("1", "0"), None)


def _whole_hu(own: Encoding) -> Encoding:
    """Signed 16-bit HU, with a padding value where the source has one."""
    if own.padding is None:
        return SIGNED_16
    low, high = SIGNED_16.limits
    padding = round(min(max(own.padding[0] * own.slope + own.intercept, low), high))
    return Encoding(16, True, 1.0, 0.0, (padding, padding))


def _signed_hu(prediction: Volume, source: Volume, datasets: Sequence[Dataset]) -> Storage:
    """Whole HU, signed 16 bit, no padding value: outside the source's image is air."""
    encodings = [SIGNED_16] * len(datasets)
    if not _fit(encodings, prediction, source):
        raise SeriesRefused("OUTPUT_OUT_OF_RANGE", "values beyond 16 bits", _CHECK)
    part = str(datasets[0].get("BodyPartExamined") or "").upper()
    window = _HEAD_WINDOW if part in _HEAD else _BODY_WINDOW
    return Storage(prediction.voxels, source.padding, _AIR_HU, encodings, ("1", "0"), window)


def _twelve_bit(prediction: Volume, source: Volume, datasets: Sequence[Dataset]) -> Storage:
    """Whole numbers from 0 to 4095: the MR Image IOD has no Modality LUT (PS3.3 A.4)."""
    voxels, native = _not_negative(prediction, source)
    encodings = [Encoding(12, False, 1.0, 0.0)] * len(datasets)
    low, high = np.percentile(np.rint(native), (1, 99)) if native.size else (0.0, 0.0)
    window = _window(float(low), max(float(high), float(low) + 1), "1-99 PERCENT")
    storage = Storage(voxels, source.padding, 0.0, encodings, None, window)
    if native.max(initial=0) >= encodings[0].limits[1] + 0.5:
        raise SeriesRefused("OUTPUT_OUT_OF_RANGE", "values beyond 12 bits", _CHECK)
    return storage


def _activity(prediction: Volume, source: Volume, datasets: Sequence[Dataset]) -> Storage:
    """Unsigned 16 bit with one fractional slope for the series (PS3.3 C.8.9.4).

    With a slope per slice some readers take that of the first for all, and wrap around.
    """
    if prediction.unit == "SUV":
        activity = prediction.voxels / np.float64(suv_per_bqml(datasets))
        prediction = prediction.with_voxels(activity.astype(np.float32), "BQML")
    voxels, native = _not_negative(prediction, source)
    largest = float(native.max(initial=0))
    slope = format_number_as_ds(largest / _PET_LARGEST) if largest > 0 else "1"
    encodings = [Encoding(16, False, float(slope), 0.0)] * len(datasets)
    try:
        window = _window(0.0, _WINDOW_SUV / suv_per_bqml(datasets), "SUVBW 0 TO 7")
    except SeriesRefused:  # nobody can tell the SUV of this source, so no reader expects it
        window = _window(0.0, largest or 1.0, "0 TO LARGEST")
    return Storage(voxels, source.padding, 0.0, encodings, (slope, "0"), window)


def suv_per_bqml(datasets: Sequence[Dataset]) -> float:
    """SUVbw (g/ml) per Bq/ml of a PET series: as a reader computes it of the derived one.

    Raises:
        SeriesRefused: the attributes do not tell.
    """
    return calibrate(datasets, "SUV").factor / calibrate(datasets, "BQML").factor


def _not_negative(
    prediction: Volume, source: Volume
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Voxels with a small undershoot set to zero, and those of them that are not padding."""
    voxels = prediction.voxels
    native = voxels if source.padding is None else voxels[~source.padding]
    if native.min(initial=0) < -_BELOW_ZERO * native.max(initial=0):
        raise SeriesRefused("OUTPUT_OUT_OF_RANGE", "values below zero", _CHECK)
    return np.maximum(voxels, 0), np.maximum(native, 0)


def _window(low: float, high: float, name: str) -> tuple[str, str, str]:
    return f"{(low + high) / 2:.8g}", f"{high - low:.8g}", name


def _fit(encodings: Sequence[Encoding], prediction: Volume, source: Volume) -> bool:
    """Whether every slice fits its encoding, padding aside."""
    return all(
        without_loss(
            encoding,
            prediction.voxels[index],
            True if source.padding is None else ~source.padding[index],
        )
        for index, encoding in enumerate(encodings)
    )


_RULES: dict[str, Callable[[Volume, Volume, Sequence[Dataset]], Storage]] = {
    "as source": _as_source,
    "signed HU": _signed_hu,
    "12 bit": _twelve_bit,
    "activity": _activity,
}
