"""A requestor made of bytes, which can say anything: the stranger of the hostile tests."""

import socket
import struct
from collections.abc import Sequence
from types import TracebackType

CT = "1.2.840.10008.5.1.4.1.1.2"
VERIFICATION = "1.2.840.10008.1.1"
FIND = "1.2.840.10008.5.1.4.1.2.1.1"
EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RP, ABORT = 2, 3, 4, 6, 7
RELEASE_RQ_PDU = struct.pack(">BxL4x", 5, 4)
ABORT_PDU = struct.pack(">BxL4x", 7, 4)
DEFAULT_CONTEXTS = ((1, VERIFICATION, (IMPLICIT,)), (3, CT, (EXPLICIT, IMPLICIT)))
Contexts = Sequence[tuple[int, str, Sequence[str]]]


def pdu(kind: int, body: bytes, length: int | None = None) -> bytes:
    return struct.pack(">BxL", kind, len(body) if length is None else length) + body


def item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def associate_rq(
    contexts: Contexts = DEFAULT_CONTEXTS,
    *,
    calling: str = "WIRE",
    user: bytes = b"",
    max_length: int = 16384,
    application: str = "1.2.840.10008.3.1.1.1",
    version: int = 1,
) -> bytes:
    """`user`: more sub-items of the user information."""
    body = struct.pack(">HH", version, 0) + b"DICOMNODE".ljust(16) + calling.encode().ljust(16)
    body += bytes(32) + item(0x10, application.encode())
    for number, abstract, transfers in contexts:
        syntaxes = b"".join(item(0x40, uid.encode()) for uid in transfers)
        body += item(0x20, bytes([number, 0, 0, 0]) + item(0x30, abstract.encode()) + syntaxes)
    who = item(0x51, struct.pack(">L", max_length)) + item(0x52, b"1.2.3")
    return pdu(1, body + item(0x50, who + user))


def _even(uid: str) -> bytes:
    value = uid.encode()
    return value + bytes(len(value) % 2)


def element(number: int, value: bytes) -> bytes:
    return struct.pack("<HHL", 0, number, len(value)) + value


def command(
    field: int,
    *,
    sop_class: str = CT,
    sop_instance: str = "",
    data_set: bool = False,
    message_id: int = 7,
) -> bytes:
    """A request's command set."""
    elements = element(0x0002, _even(sop_class)) + element(0x0100, struct.pack("<H", field))
    elements += element(0x0110, struct.pack("<H", message_id))
    elements += element(0x0700, bytes(2))  # Priority: DCMTK insists on it
    elements += element(0x0800, struct.pack("<H", 0x0000 if data_set else 0x0101))
    if sop_instance:
        elements += element(0x1000, _even(sop_instance))
    return element(0, struct.pack("<L", len(elements))) + elements


def store_rq(sop_instance: str = "1.2.3.4", sop_class: str = CT) -> bytes:
    return command(1, sop_class=sop_class, sop_instance=sop_instance, data_set=True)


ECHO_RQ = command(0x30, sop_class=VERIFICATION)


def pdv(context: int, control: int, value: bytes) -> bytes:
    return struct.pack(">LBB", len(value) + 2, context, control) + value


def p_data(context: int, control: int, value: bytes) -> bytes:
    return pdu(P_DATA, pdv(context, control, value))


def store(data_set: bytes, sop_instance: str = "1.2.3.4", size: int = 16000) -> bytes:
    """A whole C-STORE request, its data set in fragments of `size` bytes."""
    parts = [data_set[at : at + size] for at in range(0, len(data_set), size)] or [b""]
    message = p_data(3, 3, store_rq(sop_instance))
    for part in parts[:-1]:
        message += p_data(3, 0, part)
    return message + p_data(3, 2, parts[-1])


class Wire:
    """One connection."""

    def __init__(self, port: int, seconds: float = 10.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=seconds)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> "Wire":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> tuple[int, bytes]:
        """Type and body of the next PDU; (0, b"") when the connection has ended."""
        header = self._exactly(6)
        if len(header) < 6:
            return 0, b""
        kind, length = struct.unpack(">BxL", header)
        return kind, self._exactly(length)

    def ask(self, data: bytes) -> tuple[int, bytes]:
        self.send(data)
        return self.read()

    def associate(self, contexts: Contexts = DEFAULT_CONTEXTS, **options: object) -> bytes:
        """The body of the A-ASSOCIATE-AC."""
        kind, body = self.ask(associate_rq(contexts, **options))  # type: ignore[arg-type]
        assert kind == ASSOCIATE_AC, f"answered by PDU type {kind}: {body!r}"
        return body

    def status(self, data: bytes) -> tuple[int, int, str]:
        """Command field, status and ErrorComment of the answer to a message."""
        kind, body = self.ask(data)
        assert kind == P_DATA, f"answered by PDU type {kind}: {body!r}"
        return read_response(body[6:])

    def echo(self) -> int:
        return self.status(p_data(1, 3, ECHO_RQ))[1]

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                part = self.socket.recv(count - len(data))
            except ConnectionError:
                break
            if not part:
                break
            data += part
        return data


def read_response(command_set: bytes) -> tuple[int, int, str]:
    elements, at = {}, 0
    while at < len(command_set):
        _, number, length = struct.unpack_from("<HHL", command_set, at)
        elements[number] = command_set[at + 8 : at + 8 + length]
        at += 8 + length
    field, status = (int.from_bytes(elements[n], "little") for n in (0x0100, 0x0900))
    return field, status, elements.get(0x0902, b"").decode().strip()


def context_results(accept: bytes) -> dict[int, tuple[int, str]]:
    """Result and transfer syntax by context ID, from the body of an A-ASSOCIATE-AC."""
    results, at = {}, 68
    while at < len(accept):
        kind, length = struct.unpack_from(">BxH", accept, at)
        value = accept[at + 4 : at + 4 + length]
        if kind == 0x21:
            results[value[0]] = (value[2], value[8:].decode())
        at += 4 + length
    return results
