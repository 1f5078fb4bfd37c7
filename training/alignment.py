"""How alike two images of a patient are: information in common, bodies, folded space."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from dicomnode.imaging.percentiles import foreground, otsu_threshold
from dicomnode.imaging.units import Unit
from training.images import voxels_of

_NMI_BINS = 64
_TWO_KINDS = 0.77
"""Share of the variance between two halves, above which dark values are of two kinds: an even
spread has 0.75, noise 0.64, air and muscle in T1 0.79 to 0.91 (9 limbs)."""
_DICE_LOST = 0.01
"""A stage may cost the bodies so much of their overlap. On limbs that were registered before,
mutual information alone went up while marrow and bone drifted apart."""


@dataclass(frozen=True, slots=True)
class Alike:
    """Of two images over the body of the fixed one; see `registration.Quality`."""

    nmi: float
    dice: float
    covered: float

    def worse_than(self, other: "Alike") -> bool:
        """Less information in common, or bodies that lie less upon one another."""
        return self.nmi < other.nmi or self.dice < other.dice - _DICE_LOST


def body_of(image: Any, unit: Unit) -> NDArray[np.bool_]:
    """Where the patient is: the axes of the image, slowest first, bool.

    The largest connected part, filled, above -400 HU; without HU, above what best parts dark from
    bright, and of MR, where that parts muscle from fat, above what parts air from muscle.
    """
    voxels = voxels_of(image)
    solid = voxels if voxels.ndim == 3 else voxels[None]
    above = -400.0 if unit == "HU" else _air_ends(solid.ravel())
    whole = foreground((solid > above).astype(np.float32))
    return whole if voxels.ndim == 3 else whole[0]


def _air_ends(values: NDArray[np.float32]) -> float:
    threshold = otsu_threshold(values)
    dark = values[values <= threshold]
    if dark.size == 0 or dark.var() == 0:
        return threshold
    lower = otsu_threshold(dark)
    first, second = dark[dark <= lower], dark[dark > lower]
    if min(first.size, second.size) == 0:
        return threshold
    weight = first.size * second.size / dark.size**2
    parted = weight * float(first.mean() - second.mean()) ** 2 / float(dark.var())
    return lower if parted > _TWO_KINDS else threshold


def normalised_mutual_information(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """(H(A) + H(B)) / H(A, B) of two lists of values: 1 for strangers, 2 for each other's image."""
    counts, _, _ = np.histogram2d(clipped(first), clipped(second), bins=_NMI_BINS)
    joint = counts / max(counts.sum(), 1.0)
    one, other, both = (_entropy(p) for p in (joint.sum(1), joint.sum(0), joint.ravel()))
    return (one + other) / both if both > 0 else 2.0


def dice(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Twice what two masks share, over what they have."""
    total = int(first.sum()) + int(second.sum())
    return 2.0 * int((first & second).sum()) / total if total else 1.0


def folded_share(transform: Any, grid: Any, body: NDArray[np.bool_]) -> float:
    """Share of the body where the determinant of the Jacobian is not positive."""
    displacement = sitk.TransformToDisplacementField(
        transform,
        sitk.sitkVectorFloat64,
        grid.GetSize(),
        grid.GetOrigin(),
        grid.GetSpacing(),
        grid.GetDirection(),
    )
    jacobian = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(displacement))
    return float((jacobian[body] <= 0).mean()) if body.any() else 0.0


def alikeness(
    fixed: Any, moving: Any, bodies: tuple[NDArray[np.bool_], NDArray[np.bool_]], transform: Any
) -> Alike:
    """How alike `fixed` and the moved `moving` are.

    Args:
        bodies: of the two, as `body_of` gives them.
        transform: from points of the fixed image to points of the moving one.
    """
    body = bodies[0]
    inside = sitk.Image(moving.GetSize(), sitk.sitkUInt8) + 1
    inside.CopyInformation(moving)
    theirs = sitk.GetImageFromArray(bodies[1].astype(np.uint8))
    theirs.CopyInformation(moving)
    nearest = sitk.sitkNearestNeighbor
    covered = sitk.GetArrayFromImage(sitk.Resample(inside, fixed, transform, nearest, 0)) > 0
    there = sitk.GetArrayFromImage(sitk.Resample(theirs, fixed, transform, nearest, 0)) > 0
    moved = voxels_of(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0))
    both = body & covered
    if not both.any():
        return Alike(1.0, 0.0, 0.0)
    return Alike(
        normalised_mutual_information(voxels_of(fixed)[both], moved[both]),
        dice(body & covered, there & covered),
        float(covered[body].mean()),
    )


def clipped(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values cut where one in two hundred is beyond: a few bright ones would fill a histogram."""
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip(values, low, max(high, low + 1e-6))


def _entropy(p: NDArray[np.float64]) -> float:
    some = p[p > 0]
    return float(-(some * np.log(some)).sum())
