"""The running node: what runs where, recovery at the start, orderly stop.

pynetdicom's threads   association -> scp -> spool, journal
thread complete_series open series -> verdict -> routes -> queued jobs
thread translate_next  queued job -> worker process -> derived series on disk
thread deliver_due     due deliveries -> courier process -> destinations
thread keep_house      retention
thread http            health, metrics, status
"""

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import astuple
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from dicomnode import __version__, metrics
from dicomnode.commitment import Commitments
from dicomnode.completion import Completion
from dicomnode.config import NodeConfig, Route
from dicomnode.errors import ConfigError, JournalBusy, OutOfResources, PackageError, WorkerLost
from dicomnode.history import History
from dicomnode.imaging.package import ModelPackage, read_package
from dicomnode.jobs import Job, Jobs, Output
from dicomnode.journal import Journal
from dicomnode.lifecycle import Event
from dicomnode.mpps import PerformedSteps
from dicomnode.orders import Order, Outcome, Withdrawal, stacks_as_data
from dicomnode.outbox import Outbox
from dicomnode.retention import purge
from dicomnode.scp import LibraryService, StorageScp, adopt
from dicomnode.series import Carriers
from dicomnode.spool import Spool
from dicomnode.tables import Database
from dicomnode.web.server import Pages, WebServer
from dicomnode.worker import Worker

log = logging.getLogger(__name__)

DRAIN_SECONDS = 20.0
"""How long an orderly stop waits for open associations, a translation and deliveries, each."""
_TICK_SECONDS = 0.2
"""Between looks at what changes with the clock, while there is something to look at."""
_IDLE_SECONDS = 1.0
"""Between looks when nothing is under way: an operator's retry comes through the journal."""
_NO_ROOM_SECONDS = 10.0
"""Before the next translation when a result found no room on the disk."""
_UNEXPECTED = "unexpected; traceback in the log"
_HOUSEKEEPING_SECONDS = 60.0
_NAMES_SECONDS = 5.0


