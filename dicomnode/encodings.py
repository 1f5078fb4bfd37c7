"""How the values of a derived series are stored: stored integers, rescale, padding and window.

Each rule keeps a prediction to half a rescale quantum, or refuses it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.valuerep import format_number_as_ds

from dicomnode.attributes import copy_attributes
from dicomnode.errors import SeriesRefused
from dicomnode.imaging.pixels import SIGNED_16, Encoding, encode, encoding_of, without_loss
from dicomnode.imaging.planes import Plane, Planes, SourcePlanes
from dicomnode.imaging.units import calibrate

_HEAD = ("", "BRAIN", "HEAD", "SKULL")
"""BodyPartExamined of a head; what does not say is taken for one."""
_HEAD_WINDOW = ("40", "80", "BRAIN")
_BODY_WINDOW = ("40", "400", "SOFT TISSUE")
_AIR_HU = -1000.0
"""What stands in a CT made of MR where the MR has padding."""
_BELOW_ZERO = 0.05
"""How far, as a part of the largest value, a quantity that is never negative may undershoot."""
_WINDOW_SUV = 7.0
_PET_LARGEST = 32767
"""Stored value of the largest activity: the same whether a reader takes it as signed or not."""


class DoesNotFit(Exception):
    """A slice does not fit the encoding that was taken for granted before all were known."""


@dataclass(frozen=True)
class Storage:
    """How every slice of one derived series is stored.

    Attributes:
        prediction: in the unit of `encodings`, once it went through `adjust`.
        source: on the same grid; says where padding is.
        outside: what stands there if `encodings` have no single padding value for it: one number,
            or "source": what the source has there.
        encodings: one per slice.
        rescale: RescaleSlope and RescaleIntercept; "source": as the source writes them; None: the
            IOD has no Modality LUT.
        window: centre, width, name; None: the source's first.
        adjust: (rows, columns), float32 -> the same: what is done to each slice before.
        label: (rows, columns), bool: where a label is burned in, as bright as the brightest voxel
            of the series; their values are lost. None: nowhere.
        granted: whether each slice fits is looked at only when it is stored.
    """

    prediction: Planes
    source: Planes
    outside: Literal["source"] | float
    encodings: Sequence[Encoding]
    rescale: tuple[str, str] | Literal["source"] | None
    window: tuple[str, str, str] | None
    adjust: Callable[[Plane], Plane] = lambda plane: plane
    label: NDArray[np.bool_] | None = None
    granted: bool = False

    def values(self, index: int) -> Plane:
        """One slice as it is encoded, (rows, columns), float32."""
        return self.adjust(self.prediction.plane(index))

    def fits(self, index: int) -> bool:
        """Whether one slice is finite and fits its encoding, padding aside."""
        padding = self.source.padding_of(index)
        native = True if padding is None else ~padding
        plane = self.values(index)
        whole = bool(np.isfinite(plane).all())
        return whole and without_loss(self.encodings[index], plane, native)

    def plane(self, index: int) -> NDArray[Any]:
        """Stored values of one slice, (rows, columns), int16 or uint16.

        Raises:
            DoesNotFit: only where `granted`.
        """
        if self.granted and not self.fits(index):
            raise DoesNotFit
        stored = self._without_label(index)
        if self.label is not None:
            bright = np.full((1, 1), self.brightest, np.float32)
            stored[self.label] = encode(self.encodings[index], bright, None, 0)[0, 0]
        return stored

    @cached_property
    def brightest(self) -> float:
        """The largest value of the series, padding aside."""
        lowest = min(float(self.values(i).min()) for i in range(self.source.shape[0]))
        return max(float(plane.max(initial=lowest)) for plane in self.native())

    def native(self) -> Iterator[NDArray[np.float32]]:
        """The values of each slice, padding aside, (n,) or (rows, columns)."""
        for index in range(self.source.shape[0]):
            padding, plane = self.source.padding_of(index), self.values(index)
            yield plane if padding is None else plane[~padding]

    def _without_label(self, index: int) -> NDArray[Any]:
        encoding, values = self.encodings[index], self.values(index)
        padding = self.source.padding_of(index)
        if padding is None:
            return encode(encoding, values, None, 0)
        padded: NDArray[Any] | int
        if encoding.padding is not None and encoding.padding[0] == encoding.padding[1]:
            padded = encoding.padding[0]
        elif self.outside == "source":
            padded = encoding.to_stored(self.source.plane(index))
        else:
            padded = encoding.to_stored(np.asarray(self.outside, np.float32))
        return encode(encoding, values, padding, padded)

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
    rule: str, prediction: Planes, source: Planes, datasets: Sequence[Dataset]
) -> Storage:
    """How to store a prediction by one of the rules of outputs.py.

    Args:
        prediction: on the grid of `source`.
        datasets: the source instances in slice order.

    Raises:
        SeriesRefused: OUTPUT_NOT_FINITE, OUTPUT_OUT_OF_RANGE.
    """
    for index in range(prediction.shape[0]):
        if not np.isfinite(prediction.plane(index)).all():
            raise SeriesRefused("OUTPUT_NOT_FINITE", "the model gave NaN or infinity", _CHECK)
    return _RULES[rule](prediction, source, datasets)


_CHECK = "check the model"


def storage_before(
    rule: str, prediction: Planes, source: Planes, datasets: Sequence[Dataset]
) -> Storage | None:
    """What `storage_for` gives if every slice fits, known before any is predicted; None: nobody
    can tell yet. It raises `DoesNotFit` at the first slice that shows it wrong.
    """
    if rule == "as source":
        return replace(_own(prediction, source, datasets), granted=True)
    if rule == "grey":
        return replace(_grey(prediction, source, datasets), granted=True)
    if rule == "signed HU":
        return replace(_signed(prediction, source, datasets), granted=True)
    return None


def _own(prediction: Planes, source: Planes, datasets: Sequence[Dataset]) -> Storage:
    """As the source stores each slice."""
    own = encodings_of(source, datasets)
    rescale: tuple[str, str] | Literal["source"] = "source"
    if all((one.slope, one.intercept) == (1.0, 0.0) for one in own):
        rescale = ("1", "0")
    return Storage(prediction, source, "source", own, rescale, None)


def encodings_of(source: Planes, datasets: Sequence[Dataset]) -> list[Encoding]:
    """How each slice of the source is stored: as it was found when it was decoded."""
    if isinstance(source, SourcePlanes):
        return source.encodings
    return [encoding_of(dataset) for dataset in datasets]


def _as_source(prediction: Planes, source: Planes, datasets: Sequence[Dataset]) -> Storage:
    """As the source stores each slice if all fit, else signed 16-bit HU for all."""
    own = _own(prediction, source, datasets)
    if _fit(own):
        return own
    whole = replace(
        own, encodings=[_whole_hu(encoding) for encoding in own.encodings], rescale=("1", "0")
    )
    if not _fit(whole):
        raise SeriesRefused("OUTPUT_OUT_OF_RANGE", "values beyond 16 bits", _CHECK)
    return whole


def _whole_hu(own: Encoding) -> Encoding:
    """Signed 16-bit HU, with a padding value where the source has one."""
    if own.padding is None:
        return SIGNED_16
    low, high = SIGNED_16.limits
    padding = round(min(max(own.padding[0] * own.slope + own.intercept, low), high))
    return Encoding(16, True, 1.0, 0.0, (padding, padding))


def _signed_hu(prediction: Planes, source: Planes, datasets: Sequence[Dataset]) -> Storage:
    """Whole HU, signed 16 bit, no padding value: outside the source's image is air."""
    storage = _signed(prediction, source, datasets)
    if not _fit(storage):
        raise SeriesRefused("OUTPUT_OUT_OF_RANGE", "values beyond 16 bits", _CHECK)
    return storage


