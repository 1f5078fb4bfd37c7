"""The bytes of one connection, received into one buffer of bounded size, with a deadline."""

import mmap
import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil

_DRAINED = 4 << 20
"""Bytes we throw away from a peer that goes on sending after the end."""


class Closed(Exception):
    """The transport connection has ended (PS3.8 Evt17)."""


class Expired(Exception):
    """The deadline has passed (ARTIM, PS3.8 9.1.5; or our idle limit)."""


def room(size: int) -> memoryview:
    """Memory that the system has back as soon as nobody holds it; malloc might keep it."""
    return memoryview(mmap.mmap(-1, size))


class Stream:
    """Reads and writes; works for plain and for TLS sockets alike."""

    def __init__(self, connection: socket.socket, size: int) -> None:
        self._connection, self._poll = connection, select.poll()
        self._buffer = memoryview(bytearray(size))
        self._start = self._end = 0  # what has been received and not yet taken
        self._deadline = 0.0
        self._broken = False

    def expire_in(self, seconds: float) -> None:
        """Every read from now on must be over by then, however slowly the bytes drip."""
        self._deadline = time.monotonic() + seconds

    def exactly(self, count: int) -> memoryview:
        """The next `count` bytes, no more than the buffer holds; valid until the next call.

        Raises:
            Closed, Expired: the bytes did not come.
        """
        while self._end - self._start < count:
            if self._start:
                self._compact()
            self._end += self._receive(self._buffer[self._end :])
        return self._take(count)

    def some(self, most: int) -> memoryview:
        """At least 1 and at most `most` bytes, as they come; valid until the next call."""
        if self._start == self._end:
            self._start = 0
            self._end = self._receive(self._buffer)
        return self._take(min(most, self._end - self._start))

    def collect(self, count: int) -> bytes:
        """The next `count` bytes as a copy; memory grows only as they really come."""
        collected = bytearray()
        while len(collected) < count:
            collected += self.some(count - len(collected))
        return bytes(collected)

    def silent(self, seconds: float) -> bool:
        """Has nothing come for so long? Waits until something comes.

        Raises:
            Closed, Expired: nothing will.
        """
        if self._start != self._end:
            return False
        deadline = self._deadline
        self._deadline = min(deadline, time.monotonic() + seconds)
        try:
            self._start, self._end = 0, self._receive(self._buffer)
        except Expired:
            if self._deadline == deadline:
                raise
            return True
        finally:
            self._deadline = deadline
        return False

    def ahead(self) -> memoryview:
        """What was received beyond the last read, not taken; valid until the next call."""
        return self._buffer[self._start : self._end]

    def rest(self) -> bytes:
        """What was received beyond the last read."""
        return bytes(self._take(self._end - self._start))

    def drain(self) -> None:
        """Throw bytes away until the peer closes, or has sent too many, or time is up.

        Raises:
            Closed, Expired: always one of them.
        """
        self._start = self._end = 0
        for _ in range(_DRAINED // len(self._buffer)):
            self._receive(self._buffer)
        raise Expired

    def resize(self, size: int) -> None:
        """Change the buffer, large while data flow and small when idle; keeps what is in it."""
        waiting = self._end - self._start
        size = max(size, waiting)
        if size != len(self._buffer):
            buffer = memoryview(bytearray(size)) if size < mmap.PAGESIZE else room(size)
            buffer[:waiting] = self._buffer[self._start : self._end]
            self._buffer, self._start, self._end = buffer, 0, waiting

    def send(self, data: bytes, seconds: float) -> None:
        """Send all of it in one call. A peer that does not take it counts as gone.

        A failure shows at the next read, as every end of the connection does.
        """
        if self._broken:
            return
        try:
            self.send_all([data], time.monotonic() + seconds)
        except (OSError, Expired):
            self._broken = True

    def send_all(self, parts: Sequence[bytes | memoryview], deadline: float) -> None:
        """Send all parts in as few system calls as the peer's window allows.

        Raises:
            Expired: the peer has not taken all by then.
            OSError: the connection has ended.
        """
        connection = self._connection
        waiting = [memoryview(part) for part in parts]
        while waiting:
            if isinstance(connection, ssl.SSLSocket):  # which takes one buffer at a time
                send = partial(connection.send, waiting[0])
            else:
                send = partial(connection.sendmsg, waiting)
            sent = self._when_ready(send, select.POLLOUT, deadline)
            while waiting and sent >= len(waiting[0]):
                sent -= len(waiting.pop(0))
            if sent:
                waiting[0] = waiting[0][sent:]

    def _take(self, count: int) -> memoryview:
        start = self._start
        self._start += count
        return self._buffer[start : self._start]

    def _compact(self) -> None:
        waiting = self._end - self._start
        self._buffer[:waiting] = bytes(self._buffer[self._start : self._end])
        self._start, self._end = 0, waiting

    def _receive(self, into: memoryview) -> int:
        if self._broken:
            raise Closed
        try:
            receive = partial(self._connection.recv_into, into)
            count = self._when_ready(receive, select.POLLIN, self._deadline)
        except OSError:
            raise Closed from None
        if not count:
            raise Closed
        return count

    def _when_ready(self, operation: Callable[[], int], usual: int, deadline: float) -> int:
        """The result of a call that moves bytes, as soon as some can be moved.

        It is tried first: where data flow, nearly nothing has to be waited for, and each system
        call less is a moment in which no other thread can take the interpreter. `usual`: the event
        it waits for; but TLS may have to read before it can write, and the reverse.

        Raises:
            Expired: none could be moved in time.
            OSError: the connection has ended.
        """
        if self._connection.gettimeout() != 0:
            self._connection.setblocking(False)
        while (left := deadline - time.monotonic()) > 0:
            try:
                return operation()
            except BlockingIOError:
                awaited = usual
            except ssl.SSLWantReadError:
                awaited = select.POLLIN
            except ssl.SSLWantWriteError:
                awaited = select.POLLOUT
            self._poll.register(self._connection, awaited)
            self._poll.poll(ceil(left * 1000))
        raise Expired
