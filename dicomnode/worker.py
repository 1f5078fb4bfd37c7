"""A translating process: takes jobs, runs the pipeline; its crash is not the node's.

The seam is one function, `translate`: an order goes in, an outcome comes out, the derived
instances lie durably in the results folder before it returns. Models are loaded once, at start.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dicomnode.child import Child
from dicomnode.config import Route
from dicomnode.errors import DicomNodeError, PackageError, SeriesRefused, WorkerLost
from dicomnode.imaging.package import ModelPackage
from dicomnode.spool import sync_folder, write_durably

if TYPE_CHECKING:
    from dicomnode.imaging.inference import Model

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """One job, as the worker needs it."""

    model: str
    series_number: int | str
    description: str
    qa: Literal["gate", "flag", "off"]
    allow_lossy: bool
    files: tuple[Path, ...]
    results: Path
    """Folder under which the derived series gets its own."""
    now: datetime
    """Aware; written into the derived series. The same on every repeat of the job."""

    @classmethod
    def of(cls, route: Route, files: tuple[Path, ...], results: Path, now: datetime) -> "Order":
        options = (route.series_number, route.description, route.qa, route.allow_lossy)
        return cls(route.model, *options, files, results, now)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an order."""

    derived_uid: str = ""
    instances: tuple[tuple[str, str], ...] = ()
    """(SOP Instance UID, SOP Class UID) of what lies in the results folder."""
    plausible: bool = True
    findings: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""
    """Code of a refusal; empty: not refused."""
    broken: str = ""
    """Kind of an unexpected error; empty: none. The traceback is in the log."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker's first message: which models it has loaded, and why not the others."""

    device: str
    seconds: float
    failures: Mapping[str, str]


class Worker:
    """The node's handle on one translating process."""

    def __init__(self, packages: Mapping[str, ModelPackage], device: str, threads: int) -> None:
        self._child = Child("dicomnode-worker", run, dict(packages), device, threads)
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

    def translate(self, order: Order) -> Outcome:
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
    connection: Connection, packages: Mapping[str, ModelPackage], device: str, threads: int
) -> None:
    """The worker process: load the models, then translate until the pipe closes."""
    started = time.monotonic()
    models, failures, used = load_models(packages, device, threads)
    connection.send(Ready(used, time.monotonic() - started, failures))
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        connection.send(translate(order, models, failures))


def load_models(
    packages: Mapping[str, ModelPackage], device: str, threads: int
) -> tuple[dict[str, "Model"], dict[str, str], str]:
    """Load models and run their self-tests: the models, why others failed, the device used.

    `threads`: of torch; 0 leaves its own choice.
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
            models[name] = load_model(package, used)
            log.info("model %s %s loaded on %s", name, package.version, used)
        except PackageError as error:
            failures[name] = str(error)
            log.error("model %s not loaded: %s", name, error)
    return models, failures, used


def translate(order: Order, models: Mapping[str, "Model"], failures: Mapping[str, str]) -> Outcome:
    """Translate one series and write the result durably; every way it can end is an `Outcome`."""
    name = order.model
    if name not in models:
        return Outcome(broken="MODEL_NOT_LOADED", detail=failures.get(name, "unknown model"))
    try:
        return _translate(order, models[name])
    except SeriesRefused as refusal:
        return Outcome(refusal=refusal.code, detail=f"{refusal.message}; {refusal.remedy}")
    except DicomNodeError as error:
        return Outcome(broken=type(error).__name__, detail=str(error))
    except Exception as error:
        log.exception("translation failed")
        return Outcome(broken=type(error).__name__, detail="unexpected; traceback in the log")


def _translate(order: Order, model: "Model") -> Outcome:
    from pydicom import dcmread

    from dicomnode.derived import OutputOptions
    from dicomnode.pipeline import translate_series
    from dicomnode.qa import findings_as_data

    translation = translate_series(
        [dcmread(path) for path in order.files],
        model,
        OutputOptions(order.series_number, order.description),
        order.now,
        allow_lossy=order.allow_lossy,
        flag_findings=order.qa == "flag",
    )
    plausible = translation.plausible or order.qa != "gate"
    derived_uid, instances = write_series(translation.derived, order.results)
    words = ", ".join(str(finding) for finding in translation.findings)
    findings = findings_as_data(translation.findings)
    return Outcome(derived_uid, instances, plausible, findings, detail=words)


def write_series(derived: Any, results: Path) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Write derived instances as Part 10 files, durably, into a folder of their own.

    Raises:
        OutOfResources: the disk refuses.
    """
    from io import BytesIO

    instances: list[tuple[str, str]] = []
    folder, derived_uid = results, ""
    for dataset in derived:
        if not instances:
            derived_uid = str(dataset.SeriesInstanceUID)
            folder = results / derived_uid
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(results)
        buffer = BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        write_durably(folder / f"{dataset.SOPInstanceUID}.dcm", buffer.getvalue())
        instances.append((str(dataset.SOPInstanceUID), str(dataset.SOPClassUID)))
    sync_folder(folder)
    return derived_uid, tuple(instances)
