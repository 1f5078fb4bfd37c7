"""Which Storage SOP classes a peer may store, named as people name them."""

import re
from collections.abc import Sequence

from pydicom import uid

EVERY = "*"
IMAGES: dict[str, tuple[str, ...]] = {
    "CT": (
        "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
        "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT Image Storage
        "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image Storage
    ),
    "MR": (
        "1.2.840.10008.5.1.4.1.1.4",  # MR Image Storage
        "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR Image Storage
        "1.2.840.10008.5.1.4.1.1.4.3",  # Enhanced MR Color Image Storage
        "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR Image Storage
    ),
    "PT": (
        "1.2.840.10008.5.1.4.1.1.128",  # Positron Emission Tomography Image Storage
        "1.2.840.10008.5.1.4.1.1.130",  # Enhanced PET Image Storage
        "1.2.840.10008.5.1.4.1.1.128.1",  # Legacy Converted Enhanced PET Image Storage
    ),
}
"""The image SOP classes of a modality, classic and enhanced (PS3.4 B.5)."""
COMPANIONS = frozenset(
    {
        "1.2.840.10008.5.1.4.1.1.11.1",  # Grayscale Softcopy Presentation State Storage
        "1.2.840.10008.5.1.4.1.1.88.33",  # Comprehensive SR Storage
    }
)
"""What goes with derived images, and need not be taken by a destination that takes them.

Not the Key Object Selection: that a retraction is refused must be seen by someone.
"""
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_BY_KEYWORD = {
    name: str(value)
    for name, value in vars(uid).items()
    if isinstance(value, uid.UID) and value.type == "SOP Class"
}


def problem_with(names: Sequence[str]) -> str | None:
    """What is wrong with a list of `sop_classes`, or None."""
    if not names:
        return 'names nothing; ["*"] is every SOP class'
    for name in names:
        if name != EVERY and not _uids(name):
            return f"{name!r} is no SOP class; name CT, MR, PT, a keyword, a UID or '*'"
    return None


def uids_of(names: Sequence[str]) -> frozenset[str] | None:
    """The SOP Class UIDs that checked names stand for; None: every one."""
    if EVERY in names:
        return None
    return frozenset(found for name in names for found in _uids(name))


def _uids(name: str) -> tuple[str, ...]:
    """CT, CTImageStorage or 1.2.840.10008.5.1.4.1.1.2 -> UIDs; () if it is none of these."""
    if name in IMAGES:
        return IMAGES[name]
    if name in _BY_KEYWORD:
        return (_BY_KEYWORD[name],)
    return (name,) if len(name) <= 64 and _UID.fullmatch(name) else ()
