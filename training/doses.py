"""How lower doses are made and drawn, and details put in: settings of a run on `low_dose` data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LowDose:
    """How the lower-dose versions of a slice are made and drawn."""

    realisations: int = 4
    """Independent noise images per slice."""
    views: int = 360
    """Projections per half turn that make the noise."""
    lowest: float = 0.1
    highest: float = 0.6
    """Doses are drawn between these fractions of the slice's own, evenly on a log scale."""
    full_dose_share: float = 0.1
    """Share of the samples with no noise added, which must stay as they are."""
    mixed: bool = False
    """Every patch gets noise of its own: the realisations, weighted at random with squares that sum
    to one, which keeps strength and correlation. Else it gets one of them."""


@dataclass(frozen=True, slots=True)
class Details:
    """Small known details put into source and target alike, so that they are not taken for noise.

    Round to elongated spots at random places. The images hold few lesions; without this a network
    learns that what is small and faint is noise.
    """

    share: float = 0.0
    """Share of the samples that get any."""
    most: int = 6
    """Up to so many in a patch."""
    smallest: float = 1.0
    largest: float = 6.0
    """Half axes, pixels."""
    faintest_hu: float = 15.0
    strongest_hu: float = 100.0
    """Contrast, to either side, evenly on a log scale."""
    weight: float = 10.0
    """What an error inside a detail counts more than one outside."""
