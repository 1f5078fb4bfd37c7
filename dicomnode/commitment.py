"""Storage Commitment Push Model SCP (PS3.4 Annex J): asked, recorded, checked, reported.

Asked by N-ACTION, we record the request durably before we answer. What is stored is compared with
the digest of what was received, on a thread of the node. The result goes out as N-EVENT-REPORT,
again and again until the peer has answered: on an association of our own, or, to a peer whose
address we do not know, on one that it opened.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from dicomnode import normalized as n
from dicomnode.commitment_messages import (
    INVALID_ARGUMENT,
    read_request,
    reporting_association,
    send_report,
)
from dicomnode.config import NodeConfig, Peer
from dicomnode.errors import DeliveryError, OperationRefused
from dicomnode.normalized import Answer, answer
from dicomnode.scu import Address, address_of
from dicomnode.spool import Spool, dataset_digest
from dicomnode.tables import Database
from dicomnode.transactions import (
    Commitment,
    Result,
    Stored,
    Transaction,
    Transactions,
)

log = logging.getLogger(__name__)

COMMITTED = 0x0000
CLASS_INSTANCE_CONFLICT = 0x0119
"""FailureReason (PS3.3 C.14.1.1), beside 0x0110 and 0x0112."""
_MAY_WORK_LATER = (n.PROCESSING_FAILURE, n.RESOURCE_LIMITATION)
"""Answers to N-EVENT-REPORT after which we try again; with other failures we give up."""

MAX_OPEN = 1_000
"""Unfinished transactions of one peer."""
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 2.0, 600.0
_SETTLE_SECONDS = 0.5
"""After a request on the same association, so that its response is out before our report."""
_LOOK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Held:
    """The latest association on which a peer without an address has asked."""

    association: Any
    asked: float
    """time.monotonic() of its last request."""


class Commitments:
    """The Storage Commitment SCP; safe to share between threads."""

    contexts = (str(StorageCommitmentPushModel),)
    """Abstract syntaxes to support."""
    reports = False

    def __init__(
        self,
        config: NodeConfig,
        database: Database,
        spool: Spool,
        caller: Callable[[str, str], str | None],
        wait_for_instances_seconds: float = 10.0,
    ) -> None:
        """Nothing is read or sent before `step`.

        Args:
            caller: our name of the peer with this AE title at this host, or None.
            wait_for_instances_seconds: how long an instance that is not here may still come: a
                request may be made before all its instances were sent.
        """
        self._config, self._spool, self._caller = config, spool, caller
        self._wait = wait_for_instances_seconds
        self._transactions = Transactions(database)
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._reporters: dict[str, threading.Thread] = {}
        self._work, self._stopping = threading.Event(), threading.Event()

    @property
    def handlers(self) -> list[Any]:
        """What to bind on the listening AE."""
        return [(evt.EVT_N_ACTION, self.on_n_action)]

    # asked

    def on_n_action(self, event: evt.Event) -> Answer:
        """Answer a request; nothing is checked here (statuses: PS3.7 10.1.4.1.10)."""
        return answer("storage commitment", lambda: self._ask(event))

    def _ask(self, event: evt.Event) -> None:
        requestor = event.assoc.requestor
        uid, references = read_request(event)
        peer = self._caller(str(requestor.ae_title).strip(), str(requestor.address))
        if peer is None:
            raise OperationRefused(n.NOT_AUTHORISED, "the calling AE is not known: no way back")
        if self._transactions.open_of(peer) >= MAX_OPEN:
            raise OperationRefused(n.RESOURCE_LIMITATION, "too many unfinished transactions")
        if not self._transactions.ask(uid, peer, references, time.time()):
            text = "TransactionUID is in use for another request"
            raise OperationRefused(INVALID_ARGUMENT, text)
        if self._address(peer) is None:
            if event.assoc.is_alive():  # else it stores, too, and is not pynetdicom's
                with self._lock:
                    self._held[peer] = _Held(event.assoc, time.monotonic())
            self._transactions.hurry(peer, time.time())
        log.info("storage commitment %s asked by %s: %d instances", uid, peer, len(references))
        self._work.set()

    # checked and reported, by a thread of the node

    def step(self, now: float) -> None:
        """Check what was asked, and begin to report what is due."""
        for transaction in self._transactions.due(Commitment.CHECKING, now):
            if not self._stopping.is_set():
                self._check(transaction, now)
        busy = {name for name, thread in self._reporters.items() if thread.is_alive()}
        due: dict[str, list[Transaction]] = {}
        for transaction in self._transactions.due(Commitment.REPORTING, now):
            due.setdefault(transaction.peer, []).append(transaction)
        for peer, transactions in due.items():
            if peer not in busy and not self._stopping.is_set():
                self._start_reporting(peer, transactions, now)

    def pause(self, seconds: float) -> None:
        """Wait until there may be something to do, `seconds` at most."""
        self._work.wait(seconds)
        self._work.clear()

    def stop(self, grace: float) -> None:
        """Break off checking, let reports end for `grace` seconds; the rest goes on later."""
        self._stopping.set()
        self._work.set()
        deadline = time.monotonic() + grace
        for thread in list(self._reporters.values()):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _check(self, transaction: Transaction, now: float) -> None:
        references = self._transactions.references(transaction.uid)
        stored = self._transactions.stored(transaction.uid)
        missing = sum(instance not in stored for _, instance in references)
        if missing and now < transaction.asked + self._wait:
            detail = f"{missing} instances are not here yet"
            self._transactions.postpone(transaction, now + _LOOK_AGAIN_SECONDS, detail, now)
            return
        failures = []
        for sop_class, instance in references:
            if self._stopping.is_set():
                return
            failures.append(self._failure(sop_class, instance, stored.get(instance)))
        self._transactions.checked(transaction, failures, time.time())

    def _failure(self, sop_class: str, instance: str, stored: Stored | None) -> int:
        """FailureReason of one reference; 0: what we have is what was received."""
        if stored is None:
            return n.NO_SUCH_INSTANCE
        if stored.sop_class_uid != sop_class:
            return CLASS_INSTANCE_CONFLICT
        if stored.purged:  # "was not available" (PS3.3 C.14.1.1): nothing failed, it is not here
            return n.NO_SUCH_INSTANCE
        try:
            digest, _ = dataset_digest(self._spool.path(stored.series_uid, instance))
        except OSError as error:
            log.error("instance %s cannot be read: %s", instance, error.strerror)
            return n.PROCESSING_FAILURE
        if digest != stored.sha256:
            log.error("instance %s is not what was received: its digest differs", instance)
            return n.PROCESSING_FAILURE
        return COMMITTED

    def _start_reporting(self, name: str, transactions: list[Transaction], now: float) -> None:
        """Report all that is due to a peer over one association, on a thread of its own."""
        peer = self._config.peers.get(name)
        if peer is None:
            detail = f"peers.{name} is no longer in the configuration"
            for transaction in transactions:
                self._transactions.park(transaction, detail, now)
        elif self._address(name) is None and not self._is_there(name):
            detail = f"peers.{name} has no port to report to, and its association has ended"
            for transaction in transactions:
                self._put_off(transaction, peer, detail, LONGEST_RETRY_SECONDS)
        elif self._address(name) or self._settled(name):
            arguments = (name, peer, transactions)
            thread = threading.Thread(
                target=self._report, args=arguments, name=f"report to {name}", daemon=True
            )
            self._reporters[name] = thread
            thread.start()

    def _is_there(self, name: str) -> bool:
        """Is the association on which this peer asked still open?"""
        with self._lock:
            held = self._held.get(name)
            if held is not None and not held.association.is_established:
                del self._held[name]
                return False
            return held is not None

    def _settled(self, name: str) -> bool:
        held = self._held[name]
        return time.monotonic() - held.asked >= _SETTLE_SECONDS

    def _report(self, name: str, peer: Peer, transactions: Sequence[Transaction]) -> None:
        waiting = list(transactions)
        try:
            with self._association(name) as association:
                while waiting and not self._stopping.is_set():
                    self._report_one(association, waiting[0])
                    waiting.pop(0)
        except DeliveryError as error:
            for transaction in waiting:
                wait = _retry_wait(transaction.attempts)
                self._put_off(transaction, peer, str(error), wait)
        except Exception:  # they must be reported whatever breaks
            log.exception("reporting storage commitments to %s broke", name)
            for transaction in waiting:
                wait = _retry_wait(transaction.attempts)
                self._put_off(transaction, peer, "unexpected; traceback in the log", wait)

    def _report_one(self, association: Association, transaction: Transaction) -> None:
        """Raises DeliveryError if it is worth another attempt."""
        now = time.time()
        results = self._transactions.results(transaction.uid)
        if not self._still_hold(transaction.uid, results):
            self._transactions.outdated(transaction, now)
            return
        status = send_report(association, transaction.uid, results)
        if status is None:
            raise DeliveryError("no answer to N-EVENT-REPORT")
        if status in _MAY_WORK_LATER:
            raise DeliveryError(f"N-EVENT-REPORT was answered with 0x{status:04X}")
        if status:
            detail = f"N-EVENT-REPORT was answered with 0x{status:04X}"
            log.warning("storage commitment %s parked: %s", transaction.uid, detail)
            self._transactions.park(transaction, detail, time.time())
        else:
            self._transactions.reported(transaction, time.time())

    def _still_hold(self, uid: str, results: Sequence[Result]) -> bool:
        """Is everything we are about to commit still there? A report may be days late."""
        stored = self._transactions.stored(uid)
        for _, instance, failure in results:
            if failure == COMMITTED:
                known = stored[instance]
                if known.purged or not self._spool.path(known.series_uid, instance).is_file():
                    return False
        return True

    def _association(self, name: str) -> AbstractContextManager[Association]:
        """A new association to the peer, or, if we cannot call it, the one on which it asked."""
        address = self._address(name)
        if address is None:
            return nullcontext(self._held[name].association)
        return reporting_association(address)

    def _address(self, name: str) -> Address | None:
        """Where the peer listens, if we know it."""
        return address_of(name, self._config.peers[name], self._config)

    def _put_off(self, transaction: Transaction, peer: Peer, detail: str, wait: float) -> None:
        """Try again after `wait` seconds, or give up if the request is too old by now."""
        now = time.time()
        if now - transaction.asked > peer.retry_for_hours * 3600:
            log.warning("storage commitment %s parked: %s", transaction.uid, detail)
            self._transactions.park(transaction, detail, now)
        else:
            log.info("storage commitment %s put off: %s", transaction.uid, detail)
            self._transactions.postpone(transaction, now + wait, detail, now)


def _retry_wait(attempts: int) -> float:
    """Seconds before the next attempt: exponential, with jitter against herds."""
    wait = min(FIRST_RETRY_SECONDS * 2.0 ** min(attempts, 20), LONGEST_RETRY_SECONDS)
    return wait * random.uniform(0.75, 1.25)  # noqa: S311
