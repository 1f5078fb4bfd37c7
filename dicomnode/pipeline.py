"""One series from datasets to derived datasets: the whole translation, no file and no socket."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256

from pydicom import Dataset

from dicomnode import __version__, qa
from dicomnode.companions import CompanionOptions, with_companions
from dicomnode.derived import OutputOptions, derive_series, derived_series_uid, slice_key
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
    companions: CompanionOptions | None = None,
    withdrawn: Container[str] = frozenset(),
    ignored: int = 0,
) -> Translation:
    """Translate the instances of one series, or of one of its stacks, in any order.

    Args:
        now: aware; the time of derivation written into the result. A repeat with the same time
            gives the same bytes.
        flag_findings: mark the description when QA finds the result implausible.
        companions: which follow the derived instances; None: none.
        withdrawn: derived SeriesInstanceUIDs that an archive was told to reject: never used again.
        ignored: instances of the series that are no slice of any stack; told with the findings.

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
    findings = [*qa.assess(source, prediction, model.package), *qa.observations(source, ignored)]
    if flag_findings and not all(finding.ok for finding in findings):
        options = qa_flagged(options)
    identity = identity_of(model)
    options = _never_used_again(options, source, ordered, identity, withdrawn)
    derived = derive_series(prediction, source, ordered, identity, options, now)
    if companions is not None:
        derived = with_companions(derived, findings, identity, companions, now)
    return Translation(source, prediction, ordered, derived, findings)


def _never_used_again(
    options: OutputOptions,
    source: Volume,
    ordered: Sequence[Dataset],
    identity: Identity,
    withdrawn: Container[str],
) -> OutputOptions:
    """The same options with the first generation whose UIDs were not withdrawn."""
    keys = [slice_key(dataset) for dataset in ordered]
    digests = dict(zip(keys, source.digests, strict=True))
    while derived_series_uid(digests, identity.digest, options) in withdrawn:
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
        remark=manifest.dicom.remark,
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
