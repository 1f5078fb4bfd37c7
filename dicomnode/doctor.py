"""What a peer accepts, and whether we would accept it, in plain words."""

from dataclasses import dataclass

from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RLELossless,
)
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from dicomnode.errors import DeliveryError
from dicomnode.scu import Address, Associated, echo

_SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
    HTJ2KLossless,
)
_WHAT_WE_SEND = (CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Lines to print, and whether everything that must work does."""

    lines: list[str]
    healthy: bool


def examine(peer: Address, ourselves: Address) -> Diagnosis:
    """Ask `peer` what it can do, and our own port whether it takes calls by the peer's AE title.

    Args:
        peer: where the peer listens.
        ourselves: our own port, with the peer's AE title as the calling one.
    """
    lines: list[str] = []
    healthy = True
    try:
        echo(peer)
        lines.append(f"{peer.called_ae} at {peer.host}:{peer.port} answers our C-ECHO")
        lines += _contexts(peer)
    except DeliveryError as error:
        lines.append(f"no C-ECHO to the peer: {error}")
        healthy = False
    try:
        echo(ourselves)
        lines.append(f"our node takes calls by the AE title {ourselves.calling_ae} (from here)")
    except DeliveryError as error:
        lines.append(f"a call to our own port by its AE title fails: {error}")
        healthy = False
    return Diagnosis(lines, healthy)


def _contexts(peer: Address) -> list[str]:
    wanted = [(str(sop), str(syntax)) for sop in _WHAT_WE_SEND for syntax in _SYNTAXES]
    wanted.append((str(StorageCommitmentPushModel), str(ImplicitVRLittleEndian)))
    with Associated(peer, wanted) as association:
        acceptor = association.acceptor
        length = acceptor.maximum_length
        version = acceptor.implementation_version_name or "no version name"
        lines = [
            f"implementation {acceptor.implementation_class_uid} ({version})",
            f"longest PDU it takes: {f'{length} bytes' if length else 'no limit'}",
        ]
        accepted: dict[str, list[str]] = {}
        for context in association.accepted_contexts:
            names = accepted.setdefault(str(context.abstract_syntax), [])
            names.append(UID(context.transfer_syntax[0]).name)
    for sop_class in map(str, _WHAT_WE_SEND):
        syntaxes = ", ".join(accepted.get(sop_class, [])) or "not accepted"
        lines.append(f"{UID(sop_class).name}: {syntaxes}")
    commits = str(StorageCommitmentPushModel) in accepted
    lines.append(f"Storage Commitment: {'accepted' if commits else 'not accepted'}")
    return lines
