"""The listening socket: one bounded thread per connection, TLS, and the hand-over to pynetdicom."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from pynetdicom import AE, _config, evt
from pynetdicom.transport import AssociationServer, AssociationSocket, RequestHandler

from dicomnode.upper_layer import pdu
from dicomnode.upper_layer.association import Association, State
from dicomnode.upper_layer.guests import Guest, refuse_incomplete
from dicomnode.upper_layer.negotiation import is_ours
from dicomnode.upper_layer.service import Handler, Identity, Limits, Requestor

log = logging.getLogger(__name__)
_config.LOG_HANDLER_LEVEL = "none"  # what it would log we never show, and it fails on some requests

_BACKLOG = 1024
_MAX_WAITING = 128
"""Connections that have no association yet, or no longer; beyond it the oldest must go."""
_NO_RESOURCES_SECONDS = 0.2
"""Pause when the system has no file descriptor or thread for another connection."""

_MOST_UNANSWERED = 64
"""Messages that pynetdicom may hold of one association, one being answered; beyond, it is ended."""
_BEFORE_ITS_REQUEST = (State.IDLE, State.AWAITING_REQUEST)
_SILENT_SECONDS = 3.0
"""After so long without a message an association is not waited for when we stop."""
_LOOK_SECONDS = 0.2
_ABORTED_SECONDS = 5
"""For the thread of an aborted association to end."""

Secure = Callable[[socket.socket], socket.socket | None]
"""Does the TLS handshake, within ARTIM; the secured socket, or None: refused and closed."""


class Library:
    """pynetdicom's acceptor, for associations with services other than Storage and Verification.

    It opens no port of its own: `serve` gives it connections, with the bytes already read.
    """

    def __init__(self, ae: AE, handlers: list[Any], limits: Limits) -> None:
        """`ae`: its supported contexts are what it serves. `handlers`: its `evt_handlers`."""
        self.services: Mapping[str, bool] = {
            str(context.abstract_syntax): bool(context.scp_role)
            for context in ae.supported_contexts
            if not is_ours(str(context.abstract_syntax))
        }
        self._server = _Unbound(
            ae, ("127.0.0.1", 0), ae.ae_title, ae.supported_contexts, evt_handlers=handlers
        )
        self._limits = limits

    def guest(
        self, requestor: Requestor, contexts: Mapping[int, tuple[str, str]], max_length: int
    ) -> Guest | None:
        """Serves what of `contexts` is its own on an association of ours; None: nothing is."""
        server, who = self._server, requestor
        mine = {number: names for number, names in contexts.items() if names[0] in self.services}
        if not mine:
            return None
        return Guest(server.ae, server._handlers, who.calling_ae, who.host, mine, max_length)

    def serve(self, connection: socket.socket, address: Any, received: bytes) -> None:
        """Run an association to its end."""
        connection.settimeout(self._limits.idle_seconds)
        _HandOver(connection, address, self._server, received, self._limits)

    def abort(self) -> None:
        """End all associations that run now."""
        for association in self._server.active_associations:
            association.abort()


class _Unbound(AssociationServer):
    """The library's server, for its settings only."""

    def server_bind(self) -> None:
        """Bind nothing."""

    def server_activate(self) -> None:
        """Listen nowhere."""


class _HandOver(RequestHandler):
    """Makes the library's association, and waits for its end."""

    def __init__(
        self,
        connection: socket.socket,
        address: Any,
        server: _Unbound,
        received: bytes,
        limits: Limits,
    ) -> None:
        self._received, self._limits = received, limits
        super().__init__(connection, address, server)

    def handle(self) -> None:
        association = self._create_association()
        replay = _Replay(association, self.request, self._received, self._limits)
        association.dul.socket = replay
        association.dul.event_queue.get_nowait()  # two sockets announced one connection
        refuse_incomplete(association, replay.note)
        evt.trigger(association, evt.EVT_CONN_OPEN, {"address": self.client_address})
        association.start()
        association.join()


