"""Our own side of Storage and Verification: bounded, streaming to disk and from it.

Read in this order: `listener` (connections and threads), `association` (PS3.8: states), `pdu`
(PS3.8: bytes), `negotiation`, `service` (PS3.7: messages), `dimse` (PS3.7: bytes), `incoming` (the
file); and `calling`, the requestor. pynetdicom serves every other service, through `Library`, or
through `guests` on an association that stores as well.
"""

from dicomnode.upper_layer.calling import Call, Lost, NotConnected, Patience, Rejected, Titles
from dicomnode.upper_layer.incoming import Received
from dicomnode.upper_layer.listener import Library, Listener
from dicomnode.upper_layer.pdu import CALLED_AE, CALLING_AE, Rejection
from dicomnode.upper_layer.service import Handler, Identity, Limits, Requestor

__all__ = [
    "CALLED_AE",
    "CALLING_AE",
    "Call",
    "Handler",
    "Identity",
    "Library",
    "Limits",
    "Listener",
    "Lost",
    "NotConnected",
    "Patience",
    "Received",
    "Rejected",
    "Rejection",
    "Requestor",
    "Titles",
]
