"""The slices of one stack, decoded one by one and kept as they are stored: half of float32."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.frames import Ignored, frame_number
from dicomnode.imaging.pixels import Encoding, encoding_of, pixel_digest, stored_values
from dicomnode.imaging.units import Calibration, encoding_in_unit

MOST_LEFT_OUT = 3
"""With more slices than this that cannot be decoded a stack is refused: a try can take seconds."""

WithPixels = Callable[[Dataset], Dataset]
"""A slice's header -> the same with its pixel data, which may be read only now."""


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """One slice.

    Attributes:
        stored: (rows, columns), int16 or uint16.
        encoding: as the slice declares it.
        calibrated: the same in the unit of the volume.
        digest: sha256 (hex) of the stored values.
    """

    stored: NDArray[Any]
    encoding: Encoding
    calibrated: Encoding
    digest: str

    def plane(self) -> NDArray[np.float32]:
        """(rows, columns), float32, in the unit of the volume."""
        return self.calibrated.to_physical(self.stored)

    def padding(self) -> NDArray[np.bool_] | None:
        """(rows, columns), bool: True where there is no image; None: nowhere."""
        return self.encoding.is_padding(self.stored)

    def extremes(self) -> tuple[float, float] | None:
        """Smallest and largest value, padding aside; None: all is padding."""
        padding = self.padding()
        native = self.stored if padding is None else self.stored[~padding]
        if native.size == 0:
            return None
        two = np.array([native.min(), native.max()], self.stored.dtype)
        ends = self.calibrated.to_physical(two)
        return float(ends.min()), float(ends.max())

    def identity(self) -> str:
        """What determines `plane`, in words."""
        return f"{self.digest} {self.stored.dtype.str} {self.stored.shape} {self.calibrated}"


class Decoding:
    """Slices in order; `decode` is called once for each, by one thread."""

    def __init__(
        self, headers: Sequence[Dataset], calibration: Calibration, with_pixels: WithPixels
    ) -> None:
        self._headers, self._calibration = headers, calibration
        self._with_pixels = with_pixels
        self._slices: dict[int, Decoded] = {}
        self._broken: dict[int, SeriesRefused] = {}

    def decode(self, index: int) -> bool:
        """Decode one slice; False: it cannot be decoded, which an end of the stack may survive.

        Raises:
            SeriesRefused: NOT_16_BIT, NOT_HU, NO_RESCALE; UNDECODABLE: too many cannot be.
        """
        dataset = self._with_pixels(self._headers[index])
        try:
            self._slices[index] = decoded(dataset, self._calibration)
        except SeriesRefused as error:
            if error.code != "UNDECODABLE":
                raise
            self._broken[index] = error
            if len(self._broken) > MOST_LEFT_OUT:
                raise
            return False
        return True

    def is_broken(self, index: int) -> bool:
        """Whether a slice was tried and cannot be decoded."""
        return index in self._broken

    def __getitem__(self, index: int) -> Decoded:
        """A slice that was decoded."""
        return self._slices[index]

    def forget(self, index: int) -> Decoded:
        """A slice that was decoded, kept no longer."""
        return self._slices.pop(index)

    def kept(self) -> range:
        """Where the stack is whole, once all were tried.

        Raises:
            SeriesRefused: UNDECODABLE: a slice between others.
        """
        good = [index for index in range(len(self._headers)) if index not in self._broken]
        if not good or good[-1] - good[0] + 1 != len(good):
            raise next(iter(self._broken.values()))
        return range(good[0], good[-1] + 1)

    def left_out(self) -> tuple[Ignored, ...]:
        """The slices that could not be decoded; `kept` says that they lie at the ends."""
        told = []
        for index, error in self._broken.items():
            header = self._headers[index]
            uid = str(header.SOPInstanceUID)
            told.append(Ignored(uid, error.code, error.message, frame_number(header)))
        return tuple(told)


def decoded(dataset: Dataset, calibration: Calibration) -> Decoded:
    """Decode one slice.

    Raises:
        SeriesRefused: NOT_16_BIT, NOT_HU, NO_RESCALE, UNDECODABLE.
    """
    encoding = encoding_of(dataset)
    stored = stored_values(dataset)
    in_unit = encoding_in_unit(encoding, calibration)
    return Decoded(stored, encoding, in_unit, pixel_digest(stored))
