"""Derived series waiting for their destinations; retried until they are accepted or parked.

Sending runs in a process of its own, the courier, so that receiving is never slowed by it. Only
instances a destination has not accepted yet are sent again, and always the stored bytes.
"""

import contextlib
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from dicomnode import metrics, sop_classes
from dicomnode.child import Child
from dicomnode.config import NodeConfig
from dicomnode.errors import (
    DeliveryError,
    DeliveryRefused,
    JournalBusy,
    JournalError,
    NoAssociation,
    WorkerLost,
)
from dicomnode.jobs import DueDelivery, Jobs
from dicomnode.lifecycle import ACCEPTED
from dicomnode.scu import Address, address_of, send_instances
from dicomnode.spool import Spool

log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 2.0
LONGEST_RETRY_SECONDS = 600.0
_BUSY_SECONDS = 1.0
"""Before the journal is tried again."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """What the courier is told to send."""

    delivery: int
    series: tuple[tuple[Path, ...], ...]
    """Files per derived series, with its companions: each over an association of its own."""
    address: Address
    optional: frozenset[str] = sop_classes.COMPANIONS
    """SOP classes that the destination need not take."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the courier says of a parcel: instances accepted so far, and at its end how it went.

    A companion that the destination refuses is among the statuses too, and never sent again.
    """

    delivery: int
    statuses: Mapping[str, int]
    ended: str = ""
    """"" while it goes on; accepted, failed (may work later) or refused (will not)."""
    detail: str = ""
    sent: bool = True
    """False: for certain nothing of this attempt is at the destination."""


def retry_wait(attempts: int, jitter: float) -> float:
    """Seconds before the next attempt: exponential, with `jitter` in [0, 1] against herds."""
    wait = min(FIRST_RETRY_SECONDS * 2.0 ** min(attempts, 20), LONGEST_RETRY_SECONDS)
    return wait * (0.75 + 0.5 * jitter)


class Outbox:
    """Gives due deliveries to the courier and journals what became of them."""

    def __init__(
        self,
        config: NodeConfig,
        spool: Spool,
        jobs: Jobs,
        on_delivered: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_delivered`: called when a delivery is complete and the journal says so."""
        self._config, self._spool, self._jobs = config, spool, jobs
        self._on_delivered = on_delivered
        self._lock = threading.Lock()
        self._under_way: dict[int, DueDelivery] = {}
        self._courier: Child | None = None

    @property
    def busy(self) -> bool:
        with self._lock:
            return bool(self._under_way)

    def associations(self) -> Counter[str]:
        """How many are open to each destination."""
        with self._lock:
            return Counter(delivery.destination for delivery in self._under_way.values())

    def start_due(self, now: float, others: Collection[str] = ()) -> None:
        """Hand every delivery that is due, and for which there is an association free, over.

        `others`: destinations to which another part of the node has an association.
        """
        for delivery in self._jobs.due_deliveries(now):
            running = self.associations() + Counter(others)
            with self._lock:
                if delivery.id in self._under_way:
                    continue
            peer = self._config.peers.get(delivery.destination)
            address = address_of(delivery.destination, peer, self._config) if peer else None
            if peer is None or address is None:
                detail = f"peers.{delivery.destination} is no longer in the configuration"
                self._jobs.park(delivery, detail, now)
                continue
            free = running[delivery.destination] < peer.max_associations
            if free and not self._overtakes(delivery) and self._jobs.begin(delivery.id):
                self._start(delivery, address)

    def _overtakes(self, delivery: DueDelivery) -> bool:
        """Whether it withdraws what may still be on its way: nothing may come after it."""
        with self._lock:
            return delivery.retracts is not None and any(
                (other.series_uid, other.destination) == (delivery.series_uid, delivery.destination)
                for other in self._under_way.values()
            )

    def _start(self, delivery: DueDelivery, address: Address) -> None:
        series: dict[str, list[Path]] = {}
        for output in delivery.outputs:
            path = self._spool.result_path(output.series_uid, output.sop_instance_uid)
            series.setdefault(output.series_uid, []).append(path)
        optional = sop_classes.COMPANIONS if delivery.retracts is None else frozenset[str]()
        parcel = Parcel(delivery.id, tuple(map(tuple, series.values())), address, optional)
        with self._lock:
            self._under_way[delivery.id] = delivery
            if self._courier is None:
                self._courier = Child("dicomnode-courier", run_courier)
                threading.Thread(
                    target=self._listen, args=(self._courier,), name="receipts", daemon=True
                ).start()
            courier = self._courier
        try:
            courier.send(parcel)
        except WorkerLost:
            log.warning("the courier is gone")  # its listener puts off what was under way

    def stop(self, grace: float) -> None:
        """Let what is under way end for `grace` seconds; the rest goes on after the next start."""
        deadline = time.monotonic() + grace
        while self.busy and time.monotonic() < deadline:
            time.sleep(0.05)
        with self._lock:
            courier, self._courier = self._courier, None
        if courier is not None:
            courier.stop(1.0)

    def _listen(self, courier: Child) -> None:
        """Journal the receipts of one courier until it ends."""
        while True:
            try:
                receipt = courier.receive()
            except WorkerLost as error:
                self._lost(courier, str(error))
                return
            delivery = self._under_way.get(receipt.delivery)
            if delivery is None:
                continue
            try:
                self._note_when_possible(receipt, delivery)
            except JournalError as error:  # the operator discarded it meanwhile
                log.warning("delivery %d: %s", delivery.id, error)
            finally:
                if receipt.ended:
                    with self._lock:
                        self._under_way.pop(receipt.delivery, None)

    def _note_when_possible(self, receipt: Receipt, delivery: DueDelivery) -> None:
        """What a destination has must be noted, however long the journal is locked."""
        while True:
            try:
                self._note(receipt, delivery)
                return
            except JournalBusy as error:
                log.error("%s; again in %g s", error, _BUSY_SECONDS)
                time.sleep(_BUSY_SECONDS)
                if self._courier is None:  # we stop; the next start asks the destination again
                    return

    def _lost(self, courier: Child, detail: str) -> None:
        with self._lock:
            if self._courier is not courier:
                return  # we stopped it
            self._courier = None
            cut, self._under_way = dict(self._under_way), {}
        log.error("the courier was lost: %s", detail)
        now = time.time()
        for delivery in cut.values():
            with contextlib.suppress(JournalBusy):  # then it is due at once
                self._jobs.postpone(delivery, now + retry_wait(0, random.random()), detail, now)  # noqa: S311

    def _note(self, receipt: Receipt, delivery: DueDelivery) -> None:
        now = time.time()
        self._jobs.accepted(delivery.id, receipt.statuses, now)
        taken = sum(status in ACCEPTED for status in receipt.statuses.values())
        counter = metrics.instances_delivered
        counter.labels(delivery.destination, "accepted").inc(taken)
        counter.labels(delivery.destination, "refused").inc(len(receipt.statuses) - taken)
        if not receipt.ended:
            return
        if receipt.ended == "accepted":
            words = f"{len(delivery.remaining)} instances"
            words += f", {receipt.detail}" if receipt.detail else ""
            self._jobs.delivered(delivery, words, now)
            self._on_delivered()
        elif receipt.ended == "refused" or self._too_old(delivery, now):
            log.warning("delivery %d parked: %s", delivery.id, receipt.detail)
            self._jobs.park(delivery, receipt.detail, now)
        else:
            wait = retry_wait(delivery.attempts, random.random())  # noqa: S311
            detail = f"{receipt.detail}; again in {wait:.0f} s"
            log.warning("delivery %d put off: %s", delivery.id, detail)
            self._jobs.postpone(delivery, now + wait, detail, now, sent=receipt.sent)

    def _too_old(self, delivery: DueDelivery, now: float) -> bool:
        hours = self._config.peers[delivery.destination].retry_for_hours
        return now - delivery.created > hours * 3600


