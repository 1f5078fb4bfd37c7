"""Storage commitment on the wire: the N-ACTION we read, the N-EVENT-REPORT we send (PS3.4 J.3)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from dicomnode import normalized as n
from dicomnode.errors import DeliveryError, OperationRefused
from dicomnode.part10 import MALFORMED
from dicomnode.scu import Address, tls_arguments
from dicomnode.transactions import Reference, Result

PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"
"""The well-known SOP instance that all of this service is about (PS3.4 J.3.5)."""
REQUEST_COMMITMENT = 1
"""The only action type (PS3.4 J.3.2)."""
ALL_COMMITTED, FAILURES_EXIST = 1, 2
"""Event types (PS3.4 J.3.3)."""
NO_SUCH_ACTION = 0x0123
INVALID_ARGUMENT = 0x0115
"""Statuses of N-ACTION (PS3.7 10.1.4.1.10)."""
MAX_REFERENCES = 100_000
"""Instances in one request."""
_CONNECT_SECONDS, _RESPONSE_SECONDS = 15, 60


def read_request(event: evt.Event) -> tuple[str, list[Reference]]:
    """Transaction UID and references of a request, each reference once (PS3.4 Table J.3-1).

    Raises:
        OperationRefused: 0x0118, 0x0112 or 0x0123 for another class, instance or action; 0x0115
            for action information that does not hold what it must; 0x0213 for too much of it.
    """
    _check_operation(event.request)
    try:
        information = event.action_information
        transaction = information.get("TransactionUID")
        items = [
            (item.get("ReferencedSOPClassUID"), item.get("ReferencedSOPInstanceUID"))
            for item in n.items_of(information, "ReferencedSOPSequence")
        ]
    except MALFORMED as error:
        text = "the action information cannot be parsed"
        raise OperationRefused(INVALID_ARGUMENT, text) from error
    if not items:
        raise OperationRefused(INVALID_ARGUMENT, "ReferencedSOPSequence is missing or empty")
    if len(items) > MAX_REFERENCES:
        raise OperationRefused(n.RESOURCE_LIMITATION, f"more than {MAX_REFERENCES} references")
    uid = n.valid_uid(transaction, "TransactionUID", INVALID_ARGUMENT)
    references = {
        (
            n.valid_uid(sop_class, "ReferencedSOPClassUID", INVALID_ARGUMENT),
            n.valid_uid(instance, "ReferencedSOPInstanceUID", INVALID_ARGUMENT),
        ): None
        for sop_class, instance in items
    }
    return uid, list(references)


def _check_operation(request: Any) -> None:
    """Raises OperationRefused unless it is the one action on the one SOP instance there is."""
    if request.RequestedSOPClassUID != StorageCommitmentPushModel:
        raise OperationRefused(n.NO_SUCH_CLASS, "not the Storage Commitment Push Model")
    if request.RequestedSOPInstanceUID != PUSH_MODEL_INSTANCE:
        raise OperationRefused(n.NO_SUCH_INSTANCE, "not the well-known Push Model SOP instance")
    if request.ActionTypeID != REQUEST_COMMITMENT:
        raise OperationRefused(NO_SUCH_ACTION, "the only action type is 1")


@contextmanager
def reporting_association(address: Address) -> Iterator[Association]:
    """An association on which we may send event reports.

    We are the SCP and yet the requestor, so we propose the SCP role for ourselves (PS3.7 D.3.3.4).

    Raises:
        DeliveryError: the peer does not listen, rejects it, or does not want reports; or our
            certificates do not serve.
    """
    entity = AE(address.calling_ae)
    entity.connection_timeout = entity.acse_timeout = _CONNECT_SECONDS
    entity.dimse_timeout = entity.network_timeout = _RESPONSE_SECONDS
    syntaxes = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    entity.add_requested_context(StorageCommitmentPushModel, syntaxes)
    role = build_role(StorageCommitmentPushModel, scp_role=True)
    where = f"{address.called_ae} at {address.host}:{address.port}"
    association = entity.associate(
        address.host,
        address.port,
        ae_title=address.called_ae,
        ext_neg=[role],
        tls_args=tls_arguments(address),
    )
    if not association.is_established:
        raise DeliveryError(f"{where}: {_why_not(association)}")
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def _why_not(association: Association) -> str:
    answer: Any = association.acceptor.primitive
    if association.is_rejected and answer is not None:
        return f"rejected the association: {answer.reason_str}"
    if association.rejected_contexts:
        return "does not accept storage commitment reports"
    return "no association (not listening, unreachable or aborted)"


def send_report(
    association: Association, transaction_uid: str, results: Sequence[Result]
) -> int | None:
    """Send the result; the status of the peer's answer, or None if none came."""
    failures = any(failure for _, _, failure in results)
    try:
        status, _ = association.send_n_event_report(
            event_information(transaction_uid, results),
            FAILURES_EXIST if failures else ALL_COMMITTED,
            StorageCommitmentPushModel,
            PUSH_MODEL_INSTANCE,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise DeliveryError("the association was lost") from error
    value = status.get("Status")
    return None if value is None else int(value)


def event_information(transaction_uid: str, results: Sequence[Result]) -> Dataset:
    """What is committed and what is not, with the reason (PS3.4 Table J.3-2)."""
    information = Dataset()
    information.TransactionUID = transaction_uid
    committed = [_item(*result) for result in results if not result[2]]
    failed = [_item(*result) for result in results if result[2]]
    if committed:
        information.ReferencedSOPSequence = committed
    if failed:
        information.FailedSOPSequence = failed
    return information


def _item(sop_class: str, instance: str, failure: int) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class
    item.ReferencedSOPInstanceUID = instance
    if failure:
        item.FailureReason = failure
    return item
