"""Text of an instance in the very bytes its sender wrote.

pydicom decodes a text when somebody looks at it, and encodes it anew when it is written. That is
not the same: escape sequences move, a trailing delimiter goes, and what the declared character set
does not have (a wrong SpecificCharacterSet is common) becomes question marks.
"""

import re

from pydicom import DataElement, Dataset
from pydicom.charset import encode_string
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.valuerep import PersonName

TEXT_VRS = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})
"""VRs whose bytes depend on SpecificCharacterSet (PS3.5 6.1.2.3)."""

_WRITTEN_AS = TEXT_VRS | {None, "UN", "AE", "AS", "CS", "DA", "DS", "DT", "IS", "TM", "UI", "UR"}
"""VRs under which senders write what the standard has as text; None: implicit."""
_ESCAPE = b"\x1b"
_NOT_BESIDE_ASCII = re.compile(rb"[\x00-\x1f\x7f\\]")


class NameAsSent(PersonName):
    """A name that is written as it was read, whatever it decodes to."""

    def encode(self, encodings: object = None) -> bytes:
        """The bytes it was made of; `encodings` changes nothing."""
        return self.original_string


def keep_text(dataset: Dataset) -> None:
    """Remember the texts of an instance, as long as nobody has looked at them.

    Texts that stay in the file until they are asked for are left to pydicom.
    """
    kept = {tag: raw for tag, raw in dataset.items() if _is_sent_text(raw)}
    dataset.text_as_sent = kept


def hand_on_text(dataset: Dataset, header: Dataset) -> None:
    """Let `header`, which took over elements of `dataset`, have their texts as they were sent.

    An attribute that `header` has from elsewhere (a functional group) stays as it is.
    """
    kept = _kept(dataset).items()
    header.text_as_sent = {
        tag: raw for tag, raw in kept if header.get_item(tag) is dataset.get_item(tag)
    }


def sent_bytes(dataset: Dataset, tag: int) -> bytes | None:
    """A text as it was sent; None: it is none, is empty, or nobody remembers."""
    raw = _kept(dataset).get(tag) or dataset.get_item(tag)
    return bytes(raw.value or b"") if _is_sent_text(raw) else None


def text_as_sent(dataset: Dataset, tag: int) -> DataElement | None:
    """An element that is written in the bytes it was sent in, in the VR of the standard.

    Its value is a `NameAsSent`, or bytes. None: see `sent_bytes`; or it is text in ASCII, which
    pydicom gives back as it was.
    """
    data = sent_bytes(dataset, tag)
    if data is None:
        return None
    vr = dictionary_VR(tag)
    if vr != "PN" and data.isascii() and _ESCAPE not in data:
        return None
    encodings = dataset.original_character_set
    names = [encodings] if isinstance(encodings, str) else encodings
    value = NameAsSent(data, names, validation_mode=IGNORE) if vr == "PN" else data
    return DataElement(tag, vr, value, already_converted=True)


def unencodable(dataset: Dataset, keyword: str) -> bytes | None:
    """A text as it was sent if pydicom would write it otherwise and it may stand beside ASCII.

    None: it is encoded as it was, or has escape sequences, control characters or a backslash.
    """
    data = (sent_bytes(dataset, Tag(keyword)) or b"").strip(b" \0")
    if data.isascii() or _NOT_BESIDE_ASCII.search(data):
        return None
    names = dataset.original_character_set
    try:
        again = encode_string(dataset.get(keyword), [names] if isinstance(names, str) else names)
    except ValueError:
        return data
    return None if again == data else data


def _kept(dataset: Dataset) -> dict[int, RawDataElement]:
    kept: dict[int, RawDataElement] = getattr(dataset, "text_as_sent", {})
    return kept


def _is_sent_text(element: object) -> bool:
    return (
        isinstance(element, RawDataElement)
        and bool(element.value)
        and element.VR in _WRITTEN_AS
        and dictionary_has_tag(element.tag)
        and dictionary_VR(element.tag) in TEXT_VRS
    )
