"""Slices inferred while their series still arrives: kept by what they were made of, or forgotten.

Nothing here decides anything. A result is kept under all that it depends on (the stored values of
its slice and neighbours, how they are calibrated, the model and what runs it); the job of the
complete series takes what it finds under the very same key, and infers the rest. So late, repeated
or replaced slices, other neighbours or another calibration find nothing, and what is found has the
bits that the job itself would have made.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydicom import Dataset

from dicomnode.errors import DicomNodeError
from dicomnode.imaging.decoding import Decoding
from dicomnode.imaging.frames import is_enhanced
from dicomnode.imaging.layout import layout_of
from dicomnode.imaging.planes import Plane, SourcePlanes
from dicomnode.imaging.streaming import Predicting, Stages, fixed_scales
from dicomnode.orders import Arriving
from dicomnode.part10 import MALFORMED, read_instances

if TYPE_CHECKING:
    from dicomnode.imaging.inference import Model

log = logging.getLogger(__name__)


class Ahead:
    """Infers one slice at a time when there is nothing else to do.

    Only for models of single slices on a CPU: a GPU infers a series in seconds, and its bits may
    depend on the batch.
    """

    def __init__(self, models: "Mapping[str, Model]", most_bytes: int) -> None:
        """`most_bytes`: of results that are kept; the oldest are forgotten. 0: none at all."""
        self._models, self._most_bytes = models, most_bytes
        self._files: deque[tuple[str, Path]] = deque()
        self._kept: OrderedDict[str, Plane] = OrderedDict()
        self._bytes = 0
        self.made = 0
        """Results so far."""

    @property
    def busy(self) -> bool:
        """Whether there is something to infer."""
        return bool(self._files)

    def expect(self, arriving: Arriving) -> None:
        """Files that may be inferred, in the order of their arrival."""
        if self._most_bytes:
            self._files.extend((arriving.model, path) for path in arriving.files)

    def step(self) -> bool:
        """Infer one slice; False: there is none to infer."""
        if not self._files:
            return False
        name, path = self._files.popleft()
        try:
            self._infer(name, path)
        except DicomNodeError as error:  # the job of the series finds its own words for it
            log.debug("not inferred ahead: %s", error)
        except MALFORMED as error:
            log.debug("not inferred ahead: %s", type(error).__name__)
        except (MemoryError, RuntimeError):
            log.exception("inferring ahead is given up for what is waiting")
            self._files.clear()
            self._forget(0)
        return True

    def take(self, key: str) -> Plane | None:
        """See `Known.take`."""
        plane = self._kept.pop(key, None)
        if plane is not None:
            self._bytes -= plane.nbytes
        return plane

    def _infer(self, name: str, path: Path) -> None:
        model = self._models.get(name)
        if model is None or not can_run_ahead(model):
            return
        (dataset,) = read_instances([path])
        if is_enhanced(dataset):
            return  # it is there with all its slices at once
        found = infer_alone(model, dataset)
        if found is not None:
            key, plane = found
            self._kept[key] = plane
            self._bytes += plane.nbytes
            self.made += 1
            self._forget(self._most_bytes)

    def _forget(self, most: int) -> None:
        while self._bytes > most:
            _, plane = self._kept.popitem(last=False)
            self._bytes -= plane.nbytes


def can_run_ahead(model: "Model") -> bool:
    """Whether a slice's result is known before its neighbours and its volume are."""
    manifest = model.package.manifest
    alone = manifest.input.slices == 1 and fixed_scales(manifest) is not None
    return alone and model.device == "cpu"


def infer_alone(model: "Model", dataset: Dataset) -> tuple[str, Plane] | None:
    """The key and the result of one slice; None: it cannot be decoded, or needs its volume.

    Raises:
        SeriesRefused, PackageError: it is no slice that the model takes.
    """
    unit = model.package.manifest.input.unit
    layout = layout_of([dataset], unit, min_slices=1, allow_lossy=True)
    decoding = Decoding(layout.datasets, layout.calibration, lambda slice_: slice_)
    if not decoding.decode(0):
        return None
    stages = Stages(lambda index: None, _no_volume)
    predicting = Predicting(model, layout, decoding, stages)
    return None if predicting.key(0) is None else predicting.one(0)


def _no_volume() -> SourcePlanes:
    raise AssertionError("a model of single slices asks for no volume")