def _signed(prediction: Planes, source: Planes, datasets: Sequence[Dataset]) -> Storage:
    part = str(datasets[0].get("BodyPartExamined") or "").upper()
    window = _HEAD_WINDOW if part in _HEAD else _BODY_WINDOW
    encodings = [SIGNED_16] * len(datasets)
    return Storage(prediction, source, _AIR_HU, encodings, ("1", "0"), window)


def _twelve_bit(prediction: Planes, source: Planes, datasets: Sequence[Dataset]) -> Storage:
    """Whole numbers from 0 to 4095: the MR Image IOD has no Modality LUT (PS3.3 A.4)."""
    encodings = [Encoding(12, False, 1.0, 0.0)] * len(datasets)
    storage = Storage(prediction, source, 0.0, encodings, None, None, _not_below_zero)
    largest = _largest(storage)
    if largest >= encodings[0].limits[1] + 0.5:
        raise SeriesRefused("OUTPUT_OUT_OF_RANGE", "values beyond 12 bits", _CHECK)
    counts = np.zeros(encodings[0].limits[1] + 1, np.intp)
    for plane in storage.native():
        counts += np.bincount(np.rint(plane).astype(np.intp).ravel(), minlength=len(counts))
    low, high = _percentile(counts, 1), _percentile(counts, 99)
    window = _window(low, max(high, low + 1), "1-99 PERCENT")
    return replace(storage, window=window)


