"""Storage Commitment Push Model SCU (PS3.4 Annex J): destinations commit what they accepted.

When a delivery is complete its destination is asked by N-ACTION to commit every instance it has
accepted. Its N-EVENT-REPORT comes on the same association, or, at any time, on one that it opens to
our listener. Without a report we ask again, with a new transaction, until `retry_for_hours`.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from dicomnode import normalized as n
from dicomnode.commitment_messages import (
    INVALID_ARGUMENT,
    read_report,
    request_commitment,
    requesting_association,
)
from dicomnode.config import NodeConfig
from dicomnode.errors import (
    DeliveryError,
    DeliveryRefused,
    JournalError,
    NoAssociation,
    OperationRefused,
)
from dicomnode.normalized import Answer, answer
from dicomnode.promises import Owed, Promise, Promises
from dicomnode.scu import Address, address_of
from dicomnode.tables import Database

log = logging.getLogger(__name__)

_MAY_WORK_LATER = (n.PROCESSING_FAILURE, n.RESOURCE_LIMITATION)
"""Answers to N-ACTION after which we ask again; with other failures we give up."""
_MOST_AT_A_TIME = 50
"""Requests on one association."""
_LOOK_AGAIN_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Waits:
    """How long we wait for what, in seconds."""

    report: float = 10.0
    """For reports on the association of the requests, before it is released."""
    first: float = 60.0
    """Before a request is repeated, or what is not committed is sent again; doubles each time."""
    longest: float = 3600.0

    def after(self, attempts: int) -> float:
        """Before the next request, after so many."""
        return min(self.first * 2.0 ** min(attempts, 20), self.longest)


class CommitmentRequests:
    """What we ask destinations to commit; safe to share between threads."""

    contexts = (str(StorageCommitmentPushModel),)
    """Abstract syntaxes to support."""
    reports = True

    def __init__(
        self,
        config: NodeConfig,
        database: Database,
        caller: Callable[[str, str], str | None],
        waits: Waits | None = None,
    ) -> None:
        """Nothing is read or sent before `recover` and `step`.

        Args:
            caller: our name of the peer with this AE title at this host, or None.
        """
        self._config, self._caller, self._waits = config, caller, waits or Waits()
        self._peers = config.committing_peers
        self._promises = Promises(database)
        self._askers: dict[str, threading.Thread] = {}
        self._stopping = threading.Event()
        self._news = threading.Condition()
        self._look = True  # something may be complete, from before the start

    @property
    def handlers(self) -> list[Any]:
        """What to bind on the listening AE."""
        return [(evt.EVT_N_EVENT_REPORT, self.on_report)]

    # reports

    def on_report(self, event: evt.Event) -> Answer:
        """Answer a report on an association that the peer has opened."""
        requestor = event.assoc.requestor
        peer = self._caller(str(requestor.ae_title).strip(), str(requestor.address))
        return self._answer(event, peer)

    def _answer(self, event: evt.Event, peer: str | None) -> Answer:
        """Success only when the result is in the journal (statuses: PS3.7 10.1.1.1.8)."""
        return answer("storage commitment report", lambda: self._believe(event, peer))

    def _believe(self, event: evt.Event, peer: str | None) -> None:
        uid, results = read_report(event)
        asked = self._promises.peer_of(uid)
        if asked is None or asked != peer:
            text = "TransactionUID is not of a request to this AE"
            raise OperationRefused(INVALID_ARGUMENT, text)
        self._promises.reported(uid, results, time.time(), self._waits.first)
        failed = sum(1 for _, _, failure in results if failure)
        log.info("%s reports on %s: %d of %d not committed", peer, uid, failed, len(results))
        with self._news:
            self._news.notify_all()

    # requests, by a thread of the node and one per peer that is being asked

    def recover(self, now: float) -> None:
        """After a start: ask again soon what was asked before."""
        self._promises.recover(self._peers, now)

    def delivered(self) -> None:
        """A delivery is complete: look at once who is to commit it."""
        self._look = True

    def step(self, busy: Mapping[str, int], now: float) -> None:
        """Begin to ask for what is due; `busy`: associations to each peer that are open already."""
        if not self._peers:
            return
        if self._look:
            self._look = False
            try:
                self._promises.expect(self._peers, now)
            except JournalError:
                self._look = True
                raise
        self._promises.step(now)
        due: dict[str, list[Owed]] = {}
        for owed in self._promises.due(now):
            if owed.peer in self._peers:
                due.setdefault(owed.peer, []).append(owed)
        asking = self.asking()
        for name, owed_by in due.items():
            peer = self._config.peers[name]
            address = address_of(name, peer, self._config)
            free = busy.get(name, 0) < peer.max_associations and name not in asking
            if address is not None and free and not self._stopping.is_set():
                self._start(name, address, owed_by[:_MOST_AT_A_TIME])

    def asking(self) -> frozenset[str]:
        """Peers to which an association of ours may be open now."""
        return frozenset(name for name, thread in self._askers.items() if thread.is_alive())

    def stop(self, grace: float) -> None:
        """Wait for no more reports; requests end within `grace` seconds, or are repeated later."""
        self._stopping.set()
        with self._news:
            self._news.notify_all()
        deadline = time.monotonic() + grace
        for thread in list(self._askers.values()):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self, name: str, address: Address, owed: list[Owed]) -> None:
        thread = threading.Thread(
            target=self._ask_all, args=(name, address, owed), name=f"ask {name}", daemon=True
        )
        self._askers[name] = thread
        thread.start()

    def _ask_all(self, name: str, address: Address, owed: list[Owed]) -> None:
        """Ask over one association; what was not asked at its end is due still."""
        try:
            for one in [one for one in owed if self._too_old(one)]:
                owed.remove(one)
                self._park(one, f"given up after {one.attempts} requests: {one.detail}")
            if owed:
                self._ask_over_one(name, address, owed)
        except JournalError as error:  # what it does not know is asked again
            log.error("asking %s to commit: %s", name, error)
        except Exception:  # it must be tried again whatever breaks
            log.exception("asking %s to commit broke", name)
            with contextlib.suppress(JournalError):
                for one in owed:
                    self._put_off(one, "unexpected; traceback in the log")

    def _ask_over_one(self, name: str, address: Address, owed: list[Owed]) -> None:
        waiting = list(owed)
        on_report = (evt.EVT_N_EVENT_REPORT, lambda event: self._answer(event, name))
        try:
            with requesting_association(address, [on_report]) as association:
                while waiting and not self._stopping.is_set():
                    self._ask(association, waiting[0])
                    waiting.pop(0)
                self._wait_for_reports(association, owed)
        except DeliveryRefused as error:
            for one in waiting:
                self._park(one, str(error))
        except NoAssociation as error:
            for one in waiting:
                self._put_off(one, str(error))
        except DeliveryError as error:
            for one in waiting[:1]:  # it may be to blame; the others are due still
                self._put_off(one, str(error))

    def _ask(self, association: Association, owed: Owed) -> None:
        """Raises DeliveryError if the association is of no use any more."""
        references = self._promises.references(owed.delivery)
        uid = self._promises.begin(owed.delivery)
        log.info("asking %s to commit delivery %d as %s", owed.peer, owed.delivery, uid)
        status = request_commitment(association, uid, references)
        now, words = time.time(), f"N-ACTION was answered with 0x{status:04X}"
        if status == n.SUCCESS:
            self._promises.accepted(owed, now + self._waits.after(owed.attempts), now)
        elif status in _MAY_WORK_LATER:
            self._put_off(owed, words)
        else:
            self._park(owed, words)

    def _too_old(self, owed: Owed) -> bool:
        """Was it asked for in vain for `retry_for_hours`?"""
        hours = self._config.peers[owed.peer].retry_for_hours
        return owed.attempts > 0 and time.time() - owed.since > hours * 3600

    def _put_off(self, owed: Owed, detail: str) -> None:
        """Ask again later; `_too_old` ends it."""
        log.info("commitment of delivery %d put off: %s", owed.delivery, detail)
        self._promises.postpone(owed, time.time() + self._waits.after(owed.attempts), detail)

    def _park(self, owed: Owed, detail: str) -> None:
        log.warning("commitment of delivery %d parked: %s", owed.delivery, detail)
        self._promises.park(owed, detail, time.time())

    def _wait_for_reports(self, association: Association, owed: Sequence[Owed]) -> None:
        deadline = time.monotonic() + self._waits.report
        with self._news:
            while association.is_established and not self._stopping.is_set():
                left = deadline - time.monotonic()
                states = {self._promises.state(one.delivery) for one in owed}
                if left <= 0 or all(
                    found is None or found[0] is not Promise.ASKED for found in states
                ):
                    return
                self._news.wait(min(left, _LOOK_AGAIN_SECONDS))
