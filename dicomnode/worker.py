"""A translating process: takes jobs, runs the pipeline; its crash is not the node's.

The seam is one function, `translate`: an order goes in, an outcome comes out, what was made lies
durably in the results folder before it returns. Models are loaded once, at start.
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from dicomnode.child import Child
from dicomnode.errors import DicomNodeError, OutOfResources, PackageError, SeriesRefused, WorkerLost
from dicomnode.imaging.package import ModelPackage
from dicomnode.imaging.stacks import StackOfImages, slices_in, usable_stacks
from dicomnode.orders import DerivedSeries, Order, Outcome, StackOutcome, Withdrawal
from dicomnode.part10 import MALFORMED, damage_in, read_instances
from dicomnode.sop_classes import COMPANIONS
from dicomnode.spool import sync_folder, write_durably

if TYPE_CHECKING:
    from pydicom import Dataset

    from dicomnode.imaging.inference import Model

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker's first message: which models it has loaded, and why not the others."""

    device: str
    seconds: float
    failures: Mapping[str, str]
    engines: Mapping[str, str] = field(default_factory=dict)
    """Per loaded model its engine, number format and device in words, and why no faster one."""


class Worker:
    """The node's handle on one translating process."""

    def __init__(
        self,
        packages: Mapping[str, ModelPackage],
        device: str,
        threads: int,
        precision: str = "auto",
        compiled: Path | None = None,
    ) -> None:
        """See `load_models`."""
        options = (device, threads, precision, compiled)
        self._child = Child("dicomnode-worker", run, dict(packages), *options)
        self.ready: Ready | None = None

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_ready(self, timeout: float) -> Ready | None:
        """The models are loaded; None: not within `timeout` seconds.

        Raises:
            WorkerLost: the process died while loading.
        """
        if self.ready is None:
            self.ready = self._child.receive(timeout)
        return self.ready

    def translate(self, order: Order | Withdrawal) -> Outcome:
        """Run one order to its end.

        Raises:
            WorkerLost: the process died; the order can run again elsewhere.
        """
        self._child.send(order)
        outcome = self._child.receive()
        if not isinstance(outcome, Outcome):
            raise WorkerLost("the worker sent no outcome")
        return outcome

    def stop(self, grace: float) -> None:
        self._child.stop(grace)


def run(
    connection: Connection,
    packages: Mapping[str, ModelPackage],
    device: str,
    threads: int,
    precision: str = "auto",
    compiled: Path | None = None,
) -> None:
    """The worker process: load the models, then translate until the pipe closes."""
    started = time.monotonic()
    models, failures, used = load_models(packages, device, threads, precision, compiled)
    engines = {name: model.words for name, model in models.items()}
    connection.send(Ready(used, time.monotonic() - started, failures, engines))
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        connection.send(translate(order, models, failures))


def load_models(
    packages: Mapping[str, ModelPackage],
    device: str,
    threads: int,
    precision: str = "auto",
    compiled: Path | None = None,
) -> tuple[dict[str, "Model"], dict[str, str], str]:
    """Load models and run their self-tests: the models, why others failed, the device used.

    Args:
        threads: of torch; 0 leaves its own choice.
        precision: as in config.yaml.
        compiled: folder where compiled forms of models are kept; None: they are not.
    """
    import torch  # here, so that the node process never pays for it

    from dicomnode.imaging.inference import load_model
    from dicomnode.qa import check_limits

    if threads:
        torch.set_num_threads(threads)
    used = device
    if device == "auto":
        used = "cuda" if torch.cuda.is_available() else "cpu"
    models: dict[str, Model] = {}
    failures: dict[str, str] = {}
    for name, package in packages.items():
        try:
            check_limits(package)
            models[name] = load_model(package, used, precision, compiled)
            log.info("model %s %s loaded: %s", name, package.version, models[name].words)
        except PackageError as error:
            failures[name] = str(error)
            log.error("model %s not loaded: %s", name, error)
    return models, failures, used


def translate(
    order: Order | Withdrawal, models: Mapping[str, "Model"], failures: Mapping[str, str]
) -> Outcome:
    """Run one order and write what it makes durably; every way it can end is an `Outcome`."""
    name = order.model
    try:
        if isinstance(order, Withdrawal):
            return _withdraw(order, models.get(name))
        if name not in models:
            return Outcome(broken="MODEL_NOT_LOADED", detail=failures.get(name, "unknown model"))
        return _translate(order, models[name])
    except SeriesRefused as refusal:
        return Outcome(refusal=refusal.code, detail=f"{refusal.message}; {refusal.remedy}")
    except DicomNodeError as error:
        return Outcome(broken=type(error).__name__, detail=str(error))
    except Exception as error:
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