def _percentile(counts: NDArray[np.intp], percent: float) -> float:
    """Of whole numbers 0, 1, 2 ..., each so often; between two of them linear; 0 if there is none.

    What `numpy.percentile` gives of the numbers themselves.
    """
    total = int(counts.sum())
    if total == 0:
        return 0.0
    place = (total - 1) * percent / 100
    below = int(place)
    reached = np.cumsum(counts)
    first, second = np.searchsorted(reached, [below, min(below + 1, total - 1)], side="right")
    return float(first + (second - first) * (place - below))


def _grey(prediction: Planes, source: Planes, datasets: Sequence[Dataset]) -> Storage:
    """Whole grey values from 0 to 4095 of a CT that is not in HU; what is beyond is cut."""
    encodings = [Encoding(12, False, 1.0, 0.0)] * len(datasets)
    window = _window(0.0, 4095.0, "ALL GREY VALUES")
    return Storage(prediction, source, 0.0, encodings, ("1", "0"), window, _grey_values)


def _grey_values(plane: Plane) -> Plane:
    return np.clip(plane, 0, 4095)


def _activity(prediction: Planes, source: Planes, datasets: Sequence[Dataset]) -> Storage:
    """Unsigned 16 bit with one fractional slope for the series (PS3.3 C.8.9.4).

    With a slope per slice some readers take that of the first for all, and wrap around.
    """
    adjust = _not_below_zero
    if prediction.unit == "SUV":
        factor = np.float64(suv_per_bqml(datasets))

        def adjust(plane: Plane) -> Plane:
            return _not_below_zero((plane / factor).astype(np.float32))

    any_slope = [Encoding(16, False, 1.0, 0.0)] * len(datasets)
    storage = Storage(prediction, source, 0.0, any_slope, None, None, adjust)
    largest = _largest(storage)
    slope = format_number_as_ds(largest / _PET_LARGEST) if largest > 0 else "1"
    encodings = [Encoding(16, False, float(slope), 0.0)] * len(datasets)
    try:
        window = _window(0.0, _WINDOW_SUV / suv_per_bqml(datasets), "SUVBW 0 TO 7")
    except SeriesRefused:  # nobody can tell the SUV of this source, so no reader expects it
        window = _window(0.0, largest or 1.0, "0 TO LARGEST")
    return replace(storage, encodings=encodings, rescale=(slope, "0"), window=window)


def suv_per_bqml(datasets: Sequence[Dataset]) -> float:
    """SUVbw (g/ml) per Bq/ml of a PET series: as a reader computes it of the derived one.

    Raises:
        SeriesRefused: the attributes do not tell.
    """
    return calibrate(datasets, "SUV").factor / calibrate(datasets, "BQML").factor


def _not_below_zero(plane: Plane) -> Plane:
    return np.maximum(plane, 0)


def _largest(storage: Storage) -> float:
    """The largest value of a quantity that is never negative, padding aside; 0: there is none.

    Raises:
        SeriesRefused: OUTPUT_OUT_OF_RANGE: it is negative by more than a small undershoot.
    """
    prediction, source = storage.prediction, storage.source
    low = high = 0.0
    for index in range(source.shape[0]):
        padding, plane = source.padding_of(index), prediction.plane(index)
        native = plane if padding is None else plane[~padding]
        low, high = min(low, float(native.min(initial=0))), max(high, float(native.max(initial=0)))
    if low < -_BELOW_ZERO * high:
        raise SeriesRefused("OUTPUT_OUT_OF_RANGE", "values below zero", _CHECK)
    return max((float(plane.max(initial=0)) for plane in storage.native()), default=0.0)


def _window(low: float, high: float, name: str) -> tuple[str, str, str]:
    return f"{(low + high) / 2:.8g}", f"{high - low:.8g}", name


def _fit(storage: Storage) -> bool:
    """Whether every slice fits its encoding."""
    return all(storage.fits(index) for index in range(storage.source.shape[0]))


_RULES: dict[str, Callable[[Planes, Planes, Sequence[Dataset]], Storage]] = {
    "as source": _as_source,
    "signed HU": _signed_hu,
    "12 bit": _twelve_bit,
    "grey": _grey,
    "activity": _activity,
}
