"""A volume as its slices: what may still be decoded or predicted, one plane after the other."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dicomnode.imaging.decoding import Decoding
from dicomnode.imaging.frames import Ignored
from dicomnode.imaging.layout import Layout, check_count, frame_of_reference
from dicomnode.imaging.positions import SHEARED_DEGREES, tilt_degrees
from dicomnode.imaging.units import Unit

Plane = NDArray[np.float32]
"""(rows, columns), float32, in the unit of its volume."""


class Planes(Protocol):
    """What a `Volume` and the streamed forms of one have in common; see `Volume`."""

    @property
    def unit(self) -> Unit: ...
    @property
    def positions(self) -> NDArray[np.float64]: ...
    @property
    def orientation(self) -> NDArray[np.float64]: ...
    @property
    def spacing_mm(self) -> tuple[float, float, float]: ...
    @property
    def digests(self) -> tuple[str, ...]: ...
    @property
    def left_out(self) -> tuple[Ignored, ...]: ...
    @property
    def tilt_degrees(self) -> float: ...
    @property
    def sheared(self) -> bool: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def voxels(self) -> NDArray[np.float32]: ...
    @property
    def padding(self) -> NDArray[np.bool_] | None: ...
    def plane(self, index: int) -> Plane: ...
    def padding_of(self, index: int) -> NDArray[np.bool_] | None: ...
    def extremes(self) -> tuple[float, float] | None: ...


class SourcePlanes:
    """The slices of a stack that were decoded, kept as stored; attributes are those of `Volume`.

    A slice that cannot be decoded is left out at an end of the stack.
    """

    def __init__(self, layout: Layout, decoding: Decoding) -> None:
        """To be made when `decoding` has tried every slice of `layout`.

        Raises:
            SeriesRefused: UNDECODABLE, SINGLE_SLICE, TOO_FEW_SLICES, MIXED_FRAME.
        """
        self._decoding, self._rows_columns = decoding, layout.shape[1:]
        self.kept = kept = decoding.kept()
        """Of the layout."""
        self.datasets = layout.datasets[kept.start : kept.stop]
        """Headers, in slice order."""
        check_count(len(kept), layout.min_slices)
        self.unit = layout.unit
        self.positions = layout.positions[kept.start : kept.stop]
        self.orientation, self.spacing_mm = layout.orientation, layout.spacing_mm
        self.frame_of_reference_uid = frame_of_reference(self.datasets)
        self.digests = tuple(decoding[index].digest for index in kept)
        self.encodings = [decoding[index].encoding for index in kept]
        """Of each slice, as it declares it."""
        self.left_out = decoding.left_out()

    @property
    def tilt_degrees(self) -> float:
        return tilt_degrees(self.positions, self.orientation)

    @property
    def sheared(self) -> bool:
        return self.tilt_degrees > SHEARED_DEGREES

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self.kept), *self._rows_columns)

    @property
    def voxels(self) -> NDArray[np.float32]:
        """All slices at once, made anew each time: for what must see the whole volume."""
        voxels = np.empty(self.shape, np.float32)
        for index in range(len(voxels)):
            voxels[index] = self.plane(index)
        return voxels

    @property
    def padding(self) -> NDArray[np.bool_] | None:
        """All masks at once, made anew each time; None: there is no padding."""
        masks = [self.padding_of(index) for index in range(self.shape[0])]
        if all(mask is None for mask in masks):
            return None
        nowhere = np.zeros(self.shape[1:], np.bool_)
        return np.stack([nowhere if mask is None else mask for mask in masks])

    def plane(self, index: int) -> Plane:
        return self._decoding[self.kept[index]].plane()

    def padding_of(self, index: int) -> NDArray[np.bool_] | None:
        return self._decoding[self.kept[index]].padding()

    def extremes(self) -> tuple[float, float] | None:
        found = [self._decoding[index].extremes() for index in self.kept]
        ends = [end for pair in found if pair is not None for end in pair]
        return (min(ends), max(ends)) if ends else None


class PredictedPlanes:
    """Predicted slices on the grid of their source; attributes are those of `Volume`."""

    def __init__(self, planes: Sequence[Plane], unit: Unit, source: Planes) -> None:
        self.planes, self.unit, self._source = planes, unit, source
        self.orientation, self.spacing_mm = source.orientation, source.spacing_mm
        self.digests: tuple[str, ...] = ()
        self.left_out: tuple[Ignored, ...] = ()

    @property
    def positions(self) -> NDArray[np.float64]:
        return self._source.positions

    @property
    def tilt_degrees(self) -> float:
        return self._source.tilt_degrees

    @property
    def sheared(self) -> bool:
        return self._source.sheared

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._source.shape

    @property
    def voxels(self) -> NDArray[np.float32]:
        """All slices at once, made anew each time."""
        return np.stack(self.planes)

    @property
    def padding(self) -> NDArray[np.bool_] | None:
        return self._source.padding

    def plane(self, index: int) -> Plane:
        return self.planes[index]

    def padding_of(self, index: int) -> NDArray[np.bool_] | None:
        return self._source.padding_of(index)

    def extremes(self) -> tuple[float, float] | None:
        native = [
            plane if mask is None else plane[~mask]
            for plane, mask in ((p, self.padding_of(i)) for i, p in enumerate(self.planes))
        ]
        ends = [end for plane in native if plane.size for end in (plane.min(), plane.max())]
        return (float(min(ends)), float(max(ends))) if ends else None
