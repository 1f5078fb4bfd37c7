"""A model over slices as they become ready: the same bits as `inference.predict`, one by one."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dicomnode.imaging.decoding import Decoding
from dicomnode.imaging.engines import WithinMemory
from dicomnode.imaging.grid import Regrid
from dicomnode.imaging.inference import Model, Scales, checked_grid, started
from dicomnode.imaging.layout import Layout
from dicomnode.imaging.manifest import Manifest
from dicomnode.imaging.networks import padded, start_batch
from dicomnode.imaging.pending import Pending, Ready, Then, in_order
from dicomnode.imaging.percentiles import Percentiles
from dicomnode.imaging.planes import Plane, SourcePlanes

log = logging.getLogger(__name__)

Results = list[tuple[int, Plane]]
"""Index and result of slices."""


class Known(Protocol):
    """Results of single slices that were made before, while their series still arrived."""

    def take(self, key: str) -> Plane | None:
        """The result under `key`, which then belongs to the caller; None: not known."""


@dataclass(frozen=True, slots=True)
class Stages:
    """What happens around inference, on the thread that infers.

    Attributes:
        wait: returns when a slice of the layout was decoded, or cannot be.
        wait_all: returns when all were.
        between: called before each batch; it may do other work, or raise to give up.
        known: see `Known`; None: nothing is.
    """

    wait: Callable[[int], object]
    wait_all: Callable[[], SourcePlanes]
    between: Callable[[], object] = lambda: None
    known: Known | None = None


def fixed_scales(manifest: Manifest) -> Scales | None:
    """How a model maps values, if the same for every volume; None: statistics of it are needed."""
    given, made = manifest.input.intensity, manifest.output.intensity
    if isinstance(given, Percentiles) or isinstance(made, Percentiles):
        return None
    return given, made


def result_key(model: Model, identities: Sequence[str]) -> str:
    """All that a slice's result depends on: the model, what runs it, the slice and its neighbours.

    Args:
        identities: of the slices that go in together, in order, see `Decoded.identity`.
    """
    runs = f"{model.package.digest} {model.engine.name} {model.precision} {model.device}"
    return "|".join([runs, *identities])


class Predicting:
    """One model at work on one stack; slices have their index in the layout."""

    def __init__(self, model: Model, layout: Layout, decoding: Decoding, stages: Stages) -> None:
        """
        Raises:
            PackageError: `layout` is not in the unit the model takes, or not on its grid.
        """
        self._model, self._decoding, self._stages = model, decoding, stages
        self._manifest = model.package.manifest
        self._regrid = checked_grid(model, layout)
        self._fitting = WithinMemory(model.engine)
        self._count = layout.shape[0]
        self._recent: dict[int, Plane] = {}
        self.known = 0
        """How many slices were known before."""

    @property
    def halved(self) -> int:
        """How often a batch was halved because memory ran out."""
        return self._fitting.halved

    def planes(self) -> Iterator[tuple[int, Plane]]:
        """Index and result of each slice that could be decoded, in order, in the output unit.

        Voxels that the source marks as padding come back as they were.

        Raises:
            EngineError: the engine failed; none of what came before may be used.
            OutOfMemory: not even one slice fits.
            SeriesRefused: NO_CONTRAST, and whatever the stages raise.
        """
        scales = fixed_scales(self._manifest)
        if scales is not None and self._regrid is None:
            made = self._stream(scales, self._plane)
        else:
            made = self._in_two_passes()
        for index, plane in made:
            padding = self._decoding[index].padding()
            if padding is not None:
                plane = np.where(padding, self._plane(index), plane)
            yield index, plane

    def _plane(self, index: int) -> Plane:
        return self._decoding[index].plane()

    def _in_two_passes(self) -> Iterator[tuple[int, Plane]]:
        """The first for what only the whole volume tells, the second slice by slice."""
        source = self._stages.wait_all()
        scales = self._manifest.intensities_of(source)
        if self._regrid is None:
            return self._stream(scales, self._plane)
        log.info("%s: %s", self._model.package.name, self._regrid)
        lowest = min(float(source.plane(index).min()) for index in range(source.shape[0]))
        return self._resampled(self._regrid, scales, lowest)

    def _resampled(
        self, regrid: Regrid, scales: Scales, lowest: float
    ) -> Iterator[tuple[int, Plane]]:
        """On the trained grid, and back when the lowest value of all results is known."""
        residual = self._manifest.output.residual

        def there(index: int) -> Plane:
            return regrid.plane_there(self._plane(index), lowest)

        trained: dict[int, Plane] = {}
        for index, plane in self._stream(scales, there):
            trained[index] = plane - there(index) if residual else plane
        around = min(float(plane.min()) for plane in trained.values())
        for index in list(trained):
            back = regrid.plane_back(trained.pop(index), around)
            yield index, self._plane(index) + back if residual else back

    def _stream(
        self, scales: Scales, plane_of: Callable[[int], Plane]
    ) -> Iterator[tuple[int, Plane]]:
        for results in in_order(self._begun(scales, plane_of), self._fitting.ahead):
            yield from results

    def _begun(
        self, scales: Scales, plane_of: Callable[[int], Plane]
    ) -> Iterator[Pending[Results]]:
        """Batch by batch, and what was known before between them."""
        half, batch = self._manifest.input.slices // 2, list[int]()
        for index in range(self._count):
            self._stages.wait(min(index + half, self._count - 1))
            if self._decoding.is_broken(index):
                continue
            known = self._take(index)
            if known is None:
                batch.append(index)
            if batch and (known is not None or len(batch) >= self._wanted(index)):
                yield self._begin(batch, scales, plane_of)
                batch = []
            if known is not None:
                yield Ready([(index, known)])
        if batch:
            yield self._begin(batch, scales, plane_of)

    def _wanted(self, index: int) -> int:
        matrix = None if self._regrid is None else self._regrid.matrix
        size = self._decoding[index].stored.shape if matrix is None else (matrix, matrix)
        return self._fitting.batch(*padded(size, self._manifest.input.padding.multiple))

    def _begin(
        self, batch: Sequence[int], scales: Scales, plane_of: Callable[[int], Plane]
    ) -> Pending[Results]:
        self._stages.between()
        windows = [self._window(index) for index in batch]
        needed = {index for window in windows for index in window}
        planes = {i: self._recent.get(i) for i in needed}
        self._recent = {i: plane_of(i) if p is None else p for i, p in planes.items()}
        stacked = np.stack([np.stack([self._recent[i] for i in window]) for window in windows])
        manifest = self._manifest
        begun = start_batch(
            started(self._fitting, manifest),
            stacked,
            *scales,
            manifest.input.padding.multiple,
            residual=manifest.output.residual,
            padding=manifest.input.padding.mode,
            extra=manifest.input.extra,
        )
        return Then(begun, lambda results: list(zip(batch, results, strict=True)))

    def _window(self, index: int) -> list[int]:
        """A slice between its neighbours; at an end the last slice stands in for those beyond."""
        half = self._manifest.input.slices // 2
        return [self._towards(index, index + step) for step in range(-half, half + 1)]

    def _towards(self, index: int, wanted: int) -> int:
        """`wanted`, or the last slice on the way there: the stack ends at a broken one."""
        step = 1 if wanted >= index else -1
        while index != wanted:
            after = index + step
            if not 0 <= after < self._count or self._decoding.is_broken(after):
                return index
            index = after
        return index

    def key(self, index: int) -> str | None:
        """What the result of a slice depends on, if neither its volume nor other slices' results
        are among it; None: they are."""
        if fixed_scales(self._manifest) is None or self._regrid is not None:
            return None
        identities = [self._decoding[i].identity() for i in self._window(index)]
        return result_key(self._model, identities)

    def one(self, index: int) -> tuple[str, Plane]:
        """Key and result of one slice that has a key; padding is not restored.

        Raises:
            OutOfMemory, EngineError: see `planes`.
        """
        key, scales = self.key(index), fixed_scales(self._manifest)
        if key is None or scales is None:
            raise ValueError("the result depends on the whole volume")
        ((_, plane),) = self._begin([index], scales, self._plane).result()
        return key, plane

    def _take(self, index: int) -> Plane | None:
        known, key = self._stages.known, None
        if known is not None:
            key = self.key(index)
        plane = None if known is None or key is None else known.take(key)
        self.known += plane is not None
        return plane
