"""One stack with the steps overlapped: decode, infer, build and write, each on slices of its own.

thread decode  one slice after the other; kept as stored
this thread    infers, batch by batch, what is decoded, and measures it
thread build   makes instances of what is inferred, and gives them to the sink, which writes

What instances look like depends on the whole series: their UIDs on all pixels, their encoding on
whether all results fit that of the source, their description on QA. Building begins as soon as
everything is decoded, in the belief that all will fit and that QA will find no fault. Where that
was wrong, the sink starts again.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from pydicom import Dataset

from dicomnode import qa
from dicomnode.companions import companions, header_of, with_companions
from dicomnode.derived import OutputOptions, derive_series, storage_ahead
from dicomnode.encodings import DoesNotFit, Storage
from dicomnode.imaging.decoding import Decoding, WithPixels
from dicomnode.imaging.inference import Model
from dicomnode.imaging.planes import Plane, PredictedPlanes, SourcePlanes
from dicomnode.imaging.streaming import Known, Predicting, Stages
from dicomnode.imaging.units import Unit
from dicomnode.measuring import Change
from dicomnode.pipeline import (
    Task,
    checked_source,
    final_options,
    findings_of,
    identity_of,
    layout_for,
    measured,
    prediction_of,
    with_fallback,
)
from dicomnode.provenance import Identity


class Sink(Protocol):
    """Where derived instances go, one by one; called by one thread at a time."""

    def add(self, dataset: Dataset) -> None:
        """Take one; waits while it has too many."""

    def restart(self) -> None:
        """Forget what was added."""


class Stream:
    """One stack on its way to a sink: the same instances as `pipeline.translate_series`.

    Attributes:
        findings: of QA, after `run`.
        halved: how often a batch was halved because memory ran out.
        known: how many slices had been inferred before.
        early: whether instances that were built while others were still inferred could be kept.
    """

    def __init__(self, datasets: Sequence[Dataset], model: Model, task: Task, sink: Sink) -> None:
        """
        Raises:
            SeriesRefused: headers tell that the model must not take them.
        """
        self._model, self._task, self._sink = model, task, sink
        self._layout = layout_for(datasets, model, task)
        self._source: SourcePlanes | None = None
        self.findings: list[qa.Finding] = []
        self.halved = self.known = 0
        self.early = False

    @property
    def plausible(self) -> bool:
        return all(finding.ok for finding in self.findings)

    def run(
        self,
        with_pixels: WithPixels = lambda dataset: dataset,
        between: Callable[[], object] = lambda: None,
        known: Known | None = None,
    ) -> None:
        """From the first slice to the last companion in the sink.

        Args:
            between: called on this thread before each batch; it may do more urgent work, or raise.

        Raises:
            SeriesRefused: the series is not a volume, or not what the model was accepted for.
            PackageError: the model cannot take it.
            OutOfMemory: not even one slice fits.
        """
        decoding = Decoding(self._layout.datasets, self._layout.calibration, with_pixels)
        with ThreadPoolExecutor(1, "decode") as decode, ThreadPoolExecutor(1, "build") as build:
            slices = [decode.submit(decoding.decode, i) for i in range(self._layout.shape[0])]
            stages = Stages(
                lambda index: slices[index].result(),
                lambda: self._whole(slices, decoding),
                between,
                known,
            )
            try:
                with_fallback(self._model, lambda: self._attempt(slices, decoding, stages, build))
            finally:
                for slice_ in slices:
                    slice_.cancel()

    def _whole(self, slices: Sequence[Future[bool]], decoding: Decoding) -> SourcePlanes:
        """The source when every slice was decoded."""
        for slice_ in slices:
            slice_.result()
        if self._source is None:
            self._source = checked_source(self._layout, decoding, self._model)
        return self._source

    def _attempt(
        self,
        slices: Sequence[Future[bool]],
        decoding: Decoding,
        stages: Stages,
        build: ThreadPoolExecutor,
    ) -> None:
        self._sink.restart()
        predicting = Predicting(self._model, self._layout, decoding, stages)
        change = qa.change_of(self._layout, self._model.package)
        results: dict[int, Plane] = {}
        building: _Building | None = None
        try:
            for index, plane in measured(predicting, decoding, change):
                results[index] = plane
                if building is not None:
                    building.put(index, plane)
                elif slices[-1].done():
                    building = self._begin(self._whole(slices, decoding), results, build)
            if building is None:
                building = self._begin(self._whole(slices, decoding), results, build)
            self.halved, self.known = self.halved + predicting.halved, predicting.known
            self._finish(results, change, stages.wait_all(), building)
        finally:
            if building is not None:
                building.give_up()

    def _begin(
        self, source: SourcePlanes, results: Mapping[int, Plane], build: ThreadPoolExecutor
    ) -> "_Building | None":
        """Start to build, if anything can be built yet."""
        task, identity = self._task, identity_of(self._model)
        if task.classification is not None:  # it looks at each image, once
            return None
        coming = _Coming(source, self._model.package.manifest.output.unit)
        storage = storage_ahead(coming, source, source.datasets, identity.task, task.options)
        if storage is None:
            return None
        options = final_options(task, (), source, identity)
        building = _Building(coming, storage, identity, options, task, self._sink)
        for index, plane in results.items():
            building.put(index, plane)
        building.start(build)
        return building

    def _finish(
        self,
        results: Mapping[int, Plane],
        change: Change,
        source: SourcePlanes,
        building: "_Building | None",
    ) -> None:
        """Everything is inferred: keep what was built, or build now; then the companions."""
        task, identity = self._task, identity_of(self._model)
        self.findings = findings_of(change, source, self._model, task)
        options = final_options(task, self.findings, source, identity)
        self.early = building is not None and options == building.options and building.fits()
        if building is not None and self.early:
            beside = task.companions
            if beside is not None:
                for companion in companions(
                    building.headers, self.findings, identity, beside, task.now
                ):
                    self._sink.add(companion)
            return
        if building is not None:
            building.give_up()
            self._sink.restart()
        prediction = prediction_of(results, source, self._model)
        derived = derive_series(prediction, source, source.datasets, identity, options, task.now)
        if task.companions is not None:
            derived = with_companions(
                derived, self.findings, identity, task.companions, task.now, task.classification
            )
        for dataset in derived:
            self._sink.add(dataset)


class _GivenUp(Exception):
    """Nobody wants any more what is being built."""


class _Coming(PredictedPlanes):
    """Results that come one after the other; who asks for one waits for it."""

    def __init__(self, source: SourcePlanes, unit: Unit) -> None:
        super().__init__((), unit, source)
        self.source = source
        self._there: dict[int, Plane] = {}
        self._changed = threading.Condition()
        self._given_up = False

    def put(self, index: int, plane: Plane) -> None:
        """The result of a slice of the layout."""
        with self._changed:
            self._there[index - self.source.kept.start] = plane
            self._changed.notify_all()

    def give_up(self) -> None:
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def plane(self, index: int) -> Plane:
        with self._changed:
            self._changed.wait_for(lambda: self._given_up or index in self._there)
            if self._given_up:
                raise _GivenUp
            return self._there[index]


class _Building:
    """Instances that are built while later slices are still inferred."""

    def __init__(
        self,
        coming: _Coming,
        storage: Storage,
        identity: Identity,
        options: OutputOptions,
        task: Task,
        sink: Sink,
    ) -> None:
        self._coming, self._storage, self._identity = coming, storage, identity
        self.options, self._task, self._sink = options, task, sink
        self.headers: list[Dataset] = []
        self._built: Future[bool] | None = None

    def start(self, pool: ThreadPoolExecutor) -> None:
        self._built = pool.submit(self._build)

    def put(self, index: int, plane: Plane) -> None:
        self._coming.put(index, plane)

    def fits(self) -> bool:
        """Whether every slice fitted, when all are built."""
        return self._built is not None and self._built.result()

    def give_up(self) -> None:
        """Stop, and wait until the sink is free."""
        self._coming.give_up()
        if self._built is not None:
            self._built.exception()

    def _build(self) -> bool:
        source = self._coming.source
        derived = derive_series(
            self._coming,
            source,
            source.datasets,
            self._identity,
            self.options,
            self._task.now,
            storage=self._storage,
        )
        try:
            for image in derived:
                self.headers.append(header_of(image))
                self._sink.add(image)
        except (DoesNotFit, _GivenUp):
            return False
        return True