class _Replay(AssociationSocket):
    """The library's socket: it first gives what we have read, and lets no peer fill the memory."""

    def __init__(
        self, association: Any, connection: socket.socket, received: bytes, limits: Limits
    ) -> None:
        self._association: Any = association
        self._received, self._limits = received, limits
        self._most = max(limits.max_pdu_bytes, limits.max_request_bytes)
        super().__init__(association, client_socket=connection)

    @property
    def ready(self) -> bool:
        return bool(self._received) or bool(super().ready)

    def recv(self, nr_bytes: int) -> bytearray:
        """Called for the header and for the rest of each PDU, when those before it are decoded."""
        why = "a PDU is longer than we announced" if nr_bytes > self._most else self._too_much()
        if why:
            self.note(why)
            self.send(pdu.abort(2, pdu.AbortReason.INVALID_PARAMETER))
            raise ConnectionAbortedError(why)
        first = bytearray(self._received[:nr_bytes])
        self._received = self._received[nr_bytes:]
        return first + super().recv(nr_bytes - len(first)) if len(first) < nr_bytes else first

    def note(self, words: str) -> None:
        log.warning("association from %s: %s", self._association.requestor.address, words)

    def _too_much(self) -> str:
        """Which limit is passed by what the library holds of this association; empty: none."""
        service = self._association.dimse
        if service.msg_queue.qsize() > _MOST_UNANSWERED:
            return "too many requests that wait for their answer"
        message = service.message  # half-received
        if message is None:
            return ""
        if message.encoded_command_set.getbuffer().nbytes > self._limits.max_command_bytes:
            return "the command set is too long"
        if message.data_set.getbuffer().nbytes > self._limits.max_library_bytes:
            return "the data set is too long"
        return ""


class _Connection:
    """One accepted connection, and what serves it."""

    def __init__(self, connection: socket.socket, address: Any) -> None:
        self.socket, self.address = connection, address
        try:
            self._handle = connection.dup()  # a socket under TLS cannot be cut by another thread
        except OSError:
            connection.close()
            raise
        self.association: Association | None = None
        self.handed_over = False
        self.leaving = False
        """Was it cut, so that its thread is about to end?"""

    @property
    def established(self) -> bool:
        """Does an association run on it?"""
        return self.handed_over or (self.association is not None and self.association.established)

    @property
    def begun(self) -> bool:
        """Is its request answered, and the connection not at its end?"""
        ours = self.association
        return self.handed_over or (ours is not None and ours.state not in _BEFORE_ITS_REQUEST)

    @property
    def silent(self) -> bool:
        """Does nobody seem to need it? Of an association of pynetdicom's we cannot tell."""
        return self.association is not None and self.association.silent(_SILENT_SECONDS)

    def cut(self) -> None:
        """End its blocking calls from another thread; its own thread then closes it."""
        self.leaving = True
        with contextlib.suppress(OSError):  # it has ended meanwhile
            self._handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()
        self._handle.close()

    def abort(self) -> None:
        if self.association is not None and self.association.established:
            self.association.abort()
        else:
            self.cut()


