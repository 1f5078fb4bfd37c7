"""One series from datasets to derived datasets: the whole translation, no file and no socket."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from typing import Any, TypeVar

from pydicom import Dataset

from dicomnode import __version__, qa
from dicomnode.classification import Classification
from dicomnode.companions import CompanionOptions, with_companions
from dicomnode.derived import OutputOptions, derive_series, derived_series_uid, slice_key
from dicomnode.imaging.decoding import Decoding
from dicomnode.imaging.engines import EngineError
from dicomnode.imaging.inference import Model
from dicomnode.imaging.layout import Layout, layout_of
from dicomnode.imaging.planes import Plane, Planes, PredictedPlanes, SourcePlanes
from dicomnode.imaging.streaming import Predicting, Stages
from dicomnode.measuring import Change
from dicomnode.outputs import check_source
from dicomnode.provenance import Identity

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Translation:
    """A translated series; the derived instances are built one by one, as they are taken."""

    source: Planes
    prediction: Planes
    datasets: list[Dataset]
    """The source instances that were used, in slice order."""
    derived: Iterator[Dataset]
    findings: list[qa.Finding]

    @property
    def plausible(self) -> bool:
        return all(finding.ok for finding in self.findings)


@dataclass(frozen=True, slots=True)
class Task:
    """What a translation shall be like.

    Attributes:
        now: aware; the time of derivation written into the result. A repeat with the same time
            gives the same bytes.
        allow_lossy: translate what lossy compression has left.
        flag_findings: mark the description when QA finds the result implausible.
        companions: which follow the derived instances; None: none.
        classification: looks at the derived instances, as their last companion.
        withdrawn: derived SeriesInstanceUIDs that an archive was told to reject: never used again.
        ignored: instances of the series that are no slice of any stack; told with the findings.
    """

    options: OutputOptions
    now: datetime
    allow_lossy: bool = False
    flag_findings: bool = False
    companions: CompanionOptions | None = None
    classification: Classification | None = None
    withdrawn: Container[str] = frozenset()
    ignored: int = 0


def translate_series(
    datasets: Sequence[Dataset], model: Model, options: OutputOptions, now: datetime, **more: Any
) -> Translation:
    """Translate the instances of one series, or of one of its stacks, in any order.

    One step after the other on this thread. `stages.stream` does the same with the steps
    overlapped, and gives the same bytes.

    Args:
        more: attributes of `Task`.

    Raises:
        SeriesRefused: the series is not a volume, or not what the model was accepted for.
        PackageError: the model cannot take it.
    """
    task = Task(options, now, **more)
    layout = layout_for(datasets, model, task)
    decoding = Decoding(layout.datasets, layout.calibration, lambda dataset: dataset)
    for index in range(len(layout.datasets)):
        decoding.decode(index)
    source = checked_source(layout, decoding, model)
    stages = Stages(lambda index: None, lambda: source)

    def attempt() -> tuple[dict[int, Plane], Change]:
        change = qa.change_of(layout, model.package)
        predicting = Predicting(model, layout, decoding, stages)
        return dict(measured(predicting, decoding, change)), change

    results, change = with_fallback(model, attempt)
    prediction = prediction_of(results, source, model)
    findings = findings_of(change, source, model, task)
    identity = identity_of(model)
    options = final_options(task, findings, source, identity)
    derived = derive_series(prediction, source, source.datasets, identity, options, now)
    if task.companions is not None:
        beside = (findings, identity, task.companions, now, task.classification)
        derived = with_companions(derived, *beside)
    return Translation(source, prediction, source.datasets, derived, findings)


def layout_for(datasets: Sequence[Dataset], model: Model, task: Task) -> Layout:
    """The slices in order, refused where their headers tell that the model must not take them.

    Raises:
        SeriesRefused: see `layout_of`, `check_source` and `qa.check_headers`.
    """
    manifest = model.package.manifest
    layout = layout_of(
        datasets,
        manifest.input.unit,
        min_slices=int(manifest.bounds.slices.min or 1),
        allow_lossy=task.allow_lossy,
    )
    # the loop guard is the route's
    check_source(layout.datasets, manifest.task, accept_synthetic=True)
    qa.check_headers(layout.datasets, model.package)
    return layout


def checked_source(layout: Layout, decoding: Decoding, model: Model) -> SourcePlanes:
    """All slices were decoded: what is there, refused where the model must not take it.

    Raises:
        SeriesRefused: see `SourcePlanes` and `qa.check_bounds`.
    """
    source = SourcePlanes(layout, decoding)
    qa.check_bounds(source, source.datasets, model.package)
    return source


def measured(
    predicting: Predicting, decoding: Decoding, change: Change
) -> Iterator[tuple[int, Plane]]:
    """`Predicting.planes`, each given to `change` with its source."""
    for index, plane in predicting.planes():
        change.add(decoding[index].plane(), decoding[index].padding(), plane)
        yield index, plane


def with_fallback(model: Model, attempt: Callable[[], Made]) -> Made:
    """`attempt`; if an engine fails, again with the reference, with which the model then stays.

    Raises:
        EngineError: the reference fails too.
    """
    try:
        return attempt()
    except EngineError as error:
        model.fall_back(error)
        return attempt()


def prediction_of(
    results: Mapping[int, Plane], source: SourcePlanes, model: Model
) -> PredictedPlanes:
    """The results of the slices that are kept, on the grid of `source`."""
    planes = [results[index] for index in source.kept]
    return PredictedPlanes(planes, model.package.manifest.output.unit, source)


def findings_of(change: Change, source: SourcePlanes, model: Model, task: Task) -> list[qa.Finding]:
    """What QA measured, and what a reader should know of the source."""
    return [
        *qa.findings_of(change, model.package),
        *qa.observations(source, task.ignored),
    ]


def final_options(
    task: Task, findings: Sequence[qa.Finding], source: SourcePlanes, identity: Identity
) -> OutputOptions:
    """The task's options, marked if QA failed; with the first generation that was not withdrawn."""
    options = task.options
    if task.flag_findings and not all(finding.ok for finding in findings):
        options = qa_flagged(options)
    keys = [slice_key(dataset) for dataset in source.datasets]
    digests = dict(zip(keys, source.digests, strict=True))
    while derived_series_uid(digests, identity.digest, options) in task.withdrawn:
        options = replace(options, generation=options.generation + 1)
    return options


