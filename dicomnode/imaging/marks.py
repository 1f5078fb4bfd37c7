"""The marks we write and look for: what is synthetic, what is ours, which UIDs we make."""

import json
import uuid

from pydicom import Dataset
from pydicom.sequence import Sequence

MANUFACTURER = "dicomnode"
"""Manufacturer (0008,0070) of our equipment, in derived instances and in the chain behind them."""

MARK_KEYWORDS = ("SyntheticData", "ContributingEquipmentSequence", "Manufacturer")
"""The attributes that `is_synthetic` reads."""


NAMESPACE = uuid.UUID("099c1bbe-392e-4940-ad37-fcdfe9374a78")
"""Of every UID of this project, by UUIDv5."""


def reproducible_uid(*parts: object) -> str:
    """A reproducible UID: 2.25 and the UUIDv5 of the parts as canonical JSON (PS3.5 B.2)."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return f"2.25.{uuid.uuid5(NAMESPACE, text).int}"


IMPLEMENTATION_CLASS_UID = reproducible_uid("implementation", MANUFACTURER)
"""Who wrote a file or answers an association (PS3.7 D.3.3.2)."""


def is_synthetic(dataset: Dataset) -> bool:
    """Whether an instance says that it was synthesised, by anyone, or that this node made it.

    The loop guard: such instances are stored but not translated again.
    """
    return (
        dataset.get("SyntheticData") == "YES"
        or dataset.get("Manufacturer") == MANUFACTURER
        or any(item.get("Manufacturer") == MANUFACTURER for item in _items(dataset))
    )


def _items(dataset: Dataset) -> list[Dataset]:
    equipment = dataset.get("ContributingEquipmentSequence")
    return list(equipment) if isinstance(equipment, Sequence) else []
