"""The running node: what runs where, recovery at the start, orderly stop.

pynetdicom's threads   association -> scp -> spool, journal
thread complete_series open series -> verdict -> routes -> queued jobs
thread translate_next  queued job -> worker process -> derived series on disk
thread deliver_due     due deliveries -> courier process -> destinations, which are to commit them
thread keep_house      retention
thread step            redo log -> files and rows durable by themselves
thread write_rows      what is in the redo log -> rows
thread http            health, metrics, status
"""

import contextlib
import functools
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dicomnode import __version__, metrics
from dicomnode.commitment import Commitments
from dicomnode.commitment_scu import CommitmentRequests
from dicomnode.completion import Completion
from dicomnode.config import NodeConfig, Route
from dicomnode.dispatch import Dispatcher
from dicomnode.errors import ConfigError, JournalBusy, JournalError, PackageError
from dicomnode.history import History
from dicomnode.imaging.classifier import ClassifierPackage, read_classifier
from dicomnode.imaging.package import ModelPackage, read_package
from dicomnode.jobs import Jobs
from dicomnode.journal import Journal
from dicomnode.mpps import PerformedSteps
from dicomnode.outbox import Outbox
from dicomnode.premises import SETTLING, kind_of
from dicomnode.recovery import lock_folder, recover, refuse_lost_journal
from dicomnode.redo import REDO, RedoLog
from dicomnode.retention import Rules, make_room, purge
from dicomnode.scp import LibraryService, StorageScp
from dicomnode.series import Carriers
from dicomnode.serving import told
from dicomnode.spool import Spool
from dicomnode.syncing import FileSystem
from dicomnode.tables import Database
from dicomnode.web.server import Pages, WebServer

_P = TypeVar("_P")
log = logging.getLogger(__name__)