class Node:
    """Everything `dicomnode serve` runs."""

    def __init__(self, config: NodeConfig) -> None:
        """Read the model packages and open the data folder.

        Raises:
            ConfigError: a route's model cannot be used, or another node has the data folder.
        """
        self._config = config
        self._packages = load_packages(config)
        config.node.data_dir.mkdir(parents=True, exist_ok=True)
        self._data_lock = _lock(config)
        reserve = int(config.node.reserve_free_gb * 1e9)
        self._spool = Spool(config.node.data_dir, reserve)
        self._database = Database(config.node.data_dir / "journal.db")
        self._journal, self._jobs = Journal(self._database), Jobs(self._database)
        self._history = History(self._database)
        self._carriers = Carriers()
        self._steps = PerformedSteps(self._database)
        self._commitments = Commitments(config, self._database, self._spool, self._caller)
        services: tuple[LibraryService, ...] = (self._commitments, self._steps)
        self._scp = StorageScp(config, self._spool, self._journal, self._carriers, services)
        self._outbox = Outbox(config, self._spool, self._jobs)
        pages = Pages(self._history, self.reasons_not_ready, self._refresh, config.http.token)
        self._web = WebServer(config.http.bind, config.http.port, pages)
        self._worker: Worker | None = None
        self._worker_state = "the models are not loaded yet"
        self._completion = Completion(
            config, self._spool, self._journal, self._jobs, self._carriers, self._steps.expected
        )
        self._stop = threading.Event()
        self._queued, self._due = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Recover, then translate, deliver, listen.

        Raises:
            OSError: a port is in use or an address is not ours.
        """
        self._recover()
        self._web.start()
        steps = (
            self.complete_series,
            self.translate_next,
            self.deliver_due,
            self.commit_storage,
            self.resolve_names,
            self.keep_house,
        )
        for step in steps:
            thread = threading.Thread(target=self._repeat, args=(step,), name=step.__name__)
            thread.start()
            self._threads.append(thread)
        first_look = threading.Thread(target=self._scp.access.refresh, daemon=True)
        first_look.start()
        first_look.join(_NAMES_SECONDS)  # so that peers with host names are known from the start
        self._scp.start()
        ports = {"dicom": self._scp.port, "http": self._web.port, "pid": os.getpid()}
        (self._config.node.data_dir / "node.json").write_text(json.dumps(ports), "utf-8")
        log.info("dicomnode %s listens: %s", __version__, ports)

    def stop(self) -> None:
        """Refuse new associations, let what runs end for a while, keep the rest for later."""
        log.info("draining")
        self._scp.drain(DRAIN_SECONDS)
        for event in (self._stop, self._queued, self._due):
            event.set()
        deadline = time.monotonic() + DRAIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._outbox.stop(max(1.0, deadline - time.monotonic()))
        self._commitments.stop(1.0)
        if self._worker is not None:
            self._worker.stop(0.5)  # a translation that still runs is repeated after the start
        for thread in self._threads:
            thread.join()
        self._web.stop()
        self._database.close()
        self._data_lock.close()
        log.info("stopped")

    def reasons_not_ready(self) -> list[str]:
        """Why this node cannot do its whole job now; empty: it can."""
        reasons = [] if self._scp.listening else ["the Storage SCP does not listen"]
        if trouble := self._spool.trouble():
            reasons.append(trouble)
        if self._worker_state:
            reasons.append(self._worker_state)
        return reasons

    # steps, each repeated on a thread of its own

    def complete_series(self) -> None:
        """Close every open series that is complete, and queue a job for each route it takes."""
        judged, closed = self._completion.step(time.time(), time.monotonic())
        if closed:
            self._queued.set()
        self._stop.wait(_TICK_SECONDS if judged else 2 * _TICK_SECONDS)

    def translate_next(self) -> None:
        """Bring one queued job to its next state; nothing to do without a ready worker."""
        worker = self._ready_worker()
        job = self._jobs.claim(time.time()) if worker else None
        while worker is not None and job is not None:
            try:
                self._translate(worker, job)
            except Exception as error:  # a job must not stay "translating" whatever breaks
                log.exception("job %d broke", job.id)
                self._finish(job, Event.BROKE, type(error).__name__, _UNEXPECTED)
            self._due.set()
            if self._stop.is_set() or self._worker is not worker:
                return
            job = self._jobs.claim(time.time())
        if worker is not None or not self._packages:
            self._queued.wait(_IDLE_SECONDS)
            self._queued.clear()

    def _ready_worker(self) -> Worker | None:
        if not self._packages:
            self._worker_state = ""  # nothing is routed: a node may just store
            return None
        try:
            if self._worker is None:
                config = self._config
                compiled = config.node.data_dir / "compiled"
                self._worker = Worker(self._packages, config.device, 0, config.precision, compiled)
            ready = self._worker.wait_ready(_TICK_SECONDS)
        except WorkerLost as error:
            self._lost(str(error))
            return None
        if ready is None:
            return None
        self._worker_state = "; ".join(ready.failures.values())
        return self._worker

    def _lost(self, detail: str) -> None:
        log.error("the worker was lost: %s", detail)
        metrics.workers_lost.inc()
        self._worker, self._worker_state = None, f"the worker was lost: {detail}"
        self._stop.wait(1.0)

    def _translate(self, worker: Worker, job: Job) -> None:
        uids = self._journal.instance_uids(job.series_uid)
        files = tuple(self._spool.path(job.series_uid, uid) for uid in uids)
        if not all(path.exists() for path in files):
            text = "the received files were deleted (retention); send the series again"
            self._finish(job, Event.BROKE, "SOURCE_GONE", text)
            return
        order = self._order(job, files)
        if order is None:
            text = "the route is no longer in config.yaml; discard the job or restore the route"
            self._finish(job, Event.BROKE, "NO_ROUTE", text)
            return
        began = time.monotonic()
        try:
            outcome = worker.translate(order)
        except WorkerLost as error:
            self._lost(str(error))
            self._again(job, str(error), "WORKER_LOST", crashed=error.crashed)
            return
        if isinstance(order, Order):
            metrics.translation_seconds.labels(job.route).observe(time.monotonic() - began)
        if outcome.broken == OutOfResources.__name__:
            self._again(job, outcome.detail, "OUT_OF_RESOURCES", crashed=False)
            self._stop.wait(_NO_ROOM_SECONDS)
            return
        self._until_journalled(lambda: self._journal_outcome(job, outcome))

    def _order(self, job: Job, files: tuple[Path, ...]) -> Order | Withdrawal | None:
        """What the worker is to do; None: the route of a translation is gone."""
        route = self._route(job)
        now = datetime.fromtimestamp(job.created, UTC)
        results = self._spool.results
        if job.retracts is not None:
            made = tuple(astuple(output) for output in self._jobs.outputs(job.retracts))
            return Withdrawal(route.model if route else "", made, files[0], results, now)
        if route is None:
            return None
        withdrawn = self._jobs.withdrawn(job.series_uid)
        return Order.of(route, files, results, now, withdrawn)

    def _route(self, job: Job) -> Route | None:
        return next((route for route in self._config.routes if route.name == job.route), None)

    def _finish(self, job: Job, event: Event, code: str, detail: str) -> None:
        self._until_journalled(
            lambda: self._jobs.finish(job, event, time.time(), code=code, detail=detail)
        )

    def _again(self, job: Job, detail: str, code: str, *, crashed: bool) -> None:
        self._until_journalled(
            lambda: self._jobs.lost(job, detail, time.time(), crashed=crashed, code=code)
        )

    def _until_journalled(self, change: Callable[[], object]) -> None:
        """Make a change when the journal takes it; after a stop the job runs again anyway."""
        while True:
            try:
                change()
                return
            except JournalBusy as error:
                log.error("%s; again in %g s", error, _IDLE_SECONDS)
                if self._stop.wait(_IDLE_SECONDS):
                    return

    def _journal_outcome(self, job: Job, outcome: Outcome) -> None:
        now = time.time()
        stacks = stacks_as_data(outcome)
        if outcome.refusal or outcome.broken:
            event = Event.UNFIT if outcome.refusal else Event.BROKE
            code = outcome.refusal or outcome.broken
            self._jobs.finish(job, event, now, code=code, detail=outcome.detail, stacks=stacks)
            return
        route = self._route(job)
        shown = job.retracts is None and route is not None and not route.shadow
        destinations = route.send_to if shown and route is not None else ()
        event, code = Event.DERIVED, ""
        if not outcome.plausible:
            event, code = Event.IMPLAUSIBLE, "QA_FAILED"
        elif job.retracts is None and not destinations:
            event = Event.NOTHING_TO_SEND
        outputs = [Output(one.uid, *made) for one in outcome.series for made in one.files()]
        self._jobs.derived(
            job,
            outputs,
            destinations,
            outcome.findings,
            event,
            now,
            code=code,
            detail=outcome.detail,
            stacks=stacks,
        )

    def deliver_due(self) -> None:
        self._outbox.start_due(time.time())
        self._due.wait(_TICK_SECONDS if self._outbox.busy else _IDLE_SECONDS)
        self._due.clear()

    def commit_storage(self) -> None:
        """Check what peers asked us to commit, and report what was found."""
        self._commitments.step(time.time())
        self._commitments.pause(_IDLE_SECONDS)

    def resolve_names(self) -> None:
        """Look the names of peers up, so that nobody waits for it at the door."""
        self._scp.access.refresh()
        self._stop.wait(_HOUSEKEEPING_SECONDS)

    def _caller(self, calling_ae: str, host: str) -> str | None:
        return self._scp.access.caller(calling_ae, host)

    def keep_house(self) -> None:
        purge(self._database, self._spool, self._config.retention, time.time())
        self._stop.wait(_HOUSEKEEPING_SECONDS)

    def _refresh(self) -> None:
        """Gauges that are read from the journal when somebody asks."""
        counts = self._history.counts()
        for gauge, name in (
            (metrics.jobs_by_state, "jobs"),
            (metrics.deliveries_by_state, "deliveries"),
            (metrics.commitments_by_state, "commitments"),
        ):
            gauge.clear()
            for state, number in counts[name].items():
                gauge.labels(state).set(number)
        metrics.associations_open.set(self._scp.associations)
        with contextlib.suppress(OSError):  # readyz says that the folder is gone
            metrics.free_bytes.set(self._spool.free_bytes())

    def _recover(self) -> None:
        """Bring files and rows together again after a crash."""
        self._spool.prepare()
        now = time.time()
        self._journal.recover(now)
        self._jobs.recover(now)
        for part, kept in self._spool.leftovers():
            if kept and adopt(part, self._journal, now):
                log.info("adopted an instance that was stored but not journalled at the stop")
            part.unlink()

    def _repeat(self, step: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                step()
            except JournalBusy as error:
                log.error("%s: %s; again in %g s", step.__name__, error, _IDLE_SECONDS)
                self._stop.wait(_IDLE_SECONDS)
            except Exception:  # a thread that dies silently stops the node without a sign
                log.exception("unexpected error in %s", step.__name__)
                self._stop.wait(_IDLE_SECONDS)


def load_packages(config: NodeConfig) -> dict[str, ModelPackage]:
    """The verified package of every routed model.

    Raises:
        ConfigError: one is missing or damaged; the message names the route.
    """
    packages, problems = {}, []
    for index, route in enumerate(config.routes):
        try:
            packages[route.model] = read_package(config.models_dir / route.model)
        except PackageError as error:
            problems.append(f"routes[{index}].model: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return packages


def _lock(config: NodeConfig) -> IO[str]:
    """One node per data folder: the lock goes with the process, whatever ends it."""
    file = (config.node.data_dir / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError("node.data_dir: another dicomnode is using this folder") from error
    return file
