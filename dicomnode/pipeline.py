"""One series from datasets to derived datasets: the whole translation, no file and no socket."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from pydicom import Dataset

from dicomnode import __version__, qa
from dicomnode.derived import OutputOptions, derive_series
from dicomnode.imaging.inference import Model, predict
from dicomnode.imaging.volume import Volume, volume_from_datasets
from dicomnode.outputs import check_source
from dicomnode.provenance import Identity


@dataclass(frozen=True, slots=True)
class Translation:
    """A translated series; the derived instances are built one by one, as they are taken."""

    source: Volume
    prediction: Volume
    datasets: list[Dataset]
    """The source instances that were used, in slice order."""
    derived: Iterator[Dataset]
    findings: list[qa.Finding]

    @property
    def plausible(self) -> bool:
        return all(finding.ok for finding in self.findings)


def translate_series(
    datasets: Sequence[Dataset],
    model: Model,
    options: OutputOptions,
    now: datetime,
    *,
    allow_lossy: bool = False,
    flag_findings: bool = False,
) -> Translation:
    """Translate the instances of one series, in any order.

    Args:
        now: aware; the time of derivation written into the result. A repeat with the same time
            gives the same bytes.
        flag_findings: mark the description when QA finds the result implausible.

    Raises:
        SeriesRefused: the series is not a volume, or not what the model was accepted for.
        PackageError: the model cannot take it.
    """
    manifest = model.package.manifest
    source, ordered = volume_from_datasets(
        datasets,
        manifest.input.unit,
        min_slices=int(manifest.bounds.slices.min or 1),
        allow_lossy=allow_lossy,
    )
    check_source(ordered, manifest.task, accept_synthetic=True)  # the loop guard is the route's
    qa.check_bounds(source, ordered, model.package)
    prediction = predict(model, source)
    findings = qa.assess(source, prediction, model.package)
    if flag_findings and not all(finding.ok for finding in findings):
        options = qa_flagged(options)
    derived = derive_series(prediction, source, ordered, identity_of(model), options, now)
    return Translation(source, prediction, ordered, derived, findings)


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
    )


def qa_flagged(options: OutputOptions) -> OutputOptions:
    """The same options with QA FAILED in the description: other UIDs, and visible in a viewer."""
    return replace(options, description=f"QA FAILED {options.description}")
