"""What a worker process does next: the most urgent job, changing between two batches."""

import logging
from collections.abc import Callable
from multiprocessing.connection import Connection

from dicomnode.ahead import Ahead
from dicomnode.errors import Cancelled
from dicomnode.orders import Arriving, Cancel, Order, Outcome, Reply, Request, Withdrawal

log = logging.getLogger(__name__)

Translate = Callable[[Order | Withdrawal, Callable[[], None], Ahead], Outcome]
"""An order, what is to be called between its batches, what was inferred ahead -> its outcome."""


class Desk:
    """Takes messages from the node, does one job at a time, sends replies.

    A more urgent job that comes is done, to its end, between two batches of the one that runs; that
    one then goes on. What was inferred before is kept, so nothing is done twice.
    """

    def __init__(self, connection: Connection, translate: Translate, ahead: Ahead) -> None:
        self._connection, self._translate, self._ahead = connection, translate, ahead
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._cancelled: set[int] = set()

    def run(self) -> None:
        """Until the node closes the pipe, which raises EOFError."""
        while True:
            self._read(wait=not self._waiting)
            if self._waiting:
                self._do(self._most_urgent())
            else:
                self._ahead.step()

    def _read(self, *, wait: bool) -> None:
        """Take every message that is there; with `wait`, wait for one if there is nothing to do."""
        timeout = None if wait and not self._ahead.busy else 0
        while self._connection.poll(timeout):
            self._note(self._connection.recv())
            timeout = 0

    def _note(self, message: Request | Cancel | Arriving) -> None:
        if isinstance(message, Request):
            self._waiting.append(message)
        elif isinstance(message, Arriving):
            self._ahead.expect(message)
        else:
            self._cancelled.add(message.job)

    def _most_urgent(self) -> Request:
        request = min(self._waiting, key=lambda request: request.priority)
        self._waiting.remove(request)
        return request

    def _do(self, request: Request) -> None:
        self._running.append(request)
        try:
            outcome = self._translate(request.order, self._between, self._ahead)
        finally:
            self._running.remove(request)
            self._cancelled.discard(request.job)
        self._connection.send(Reply(request.job, outcome))

    def _between(self) -> None:
        """Between two batches of the innermost job.

        Raises:
            Cancelled: it is not wanted any more.
        """
        self._read(wait=False)
        mine = self._running[-1]
        if mine.job in self._cancelled:
            raise Cancelled("the job is not wanted any more")
        while any(request.priority < mine.priority for request in self._waiting):
            urgent = self._most_urgent()
            log.info("job %d overtakes job %d between two batches", urgent.job, mine.job)
            self._do(urgent)