class Listener:
    """Accepts connections and serves each on a thread of its own."""

    def __init__(
        self,
        address: tuple[str, int],
        handler: Handler,
        *,
        identity: Identity,
        limits: Limits,
        max_associations: int,
        secure: Secure | None = None,
        library: Library | None = None,
    ) -> None:
        """`address`: host and port; port 0 lets the system choose."""
        self._address, self._handler = address, handler
        self._identity, self._limits = identity, limits
        self._secure, self._library = secure, library
        self._slots = threading.Semaphore(max_associations)
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._open: dict[_Connection, threading.Thread] = {}  # oldest first

    @property
    def port(self) -> int:
        """The port we listen on; 0 when we do not."""
        return 0 if self._socket is None else int(self._socket.getsockname()[1])

    @property
    def associations(self) -> int:
        """How many are open now, those of the library included."""
        return sum(connection.established for connection, _ in self._connections())

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address is in use or not ours.
        """
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        listening = socket.create_server(self._address, family=family, backlog=_BACKLOG)
        self._socket = listening
        threading.Thread(
            target=self._accept, args=(listening,), name="dicom-accept", daemon=True
        ).start()

    def drain(self, grace: float) -> None:
        """Take no more connections; let associations end for `grace` seconds, then abort them.

        Those on which no message comes for `_SILENT_SECONDS` are aborted earlier; as long a peer
        has to close the connection after the end of its association.
        """
        listening, self._socket = self._socket, None
        if listening is None:
            return
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)  # wakes `accept`, as closing would not
        listening.close()
        deadline = time.monotonic() + grace
        while (left := deadline - time.monotonic()) > 0:
            working = [pair for pair in self._connections() if pair[0].begun]
            if not working:
                break
            for connection, _ in working:
                if connection.silent:
                    connection.abort()
            working[0][1].join(min(left, _LOOK_SECONDS))
        if self._library is not None:
            self._library.abort()
        others = self._connections()
        for connection, _ in others:
            connection.abort()
        for connection, thread in others:
            thread.join(_ABORTED_SECONDS)
            connection.cut()

    def _connections(self) -> list[tuple[_Connection, threading.Thread]]:
        with self._lock:
            return list(self._open.items())

    def _accept(self, listening: socket.socket) -> None:
        while self._socket is listening:
            try:
                connection = _Connection(*listening.accept())
            except OSError as error:
                if self._socket is listening:
                    log.warning("could not accept a connection: %s", error.strerror)
                    time.sleep(_NO_RESOURCES_SECONDS)
                continue
            self._make_room()
            self._begin(connection)

    def _make_room(self) -> None:
        """Close the oldest connection without an association, if there are too many of them."""
        waiting = [one for one, _ in self._connections() if not (one.established or one.leaving)]
        if len(waiting) >= _MAX_WAITING:
            waiting[0].cut()

    def _begin(self, connection: _Connection) -> None:
        thread = threading.Thread(target=self._serve, args=(connection,), name="dicom", daemon=True)
        with self._lock:
            self._open[connection] = thread
        if self._socket is None:  # `drain` may have looked before
            self._forget(connection)
            return
        try:
            thread.start()
        except RuntimeError:
            log.warning("no thread for another connection")
            self._forget(connection)
            time.sleep(_NO_RESOURCES_SECONDS)

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._open.pop(connection, None)
        connection.close()

    def _serve(self, connection: _Connection) -> None:
        """Serve one connection to its end; runs on a thread of its own."""
        try:
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            secured = self._secured(connection.socket)
            if secured is None:
                return
            connection.socket = secured
            untouched = self._associate(connection)
            if untouched is not None and self._library is not None:
                self._hand_over(connection, untouched, self._library)
        except OSError as error:
            log.info("a connection from %s ended: %s", connection.address[0], error.strerror)
        finally:
            self._forget(connection)

    def _secured(self, connection: socket.socket) -> socket.socket | None:
        return connection if self._secure is None else self._secure(connection)

    def _associate(self, connection: _Connection) -> bytes | None:
        library = self._library
        connection.association = Association(
            connection.socket,
            str(connection.address[0]),
            self._handler,
            identity=self._identity,
            limits=self._limits,
            slots=self._slots,
            others=library,
        )
        return connection.association.run()

    def _hand_over(self, connection: _Connection, received: bytes, library: Library) -> None:
        if not self._slots.acquire(blocking=False):
            connection.socket.sendall(pdu.associate_reject(pdu.LOCAL_LIMIT))
            return
        connection.handed_over = True
        try:
            library.serve(connection.socket, connection.address, received)
        finally:
            self._slots.release()
