"""Queued jobs on their way through the worker process, and what becomes of them in the journal."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dicomnode import metrics
from dicomnode.config import NodeConfig, Route
from dicomnode.errors import Cancelled, JournalBusy, OutOfMemory, OutOfResources, WorkerLost
from dicomnode.expectation import Expectation
from dicomnode.imaging.classifier import ClassifierPackage
from dicomnode.imaging.package import ModelPackage
from dicomnode.jobs import Job, Jobs, Output
from dicomnode.journal import Journal
from dicomnode.lifecycle import Event
from dicomnode.orders import Cancel, Order, Outcome, Request, Withdrawal, stacks_as_data
from dicomnode.serving import Serving, tell
from dicomnode.spool import Spool
from dicomnode.worker import Ready, Settings, Worker

log = logging.getLogger(__name__)

_READY_SECONDS = 0.2
_LOOK_SECONDS = 0.2
"""Between looks for a more urgent job while one runs."""
_NO_ROOM_SECONDS = 10.0
"""Before the next translation when there was no room, on the disk or in memory."""
_AGAIN_SECONDS = 1.0
_UNEXPECTED = "unexpected; traceback in the log"
_NO_ROOM = {OutOfResources.__name__: "OUT_OF_RESOURCES", OutOfMemory.__name__: "OUT_OF_MEMORY"}


@dataclass(frozen=True, slots=True)
class _Running:
    job: Job
    began: float


class Dispatcher:
    """The one who talks with the worker; used by one thread.

    A job goes to the worker when nothing runs there, or when it is more urgent than what runs.
    """

    def __init__(
        self,
        config: NodeConfig,
        packages: Mapping[str, ModelPackage],
        classifiers: Mapping[str, ClassifierPackage],
        spool: Spool,
        journal: Journal,
        jobs: Jobs,
        stop: threading.Event,
        ended: Callable[[], object],
    ) -> None:
        """`ended`: called when a job came to its next state."""
        self._config, self._packages, self._classifiers = config, packages, classifiers
        self._spool, self._journal, self._jobs = spool, journal, jobs
        self._stop, self._ended = stop, ended
        self._expectation = Expectation(config, spool, journal)
        self._worker: Worker | None = None
        self._told: Ready | None = None
        self._serving: Mapping[str, Serving] = {}
        self._running: list[_Running] = []
        """The innermost last: it is what the worker does, the others wait between two batches."""
        self.trouble = "the models are not loaded yet"
        """Why nothing can be translated; empty: it can."""

    @property
    def busy(self) -> bool:
        """Whether the worker has a job."""
        return bool(self._running)

    def step(self) -> bool:
        """Hand over what is to be done, take what was done; False: there is nothing under way."""
        try:
            worker = self._ready_worker()
            if worker is None:
                return bool(self._packages)  # they are loading; without any nothing will come
            self._hand_over(worker)
            if not self._running:
                for arriving in self._expectation.news():
                    worker.send(arriving)
                worker.reply(0)  # there is none; a worker that died on its own shows here
                return False
            self._take(worker)
        except WorkerLost as error:
            self._lost(error)
        return True

    def close(self) -> None:
        """End the worker; a translation that still runs is repeated after the start."""
        if self._worker is not None:
            self._worker.stop(0.5)

    def _ready_worker(self) -> Worker | None:
        """
        Raises:
            WorkerLost: it died while it loaded its models.
        """
        if not self._packages:
            self.trouble = ""  # nothing is routed: a node may just store
            return None
        if self._worker is None:
            self._worker = Worker(self._packages, settings_of(self._config), self._classifiers)
        ready = self._worker.wait_ready(_READY_SECONDS)
        if ready is None:
            return None
        if self._told is not ready:
            log.info("the worker has its models after %.1f s, on %s", ready.seconds, ready.device)
            metrics.worker_start.set(ready.seconds)
            self._tell(ready, ready.engines)
        self.trouble = "; ".join(ready.failures.values())
        return self._worker

    def _tell(self, ready: Ready, serving: Mapping[str, Serving]) -> None:
        """Note what runs the models."""
        self._told, self._serving = ready, serving
        tell(self._config.node.data_dir, serving, ready.failures)

    def _hand_over(self, worker: Worker) -> None:
        """The next job, if it is more urgent than what runs."""
        if self._stop.is_set():
            return
        before = self._running[-1].job.priority if self._running else None
        job = self._jobs.claim(time.time(), before)
        if job is None:
            return
        try:
            order = self._checked_order(job)
        except Exception as error:  # a job must not stay "translating" whatever breaks
            log.exception("job %d broke", job.id)
            self._finish(job, Event.BROKE, type(error).__name__, _UNEXPECTED)
            return
        if order is not None:
            self._running.append(_Running(job, time.monotonic()))
            worker.send(Request(job.id, job.priority, order))

    def _take(self, worker: Worker) -> None:
        """A reply, if there is one; a job that is overtaken by a later generation is given up."""
        for running in self._running:
            job = running.job
            current = self._journal.generation(job.series_uid)
            if job.retracts is None and job.generation != current:
                worker.send(Cancel(job.id))
        reply = worker.reply(_LOOK_SECONDS)
        if reply is None:
            return
        running = next(one for one in self._running if one.job.id == reply.job)
        self._running.remove(running)
        try:
            self._done(running, reply.outcome)
        except Exception as error:  # as where a job begins
            log.exception("job %d broke", running.job.id)
            self._finish(running.job, Event.BROKE, type(error).__name__, _UNEXPECTED)
        self._ended()

    def _lost(self, error: WorkerLost) -> None:
        """Every job it had runs again; only what it was doing is to blame."""
        log.error("the worker was lost: %s", error)
        metrics.workers_lost.inc()
        self._worker, self.trouble = None, f"the worker was lost: {error}"
        self._expectation.worker_lost(busy=bool(self._running))
        self._spool.remove_drafts()
        running, self._running = self._running, []
        for place, one in enumerate(reversed(running)):
            to_blame = error.crashed and place == 0
            self._again(one.job, str(error), "WORKER_LOST", crashed=to_blame)
        self._ended()
        self._stop.wait(_AGAIN_SECONDS)

    def _done(self, running: _Running, outcome: Outcome) -> None:
        job = running.job
        if self._told is not None and outcome.serving and outcome.serving != self._serving:
            self._tell(self._told, outcome.serving)
        if job.retracts is None:
            metrics.translation_seconds.labels(job.route).observe(time.monotonic() - running.began)
            metrics.batches_halved.labels(job.route).inc(outcome.halved)
            metrics.slices_ahead.labels(job.route).inc(outcome.ahead)
            if outcome.unclassified:
                metrics.series_unclassified.labels(job.route).inc(outcome.unclassified)
        if outcome.broken in _NO_ROOM:
            self._again(job, outcome.detail, _NO_ROOM[outcome.broken], crashed=False)
            self._stop.wait(_NO_ROOM_SECONDS)
        elif outcome.broken == Cancelled.__name__:
            self._again(job, outcome.detail, "CANCELLED", crashed=False)
        else:
            self._until_journalled(lambda: self._journal_outcome(job, outcome))

    def _checked_order(self, job: Job) -> Order | Withdrawal | None:
        """What the worker is to do; None: nothing, and the job says why."""
        uids = self._journal.instance_uids(job.series_uid)
        files = tuple(self._spool.path(job.series_uid, uid) for uid in uids)
        if not all(path.exists() for path in files):
            text = "the received files were deleted (retention); send the series again"
            self._finish(job, Event.BROKE, "SOURCE_GONE", text)
            return None
        order = self._order(job, files)
        if order is None:
            text = "the route is no longer in config.yaml; discard the job or restore the route"
            self._finish(job, Event.BROKE, "NO_ROUTE", text)
        return order

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
                log.error("%s; again in %g s", error, _AGAIN_SECONDS)
                if self._stop.wait(_AGAIN_SECONDS):
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


def settings_of(config: NodeConfig) -> Settings:
    """What config.yaml says about the worker."""
    return Settings(
        config.device,
        precision=config.precision,
        compiled=config.node.data_dir / "compiled",
        models_bytes=int(config.worker.models_gb * 1e9),
        ahead_bytes=int(config.worker.speculative_gb * 1e9) if config.worker.speculative else 0,
    )
