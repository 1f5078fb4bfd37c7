"""What passes between node and worker: the order, and what became of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from dicomnode.config import Companions, Route
from dicomnode.serving import Serving


@dataclass(frozen=True, slots=True)
class Order:
    """One job, as the worker needs it."""

    model: str
    series_number: int | str
    description: str
    qa: Literal["gate", "flag", "off"]
    allow_lossy: bool
    companions: Companions
    label: Literal["none", "burned"]
    files: tuple[Path, ...]
    results: Path
    """Folder under which each derived series gets its own."""
    now: datetime
    """Aware; written into the derived series. The same on every repeat of the job."""
    withdrawn: frozenset[str] = frozenset()
    """Derived SeriesInstanceUIDs that were withdrawn before, and must not be used again."""

    @classmethod
    def of(
        cls,
        route: Route,
        files: tuple[Path, ...],
        results: Path,
        now: datetime,
        withdrawn: frozenset[str] = frozenset(),
    ) -> "Order":
        options = (route.series_number, route.description, route.qa, route.allow_lossy)
        beside = (route.companions, route.label)
        return cls(route.model, *options, *beside, files, results, now, withdrawn)


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """The job to withdraw what an earlier job made."""

    model: str
    """Of its route; it names the software that withdraws, if it is there."""
    made: tuple[tuple[str, str, str], ...]
    """(SeriesInstanceUID, SOP Instance UID, SOP Class UID) of every instance to withdraw."""
    source: Path
    """An instance of the source series: for the patient and study, where results are gone."""
    results: Path
    now: datetime
    """Aware; written into the document. The same on every repeat of the job."""


@dataclass(frozen=True, slots=True)
class Request:
    """An order on its way to the worker; a more urgent one is done first, between two batches."""

    job: int
    priority: int
    """As `jobs.PRIORITIES`: the smaller, the more urgent."""
    order: Order | Withdrawal


@dataclass(frozen=True, slots=True)
class Cancel:
    """A job that is not wanted any more."""

    job: int


@dataclass(frozen=True, slots=True)
class Arriving:
    """Files of a series that is not complete yet: its slices may be inferred ahead."""

    series_uid: str
    model: str
    files: tuple[Path, ...]
    """Those that were not told before."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a job."""

    job: int
    outcome: "Outcome"


@dataclass(frozen=True, slots=True)
class DerivedSeries:
    """One derived series and what goes with it, in the folder of its UID under the results."""

    uid: str
    instances: tuple[tuple[str, str], ...]
    """(SOP Instance UID, SOP Class UID), in the order of sending."""
    stack: str = ""
    """What tells its source stack from others of the series; empty: there is only one."""
    companions: tuple[tuple[str, str], ...] = ()
    """The same of its presentation states and reports, which are in series of their own."""

    def files(self) -> tuple[tuple[str, str], ...]:
        """(SOP Instance UID, SOP Class UID) of the images, then of their companions."""
        return self.instances + self.companions


@dataclass(frozen=True, slots=True)
class StackOutcome:
    """What became of one stack of the source series."""

    rule: str
    """What tells it from the others, in words; empty: there are no others."""
    slices: int
    derived_uid: str = ""
    refusal: str = ""
    """Code of a refusal; empty: not refused."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an order."""

    series: tuple[DerivedSeries, ...] = ()
    """One per stack that was translated, the largest stack first."""
    stacks: tuple[StackOutcome, ...] = ()
    """Every stack of the source series, the largest first."""
    plausible: bool = True
    """False if QA gates any of the series: then none is sent."""
    findings: Mapping[str, Any] = field(default_factory=dict)
    unclassified: int = 0
    """How many of the series lack the report of the route's classifier; `detail` says why."""
    refusal: str = ""
    """Code of the first refusal, if no stack could be translated; empty: not refused."""
    broken: str = ""
    """Kind of an unexpected error; empty: none. The traceback is in the log."""
    detail: str = ""
    halved: int = 0
    """How often a batch was halved because memory ran out."""
    ahead: int = 0
    """How many slices had been inferred while the series still arrived."""
    serving: Mapping[str, Serving] = field(default_factory=dict)
    """What runs each model by now: an engine that failed on the way has given way."""

    @property
    def derived_uid(self) -> str:
        """Of the first derived series; empty: there is none."""
        return self.series[0].uid if self.series else ""


def stacks_as_data(outcome: Outcome) -> list[dict[str, Any]]:
    """Every stack as the journal keeps it, with its ``text`` for the timeline.

    Nothing of an ordinary series: its only stack is told with the job.
    """
    if len(outcome.stacks) < 2:
        return []
    told = []
    for number, stack in enumerate(outcome.stacks, start=1):
        what = f"stack {number} of {len(outcome.stacks)} ({stack.rule}), {stack.slices} slices"
        became = f"derived series {stack.derived_uid}"
        if stack.refusal:
            became = f"refused: {stack.refusal}: {stack.detail}"
        told.append({**asdict(stack), "text": f"{what}: {became}"})
    return told
