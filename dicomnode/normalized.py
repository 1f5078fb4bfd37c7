"""What the handlers of the normalized services (DIMSE-N, PS3.7 10) share: reading and refusing."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from pydicom import Dataset
from sqlalchemy.exc import OperationalError

from dicomnode.errors import CannotUnderstand, JournalBusy, OperationRefused
from dicomnode.spool import checked_uid

log = logging.getLogger(__name__)

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
NO_SUCH_INSTANCE = 0x0112
NO_SUCH_CLASS = 0x0118
NOT_AUTHORISED = 0x0124
RESOURCE_LIMITATION = 0x0213

Answer = tuple[Dataset, Dataset | None]
"""Status with its optional fields, and the reply's data set: what pynetdicom wants of a handler."""


def answer(what: str, serve: Callable[[], Dataset | None]) -> Answer:
    """Serve a request; a refusal becomes its status, an unusable journal 0x0213."""
    status, reply = Dataset(), None
    status.Status = SUCCESS
    try:
        reply = serve()
    except OperationRefused as refusal:
        status.Status = refusal.status
        status.ErrorComment = str(refusal)[:64]
        if refusal.error_id is not None:
            status.ErrorID = refusal.error_id
        log.warning("answered %s with 0x%04X: %s", what, refusal.status, refusal)
    except (JournalBusy, OperationalError):
        status.Status = RESOURCE_LIMITATION
        status.ErrorComment = "the journal cannot be written now; try again"
        log.exception("answered %s with 0x%04X", what, RESOURCE_LIMITATION)
    return status, reply


def valid_uid(value: object, keyword: str, status: int) -> str:
    """`value` as a UID.

    Raises:
        OperationRefused: with `status`, if it is missing or no UID.
    """
    try:
        return checked_uid(value, keyword)
    except CannotUnderstand as error:
        raise OperationRefused(status, str(error)) from error


def items_of(dataset: Dataset, keyword: str) -> Sequence[Any]:
    """The items of a sequence; none if absent or empty. May raise any of `part10.MALFORMED`."""
    return dataset.get(keyword) or ()
