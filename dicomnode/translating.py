"""One order in the worker: its files are read, its stacks translated, what is made is written.

The seam is one function, `translate`: an order goes in, an outcome comes out, what was made lies
durably in the results folder before it returns.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dicomnode.deferred import with_pixels
from dicomnode.errors import Cancelled, DeviceLost, DicomNodeError, OutOfMemory, SeriesRefused
from dicomnode.imaging.limits import check_one_patient
from dicomnode.imaging.stacks import StackOfImages, slices_in, usable_stacks
from dicomnode.orders import DerivedSeries, Order, Outcome, StackOutcome, Withdrawal
from dicomnode.part10 import MALFORMED, damage_in, read_instances
from dicomnode.results import Draft, write_series
from dicomnode.sop_classes import COMPANIONS

if TYPE_CHECKING:
    from pydicom import Dataset

    from dicomnode.classification import Classifiers
    from dicomnode.imaging.inference import Model
    from dicomnode.imaging.streaming import Known
    from dicomnode.pipeline import Task

log = logging.getLogger(__name__)


def translate(
    order: Order | Withdrawal,
    models: Mapping[str, "Model"],
    failures: Mapping[str, str],
    classifiers: "Classifiers | None" = None,
    between: Callable[[], object] = lambda: None,
    known: "Known | None" = None,
) -> Outcome:
    """Run one order and write what it makes durably; every way it can end is an `Outcome`, but one.

    Args:
        between: called before each batch; it may do more urgent work, or raise `Cancelled`.
        known: results of slices that were made before.

    Raises:
        DeviceLost: this process can translate nothing more; the order can run again in another.
    """
    name = order.model
    try:
        if isinstance(order, Withdrawal):
            return _withdraw(order, models.get(name))
        if name not in models:
            return Outcome(broken="MODEL_NOT_LOADED", detail=failures.get(name, "unknown model"))
        return _Translating(order, models[name], classifiers, between, known).run()
    except SeriesRefused as refusal:
        return Outcome(refusal=refusal.code, detail=f"{refusal.message}; {refusal.remedy}")
    except Cancelled:
        return Outcome(broken=Cancelled.__name__, detail="given up between two batches")
    except DeviceLost:
        raise  # the worker ends with it: a new one may have the device again
    except MemoryError:
        return Outcome(broken=OutOfMemory.__name__, detail="no memory left")
    except DicomNodeError as error:
        return Outcome(broken=type(error).__name__, detail=str(error))
    except Exception as error:  # one job that breaks must not end the worker
        damage = _damage(order, error) if isinstance(order, Order) else ""
        if damage:
            return Outcome(refusal="UNREADABLE", detail=f"{damage}; send it again")
        log.exception("translation failed")
        return Outcome(broken=type(error).__name__, detail="unexpected; traceback in the log")


def _damage(order: Order, error: Exception) -> str:
    """What in the sources explains an unexpected error; empty: nothing, so the fault is ours."""
    if isinstance(error, RecursionError):
        return "sequences are nested too deep"
    try:
        read = read_instances(order.files, pixels=False) if isinstance(error, MALFORMED) else []
    except SeriesRefused as refusal:
        return refusal.message
    return damage_in(read)


class _Translating:
    """Each stack of a series on its own, one after the other; a refused one leaves the others."""

    def __init__(
        self,
        order: Order,
        model: "Model",
        classifiers: "Classifiers | None",
        between: Callable[[], object],
        known: "Known | None",
    ) -> None:
        self._order, self._model, self._classifiers = order, model, classifiers
        self._between, self._known = between, known
        self._series: list[DerivedSeries] = []
        self._stacks: list[StackOutcome] = []
        self._plausible, self._unclassified, self._halved, self._ahead = True, 0, 0, 0
        self._findings: dict[str, Any] = {}
        self._words: list[str] = []

    def run(self) -> Outcome:
        headers = read_instances(self._order.files, pixels="later")
        check_one_patient(headers)
        paths: dict[str, Path] = {}
        for header, path in zip(headers, self._order.files, strict=True):
            paths.setdefault(str(header.SOPInstanceUID), path)
        split = usable_stacks(headers)
        ignored = len(split.ignored)
        for number, stack in enumerate(split.stacks, start=1):
            try:
                self._stack(stack, paths, 0 if len(split.stacks) == 1 else number, ignored)
            except SeriesRefused as refusal:
                why = f"{refusal.message}; {refusal.remedy}"
                done = StackOutcome(stack.rule, len(stack.datasets), "", refusal.code, why)
                self._stacks.append(done)
        told = tuple(self._stacks)
        if not self._series:
            return Outcome(stacks=told, refusal=told[0].refusal, detail=told[0].detail)
        return Outcome(
            tuple(self._series),
            told,
            self._plausible,
            self._findings,
            self._unclassified,
            detail="; ".join(self._words),
            halved=self._halved,
            ahead=self._ahead,
        )

    def _stack(
        self,
        stack: StackOfImages,
        paths: Mapping[str, Path],
        number: int,
        ignored: int,
    ) -> None:
        """One stack, whose pixels are read only now; `number`: 0 if it is the only one."""
        from dicomnode.qa import findings_as_data
        from dicomnode.stages import Stream

        if stack.refusal is not None:
            raise stack.refusal
        task = self._task(stack, number, ignored)
        with Draft(self._order.results) as draft:
            stream = Stream(_slices(stack, paths), self._model, task, draft)
            stream.run(with_pixels, self._between, self._known)
            made = replace(draft.commit(), stack=stack.rule)
        of_stack = f"stack {number}: " if number else ""
        missing = str(task.classification or "")
        words = ", ".join(filter(None, [*map(str, stream.findings), missing]))
        self._series.append(made)
        self._plausible &= stream.plausible or self._order.qa != "gate"
        self._unclassified += bool(missing)
        self._halved, self._ahead = self._halved + stream.halved, self._ahead + stream.known
        findings = findings_as_data(stream.findings)
        self._findings.update({f"{of_stack}{name}": one for name, one in findings.items()})
        self._words.append(f"{of_stack}{words}")
        slices = len(stack.datasets)
        self._stacks.append(StackOutcome(stack.rule, slices, made.uid, detail=words))

    def _task(self, stack: StackOfImages, number: int, ignored: int) -> "Task":
        from dicomnode.companions import CompanionOptions
        from dicomnode.derived import OutputOptions
        from dicomnode.pipeline import Task

        order, beside = self._order, self._order.companions
        classifiers = self._classifiers
        return Task(
            OutputOptions(
                order.series_number,
                order.description,
                label=order.label,
                stack=number,
                stack_name=stack.name if number else "",
            ),
            order.now,
            allow_lossy=order.allow_lossy,
            flag_findings=order.qa == "flag",
            companions=CompanionOptions(beside.gsps, beside.report, order.qa),
            classification=classifiers.for_series(beside.classifier) if classifiers else None,
            withdrawn=order.withdrawn,
            ignored=ignored,
        )


def _slices(stack: StackOfImages, paths: Mapping[str, Path]) -> "list[Dataset]":
    """The slices of a stack: pixel data to be read later where it can be, else whole."""
    if all("PixelData" in header for header in stack.datasets):
        return stack.datasets
    uids = dict.fromkeys(str(header.SOPInstanceUID) for header in stack.datasets)
    return slices_in(stack, read_instances([paths[uid] for uid in uids]))


def _withdraw(order: Withdrawal, model: "Model | None") -> Outcome:
    """The Key Object Selection that withdraws an earlier result."""
    from dicomnode.numbering import RETRACTION, companion_number
    from dicomnode.pipeline import identity_of, node_identity
    from dicomnode.report import retraction

    headers = [header for made in order.made if (header := _made_header(order, *made))]
    document = retraction(
        headers,
        identity_of(model) if model else node_identity(),
        order.now,
        series_number=companion_number(headers[0].get("SeriesNumber"), RETRACTION),
    )
    series = write_series([document], order.results)
    return Outcome((series,), detail=f"{len(headers)} instances to be withdrawn")


def _made_header(order: Withdrawal, derived_uid: str, uid: str, sop_class: str) -> "Dataset | None":
    """The header of a stored result; of its source, renamed, where retention deleted it.

    None: a deleted companion, whose own series nobody knows any more.
    """
    try:
        return read_instances([order.results / derived_uid / f"{uid}.dcm"], pixels=False)[0]
    except SeriesRefused:
        log.info("result %s is not there: withdrawn by what its source says", uid)
    if sop_class in COMPANIONS:
        return None
    header = read_instances([order.source], pixels=False)[0]
    header.SeriesInstanceUID, header.SOPInstanceUID = derived_uid, uid
    header.SOPClassUID, header.SyntheticData = sop_class, "YES"
    return header
