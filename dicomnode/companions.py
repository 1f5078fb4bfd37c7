"""Which companions a derived series gets, and under which numbers: its GSPS and its reports."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset

from dicomnode.classification import Classification
from dicomnode.label import presentable_together, presentation_state
from dicomnode.numbering import CLASSIFIER, GSPS, QA_REPORT, companion_number
from dicomnode.provenance import Identity
from dicomnode.qa import Finding
from dicomnode.report import Gate, qa_report

_PIXELS = 0x7FE00010


@dataclass(frozen=True, slots=True)
class CompanionOptions:
    """What a route says about companions.

    Attributes:
        gsps: window: a label and the windows of the images; label: the label alone; none.
        report: a QA report.
        gate: what the route does with an implausible result; said in the report.
    """

    gsps: Literal["window", "label", "none"] = "window"
    report: bool = True
    gate: Gate = "gate"


def companions(
    derived: Sequence[Dataset],
    findings: Sequence[Finding],
    identity: Identity,
    options: CompanionOptions,
    now: datetime,
) -> list[Dataset]:
    """The companions of one derived series, ready to be written; a repeat gives the same bytes.

    Args:
        derived: its instances, or their headers (`header_of`).
        findings: as from `qa.assess`.
        now: aware; that of the derivation.
    """
    made: list[Dataset] = []
    number = derived[0].SeriesNumber
    if options.gsps != "none":
        for part, images in enumerate(_presentable(derived), 1):
            made.append(
                presentation_state(
                    images,
                    identity,
                    now,
                    series_number=companion_number(number, GSPS),
                    window=options.gsps == "window",
                    part=part,
                )
            )
    if options.report:
        number = companion_number(number, QA_REPORT)
        made.append(
            qa_report(derived, findings, identity, now, series_number=number, gate=options.gate)
        )
    return made


def with_companions(
    derived: Iterable[Dataset],
    findings: Sequence[Finding],
    identity: Identity,
    options: CompanionOptions,
    now: datetime,
    classification: Classification | None = None,
) -> Iterator[Dataset]:
    """The instances of a derived series one by one as they are made, then their companions.

    Args:
        classification: looks at each image; its report comes last, if it can make one.
    """
    headers = []
    if classification is not None:
        classification.start()
    for image in derived:
        headers.append(header_of(image))
        if classification is not None:
            classification.look(image)
        yield image
    yield from companions(headers, findings, identity, options, now)
    if classification is not None:
        number = companion_number(headers[0].SeriesNumber, CLASSIFIER)
        yield from classification.reports(headers, now, number)


def _presentable(derived: Sequence[Dataset]) -> Iterator[list[Dataset]]:
    """Images by the Modality LUT: the standard has one per presentation state (PS3.3 A.33.1)."""
    groups: dict[tuple[str, ...], list[Dataset]] = {}
    for image in derived:
        groups.setdefault(presentable_together(image), []).append(image)
    yield from groups.values()


def header_of(derived: Dataset) -> Dataset:
    """A derived instance without its pixels; elements are shared."""
    header = Dataset({tag: element for tag, element in derived.items() if tag != _PIXELS})
    header.file_meta = FileMetaDataset(derived.file_meta)
    return header
