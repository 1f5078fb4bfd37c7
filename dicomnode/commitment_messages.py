"""Storage commitment on the wire: N-ACTION and N-EVENT-REPORT, read and sent (PS3.4 J.3)."""

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
from dicomnode.scu import Address, Associated, tls_arguments
from dicomnode.transactions import Reference, Result

PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"
"""The well-known SOP instance that all of this service is about (PS3.4 J.3.5)."""
REQUEST_COMMITMENT = 1
"""The only action type (PS3.4 J.3.2)."""
ALL_COMMITTED, FAILURES_EXIST = 1, 2
"""Event types (PS3.4 J.3.3)."""
NO_SUCH_EVENT = 0x0113
"""Status of N-EVENT-REPORT (PS3.7 10.1.1.1.8)."""
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
    request: Any = event.request
    _check_instance(request.RequestedSOPClassUID, request.RequestedSOPInstanceUID)
    if request.ActionTypeID != REQUEST_COMMITMENT:
        raise OperationRefused(NO_SUCH_ACTION, "the only action type is 1")
    try:
        information = event.action_information
        transaction = information.get("TransactionUID")
        items = _items_of(information, "ReferencedSOPSequence")
    except MALFORMED as error:
        text = "the action information cannot be parsed"
        raise OperationRefused(INVALID_ARGUMENT, text) from error
    if not items:
        raise OperationRefused(INVALID_ARGUMENT, "ReferencedSOPSequence is missing or empty")
    uid = n.valid_uid(transaction, "TransactionUID", INVALID_ARGUMENT)
    references = {(sop_class, instance): None for sop_class, instance, _ in _valid(items)}
    return uid, list(references)


def read_report(event: evt.Event) -> tuple[str, list[Result]]:
    """Transaction UID and result of each instance of a report (PS3.4 Table J.3-2).

    Raises:
        OperationRefused: 0x0118, 0x0112 or 0x0113 for another class, instance or event; 0x0115
            for event information that does not hold what it must; 0x0213 for too much of it.
    """
    request: Any = event.request
    _check_instance(request.AffectedSOPClassUID, request.AffectedSOPInstanceUID)
    if request.EventTypeID not in (ALL_COMMITTED, FAILURES_EXIST):
        raise OperationRefused(NO_SUCH_EVENT, "the event types are 1 and 2")
    try:
        information = event.event_information
        transaction = information.get("TransactionUID")
        committed = _items_of(information, "ReferencedSOPSequence")
        failed = _items_of(information, "FailedSOPSequence")
    except MALFORMED as error:
        text = "the event information cannot be parsed"
        raise OperationRefused(INVALID_ARGUMENT, text) from error
    uid = n.valid_uid(transaction, "TransactionUID", INVALID_ARGUMENT)
    results = [(sop_class, instance, 0) for sop_class, instance, _ in _valid(committed)]
    for sop_class, instance, reason in _valid(failed):  # without a reason it failed all the same
        failure = reason if isinstance(reason, int) and reason else n.PROCESSING_FAILURE
        results.append((sop_class, instance, failure))
    return uid, results


_Item = tuple[object, object, object]


def _items_of(information: Dataset, keyword: str) -> list[_Item]:
    """Class, instance and FailureReason of each item, as sent; may raise any of `MALFORMED`."""
    return [
        (
            item.get("ReferencedSOPClassUID"),
            item.get("ReferencedSOPInstanceUID"),
            item.get("FailureReason"),
        )
        for item in n.items_of(information, keyword)
    ]


def _valid(items: Sequence[_Item]) -> Iterator[tuple[str, str, object]]:
    if len(items) > MAX_REFERENCES:
        raise OperationRefused(n.RESOURCE_LIMITATION, f"more than {MAX_REFERENCES} references")
    for sop_class, instance, reason in items:
        yield (
            n.valid_uid(sop_class, "ReferencedSOPClassUID", INVALID_ARGUMENT),
            n.valid_uid(instance, "ReferencedSOPInstanceUID", INVALID_ARGUMENT),
            reason,
        )


def _check_instance(sop_class: object, instance: object) -> None:
    """Raises OperationRefused unless it is about the one SOP instance there is."""
    if sop_class != StorageCommitmentPushModel:
        raise OperationRefused(n.NO_SUCH_CLASS, "not the Storage Commitment Push Model")
    if instance != PUSH_MODEL_INSTANCE:
        raise OperationRefused(n.NO_SUCH_INSTANCE, "not the well-known Push Model SOP instance")


def requesting_association(address: Address, handlers: Sequence[Any]) -> Associated:
    """An association on which we may ask, and be told with `handlers`: the SCU's default roles.

    Entering it raises DeliveryRefused if the peer does not commit, else DeliveryError.
    """
    syntaxes = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    contexts = [(str(StorageCommitmentPushModel), str(syntax)) for syntax in syntaxes]
    return Associated(address, contexts, handlers)


def request_commitment(
    association: Association, transaction_uid: str, references: Sequence[Reference]
) -> int:
    """Ask to commit; the status of the answer.

    Raises:
        DeliveryError: there is no answer, or the association was lost.
    """
    information = Dataset()
    information.TransactionUID = transaction_uid
    information.ReferencedSOPSequence = [_item(*reference, 0) for reference in references]
    try:
        status, _ = association.send_n_action(
            information, REQUEST_COMMITMENT, StorageCommitmentPushModel, PUSH_MODEL_INSTANCE
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise DeliveryError("the association was lost") from error
    if status.get("Status") is None:
        raise DeliveryError("no answer to N-ACTION")
    return int(status.Status)


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
