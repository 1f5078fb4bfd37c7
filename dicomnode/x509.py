"""What `tls` needs to know of an X.509 certificate: its dates, its key, its signature (RFC 5280).

The standard library verifies certificates but does not show these; the few fields are read from
the DER encoding (ITU-T X.690) here, from files of our own administrator.
"""

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

_PEM_BEGIN, _PEM_END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
_RSA = "1.2.840.113549.1.1.1"
_SHA1_SIGNATURES = {"1.2.840.113549.1.1.5", "1.2.840.10045.4.1", "1.2.840.10040.4.3"}
_MD5_SIGNATURES = {"1.2.840.113549.1.1.4"}
_EXTENDED_KEY_USAGE, _ANY_USAGE = "2.5.29.37", "2.5.29.37.0"
_SERVER_AUTH, _CLIENT_AUTH = "1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"
_UTC_TIME, _EXPLICIT_0, _EXPLICIT_3 = 0x17, 0xA0, 0xA3


@dataclass(frozen=True, slots=True)
class Certificate:
    """The fields of one certificate that decide whether it is fit for use."""

    not_before: datetime
    not_after: datetime
    rsa_bits: int | None
    """Length of the modulus; None: not an RSA key."""
    weak_hash: str | None
    """SHA-1 or MD5 where the signature stands on it, else None."""
    self_issued: bool
    """Subject and issuer are the same: a root, whose signature nobody checks."""
    server_auth: bool
    client_auth: bool
    """May stand for a server, for a client (extended key usage; absent: both)."""


def read_pem(text: str) -> list[Certificate]:
    """Every certificate of a PEM file, in file order; [] if it holds none.

    Raises:
        ValueError: a certificate in it is damaged.
    """
    blocks = text.split(_PEM_BEGIN)[1:]
    return [
        _certificate(ssl.PEM_cert_to_DER_cert(_PEM_BEGIN + block.partition(_PEM_END)[0] + _PEM_END))
        for block in blocks
    ]


def _certificate(der: bytes) -> Certificate:
    """Certificate ::= SEQUENCE { tbsCertificate, signatureAlgorithm, signature } (RFC 5280 4.1)."""
    try:
        tbs, algorithm, _ = _children(_only(der))
        fields = list(_items(tbs))
        if fields[0][0] == _EXPLICIT_0:  # version; absent: v1
            fields = fields[1:]
        _, _, issuer, validity, subject, key = (value for _, value in fields[:6])
        not_before, not_after = (_time(tag, value) for tag, value in _items(validity))
        usages = _extended_key_usage(fields[6:])
        return Certificate(
            not_before=not_before,
            not_after=not_after,
            rsa_bits=_rsa_bits(key),
            weak_hash=_weak_hash(_oid(_children(algorithm)[0])),
            self_issued=issuer == subject,
            server_auth=not usages or bool({_SERVER_AUTH, _ANY_USAGE} & usages),
            client_auth=not usages or bool({_CLIENT_AUTH, _ANY_USAGE} & usages),
        )
    except (ValueError, IndexError) as error:
        raise ValueError("a certificate is damaged") from error


def _weak_hash(signature: str) -> str | None:
    if signature in _SHA1_SIGNATURES:
        return "SHA-1"
    return "MD5" if signature in _MD5_SIGNATURES else None


def _rsa_bits(key: bytes) -> int | None:
    """SubjectPublicKeyInfo ::= SEQUENCE { algorithm, BIT STRING of RSAPublicKey }."""
    algorithm, bits = _children(key)
    if _oid(_children(algorithm)[0]) != _RSA:
        return None
    modulus = _children(_only(bits[1:]))[0]  # the first byte counts unused bits
    return int.from_bytes(modulus, "big").bit_length()


def _extended_key_usage(fields: list[tuple[int, bytes]]) -> set[str]:
    """The purposes in the extension, {} if the certificate has none."""
    for tag, wrapped in fields:
        for extension in _children(_only(wrapped)) if tag == _EXPLICIT_3 else ():
            parts = _children(extension)
            if _oid(parts[0]) == _EXTENDED_KEY_USAGE:
                return {_oid(part) for part in _children(_only(parts[-1]))}
    return set()


def _time(tag: int, value: bytes) -> datetime:
    """UTCTime YYMMDDHHMMSSZ (a year from 50 on is 19YY) or GeneralizedTime YYYYMMDDHHMMSSZ."""
    text = value.decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if text >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _oid(value: bytes) -> str:
    numbers, number = [], 0
    for byte in value:
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            numbers.append(number)
            number = 0
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, [first, numbers[0] - 40 * first, *numbers[1:]]))


def _only(data: bytes) -> bytes:
    return _children(data)[0]


def _children(data: bytes) -> list[bytes]:
    return [value for _, value in _items(data)]


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and value of each element in turn (definite lengths only, as DER demands)."""
    at = 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length >= 0x80:
            more = length & 0x7F
            length = int.from_bytes(data[at : at + more], "big")
            at += more
        if at + length > len(data):
            raise ValueError("an element is longer than what holds it")
        yield tag, data[at : at + length]
        at += length