def run_courier(connection: Connection) -> None:
    """The courier process: each parcel on a thread of its own, until the pipe closes."""
    lock = threading.Lock()

    def answer(receipt: Receipt) -> None:
        with lock:
            connection.send(receipt)

    while True:
        try:
            parcel = connection.recv()
        except EOFError:
            return
        threading.Thread(target=_deliver, args=(parcel, answer), daemon=True).start()


def _deliver(parcel: Parcel, answer: Callable[[Receipt], None]) -> None:
    """Send one parcel; accepted instances are told in groups, the end in any case."""
    accepted: dict[str, int] = {}
    refused: list[int] = []

    def on_status(sop_instance_uid: str, status: int) -> None:
        accepted[sop_instance_uid] = status
        refused.extend([status] if status not in ACCEPTED else [])
        if len(accepted) >= 25:
            answer(Receipt(parcel.delivery, dict(accepted)))
            accepted.clear()

    ended, detail, sent = "accepted", "", False
    try:
        for files in parcel.series:
            send_instances(files, parcel.address, on_status, parcel.optional)
            sent = True
        if refused:
            detail = f"{len(refused)} companions of them refused with 0x{refused[0]:04X}"
    except DeliveryRefused as error:
        ended, detail = "refused", str(error)
    except NoAssociation as error:
        ended, detail = "failed", str(error)
    except DeliveryError as error:
        ended, detail, sent = "failed", str(error), True
    except Exception as error:  # the node must hear of every end
        log.exception("delivery %d broke", parcel.delivery)
        ended, detail, sent = "failed", f"{type(error).__name__}; traceback in the log", True
    answer(Receipt(parcel.delivery, accepted, ended, detail, sent))