def _translate(order: Order, model: "Model") -> Outcome:
    """Each stack on its own, one after the other; a refused one leaves the others alone."""
    from dicomnode.imaging.limits import check_one_patient

    headers = read_instances(order.files, pixels=False)
    check_one_patient(headers)
    paths: dict[str, Path] = {}
    for header, path in zip(headers, order.files, strict=True):
        paths.setdefault(str(header.SOPInstanceUID), path)
    split = usable_stacks(headers)
    series, stacks = [], []
    plausible, findings, words = True, {}, []
    for number, stack in enumerate(split.stacks, start=1):
        alone = len(split.stacks) == 1
        try:
            made = _translate_stack(
                order, model, stack, paths, 0 if alone else number, len(split.ignored)
            )
        except SeriesRefused as refusal:
            why = f"{refusal.message}; {refusal.remedy}"
            done = StackOutcome(stack.rule, len(stack.datasets), "", refusal.code, why)
            stacks.append(done)
            continue
        series.append(made.series[0])
        plausible = plausible and made.plausible
        of_stack = "" if alone else f"stack {number}: "
        findings.update({f"{of_stack}{name}": one for name, one in made.findings.items()})
        words.append(f"{of_stack}{made.detail}")
        stacks.append(
            StackOutcome(stack.rule, len(stack.datasets), made.derived_uid, detail=made.detail)
        )
    told = tuple(stacks)
    if not series:
        return Outcome(stacks=told, refusal=told[0].refusal, detail=told[0].detail)
    return Outcome(tuple(series), told, plausible, findings, detail="; ".join(words))


def _translate_stack(
    order: Order,
    model: "Model",
    stack: StackOfImages,
    paths: Mapping[str, Path],
    number: int,
    ignored: int,
) -> Outcome:
    """One stack, whose pixels are read only now; `number`: 0 if it is the only one."""
    from dicomnode.companions import CompanionOptions
    from dicomnode.derived import OutputOptions
    from dicomnode.pipeline import translate_series
    from dicomnode.qa import findings_as_data

    if stack.refusal is not None:
        raise stack.refusal
    uids = dict.fromkeys(str(header.SOPInstanceUID) for header in stack.datasets)
    translation = translate_series(
        slices_in(stack, read_instances([paths[uid] for uid in uids])),
        model,
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
        companions=CompanionOptions(order.companions.gsps, order.companions.report, order.qa),
        withdrawn=order.withdrawn,
        ignored=ignored,
    )
    plausible = translation.plausible or order.qa != "gate"
    series = replace(write_series(translation.derived, order.results), stack=stack.rule)
    words = ", ".join(str(finding) for finding in translation.findings)
    findings = findings_as_data(translation.findings)
    return Outcome((series,), plausible=plausible, findings=findings, detail=words)


def _withdraw(order: Withdrawal, model: "Model | None") -> Outcome:
    """The Key Object Selection that withdraws an earlier result."""
    from dicomnode.companions import RETRACTION, companion_number
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


def write_series(datasets: "Iterable[Dataset]", results: Path) -> DerivedSeries:
    """Write a derived series and what goes with it as Part 10 files, durably, into one folder.

    The folder is named by the first series. A file that is there already is kept: its UID says
    what is in it, and somebody may have it.

    Raises:
        OutOfResources: the disk refuses.
    """
    made: list[Path] = []
    try:
        return _write_series(datasets, results, made)
    except (OSError, OutOfResources) as error:
        for path in made:  # half a series only takes room
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        why = error.strerror if isinstance(error, OSError) else error
        raise OutOfResources(str(why)) from error


def _write_series(datasets: "Iterable[Dataset]", results: Path, made: list[Path]) -> DerivedSeries:
    """`made` grows by every file that was not there before."""
    from io import BytesIO

    instances: list[tuple[str, str]] = []
    companions: list[tuple[str, str]] = []
    folder, uid = results, ""
    for dataset in datasets:
        if not instances:
            uid = str(dataset.SeriesInstanceUID)
            folder = results / uid
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(results)
        path = folder / f"{dataset.SOPInstanceUID}.dcm"
        if not path.exists():
            buffer = BytesIO()
            dataset.save_as(buffer, enforce_file_format=True)
            made.append(path)
            write_durably(path, buffer.getvalue())
        kind = instances if dataset.SeriesInstanceUID == uid else companions
        kind.append((str(dataset.SOPInstanceUID), str(dataset.SOPClassUID)))
    sync_folder(folder)
    return DerivedSeries(uid, tuple(instances), companions=tuple(companions))
