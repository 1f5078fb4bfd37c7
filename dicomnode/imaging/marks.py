"""How a synthetic instance is told from an acquired one: the marks we write and look for."""

from pydicom import Dataset

MANUFACTURER = "dicomnode"
"""Manufacturer (0008,0070) of our equipment, in derived instances and in the chain behind them."""

MARK_KEYWORDS = ("SyntheticData", "ContributingEquipmentSequence", "Manufacturer")
"""The attributes that `is_synthetic` reads."""


def is_synthetic(dataset: Dataset) -> bool:
    """Whether an instance says that it was synthesised, by anyone, or that this node made it.

    The loop guard: such instances are stored but not translated again.
    """
    return (
        dataset.get("SyntheticData") == "YES"
        or dataset.get("Manufacturer") == MANUFACTURER
        or any(
            item.get("Manufacturer") == MANUFACTURER
            for item in dataset.get("ContributingEquipmentSequence") or ()
        )
    )