DRAIN_SECONDS = 20.0
"""How long an orderly stop waits for open associations, a translation and deliveries, each."""
_TICK_SECONDS = 0.2
"""Between looks at what changes with the clock, while there is something to look at."""
_IDLE_SECONDS = 1.0
"""Between looks when nothing is under way: an operator's retry comes through the journal."""
_HOUSEKEEPING_SECONDS = 60.0
_ROOM_SECONDS = 5.0
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
        self._classifiers = load_classifiers(config)
        config.node.data_dir.mkdir(parents=True, exist_ok=True)
        self._data_lock = lock_folder(config.node.data_dir)
        reserve = int(config.node.reserve_free_gb * 1e9)
        self._spool = Spool(config.node.data_dir, reserve)
        journal_file = config.node.data_dir / "journal.db"
        refuse_lost_journal(self._spool, journal_file)
        self._database = Database(journal_file)
        self._journal, self._jobs = Journal(self._database), Jobs(self._database)
        self._history = History(self._database)
        self._spool.received.mkdir(exist_ok=True)
        self._disk = FileSystem(self._spool.received)
        self._redo = RedoLog(
            config.node.data_dir / REDO,
            self._redo_log_bytes(),
            self._spool.has_room,
            self._settle,
        )
        self._carriers = Carriers()
        self._steps = PerformedSteps(self._database)
        self._commitments = Commitments(config, self._database, self._spool, self._caller)
        self._requests = CommitmentRequests(config, self._database, self._caller)
        services: tuple[LibraryService, ...] = (self._commitments, self._requests, self._steps)
        self._scp = StorageScp(
            config, self._spool, self._journal, self._redo, self._carriers, services
        )
        self._outbox = Outbox(config, self._spool, self._jobs, self._requests.delivered)
        pages = Pages(
            self._history,
            self.reasons_not_ready,
            self._refresh,
            config.http.token,
            functools.partial(told, config.node.data_dir),
        )
        self._web = WebServer(config.http.bind, config.http.port, pages)
        self._completion = Completion(
            config, self._spool, self._journal, self._jobs, self._carriers, self._steps.expected
        )
        self._next_purge = 0.0
        self._stop = threading.Event()
        self._queued, self._due = threading.Event(), threading.Event()
        self._dispatcher = Dispatcher(
            config,
            self._packages,
            self._classifiers,
            self._spool,
            self._journal,
            self._jobs,
            self._stop,
            self._due.set,
        )
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Recover, then translate, deliver, listen.

        Raises:
            OSError: a port is in use or an address is not ours.
        """
        now = time.time()
        late = self._config.series.on_late_instances
        recover(self._spool, self._journal, self._redo, self._jobs, now, late)
        self._requests.recover(now)
        self._web.start()
        steps = (
            self.complete_series,
            self.translate_next,
            self.deliver_due,
            self.commit_storage,
            self.resolve_names,
            self.keep_house,
            self._redo.step,
            self.write_rows,
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
        self._redo.stop()
        self._journal.waiting.stop()
        deadline = time.monotonic() + DRAIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._outbox.stop(max(1.0, deadline - time.monotonic()))
        self._commitments.stop(1.0)
        self._requests.stop(1.0)
        self._dispatcher.close()
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(OSError, JournalError):  # in the log: the next start does it again
            self._redo.close()
        self._web.stop()
        self._database.close()
        self._disk.close()
        self._data_lock.close()
        log.info("stopped")

    def reasons_not_ready(self) -> list[str]:
        """Why this node cannot do its whole job now; empty: it can."""
        reasons = [] if self._scp.listening else ["the Storage SCP does not listen"]
        journal = self._database.trouble() or self._database.locked()
        here = (self._spool.trouble(), journal, self._redo.trouble)
        reasons += filter(None, (*here, self._journal.waiting.trouble))
        if self._dispatcher.trouble:
            reasons.append(self._dispatcher.trouble)
        return reasons

    # steps, each repeated on a thread of its own

    def complete_series(self) -> None:
        """Close every open series that is complete, and queue a job for each route it takes."""
        judged, closed = self._completion.step(time.time(), time.monotonic())
        if judged or closed:  # slices that arrive may be inferred already
            self._queued.set()
        self._stop.wait(_TICK_SECONDS if judged else 2 * _TICK_SECONDS)

    def translate_next(self) -> None:
        """Bring queued jobs to their next states; in an orderly stop, what runs to its end."""
        busy = self._dispatcher.step()
        while self._stop.is_set() and self._dispatcher.busy:
            self._dispatcher.step()
        if not busy:
            self._queued.wait(_IDLE_SECONDS)
            self._queued.clear()

    def deliver_due(self) -> None:
        now = time.time()
        self._requests.step(self._outbox.associations(), now)
        self._outbox.start_due(now, self._requests.asking())
        self._due.wait(_TICK_SECONDS if self._outbox.busy else _IDLE_SECONDS)
        self._due.clear()

    def commit_storage(self) -> None:
        """Check what peers asked us to commit, and report what was found."""
        self._journal.waiting.flush()  # what was acknowledged is not missing
        self._commitments.step(time.time())
        self._commitments.pause(_IDLE_SECONDS)

    def write_rows(self) -> None:
        """Note instances that are in the redo log."""
        self._journal.waiting.step()

    def resolve_names(self) -> None:
        """Look the names of peers up, so that nobody waits for it at the door."""
        self._scp.access.refresh()
        self._stop.wait(_HOUSEKEEPING_SECONDS)

    def _redo_log_bytes(self) -> int:
        kinds = {kind_of(self._spool.received), kind_of(self._config.node.data_dir)}
        if kinds <= set(SETTLING):
            return self._config.node.redo_log_mb * 1_000_000
        log.info("no redo log on %s: each instance is synced for itself", ", ".join(sorted(kinds)))
        return 0

    def _settle(self) -> None:
        """Make all files and rows durable, those that wait, too."""
        self._journal.waiting.flush()
        self._disk.sync()
        self._database.sync()

    def _caller(self, calling_ae: str, host: str) -> str | None:
        return self._scp.access.caller(calling_ae, host)

    def keep_house(self) -> None:
        """Delete what is past its time; before it, what is delivered, if the disk is too full."""
        deleted = True  # for all we know, if it breaks off
        try:
            deleted = self._delete_files()
        finally:
            if deleted:
                self._redo.wipe()
        self._stop.wait(_ROOM_SECONDS)

    def _delete_files(self) -> bool:
        """Those that may go; False if none did."""
        rules, purged = Rules.of(self._config), 0
        if time.monotonic() >= self._next_purge:
            purged = purge(self._database, self._spool, rules, time.time())
            self._next_purge = time.monotonic() + _HOUSEKEEPING_SECONDS
        if freed := make_room(self._database, self._spool, rules, time.time()):
            log.info("%d MB of delivered files deleted to make room", freed // 1_000_000)
        return bool(purged or freed)

    def _refresh(self) -> None:
        """Gauges that are read from the journal when somebody asks."""
        counts = self._history.counts()
        for gauge, name in (
            (metrics.jobs_by_state, "jobs"),
            (metrics.deliveries_by_state, "deliveries"),
            (metrics.commitments_by_state, "commitments"),
            (metrics.commitment_requests_by_state, "commitment_requests"),
        ):
            gauge.clear()
            for state, number in counts[name].items():
                gauge.labels(state).set(number)
        metrics.associations_open.set(self._scp.associations)
        with contextlib.suppress(OSError):  # readyz says that the folder is gone
            metrics.free_bytes.set(self._spool.free_bytes())

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
    return _read_each(config, "model", lambda route: route.model, read_package)


def load_classifiers(config: NodeConfig) -> dict[str, ClassifierPackage]:
    """The verified package of every classifier that a route names; raises as `load_packages`."""
    key = "companions.classifier"
    return _read_each(config, key, lambda route: route.companions.classifier, read_classifier)


def _read_each(
    config: NodeConfig, key: str, named: Callable[[Route], str | None], read: Callable[[Path], _P]
) -> dict[str, _P]:
    packages, problems = {}, []
    for index, route in enumerate(config.routes):
        try:
            if name := named(route):
                packages[name] = read(config.models_dir / name)
        except PackageError as error:
            problems.append(f"routes[{index}].{key}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return packages