def identity_of(model: Model) -> Identity:
    """Who derives, as written into every derived instance."""
    manifest = model.package.manifest
    return Identity(
        name=manifest.name,
        version=manifest.version,
        digest=model.package.digest,
        architecture=manifest.generator.architecture,
        task=manifest.task,
        algorithm_name=manifest.dicom.algorithm_name,
        algorithm_family=manifest.dicom.algorithm_family,
        algorithm_version=manifest.dicom.algorithm_version,
        node_version=__version__,
        precision=f"{model.precision} {model.device.partition(':')[0]}",
        remark=f"{manifest.dicom.remark} NOT HU".strip()
        if manifest.not_hu
        else manifest.dicom.remark,
    )


def node_identity() -> Identity:
    """Who withdraws a result whose model is not there any more: the node itself."""
    return Identity(
        name="dicomnode",
        version=__version__,
        digest=sha256(f"dicomnode {__version__}".encode()).hexdigest(),
        architecture="",
        task="",
        algorithm_name="dicomnode",
        algorithm_family="",
        algorithm_version=__version__,
        node_version=__version__,
        precision="",
    )


def qa_flagged(options: OutputOptions) -> OutputOptions:
    """The same options with QA FAILED in the description: other UIDs, and visible in a viewer."""
    return replace(options, description=f"QA FAILED {options.description}")
