"""Bring the CT of a limb onto its T1 MR: bones rigidly, soft tissue by splines around them.

CT and MR of a limb are taken on different tables: a bone may lie 15 mm beside itself, and mutual
information of whole images follows the skin. So a rigid transform is searched near the bones of the
CT alone, where cortical bone, dark in MR, tells; a B-spline of the whole limb starts there; and
within `BONE_MM` of a bone the rigid one stands, unless the spline lays the bones better. Values of
MR are taken as those of Soft-tissue-Sarcoma: N4-corrected, fat near 950.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from training.errors import TrainingError
from training.images import voxels_of

Mask = NDArray[np.bool_]
BONE_MM = (5.0, 30.0)
"""Up to the first distance from a bone the rigid transform holds, beyond the second the spline."""
CORTEX_HU, DARK_AU = 600.0, 250.0
"""Cortical bone in CT, and what it is below in MR."""
_BODY_HU, _BODY_AU, _BONE_HU, _METAL_HU = -300.0, 120.0, 250.0, 2000.0
_LEAST_BONE = 300
"""Voxels of a bone; less is noise or chalk."""
_STEP_MM, _STEPS = 6.0, 3
"""Of the search for a start, within the slice; half as far along the limb."""
_FURTHEST_MM, _ALONG_MM, _TURNED = 30.0, 8.0, 0.2
"""A bone is not taken further, nor further along itself: a shaft looks alike all along."""
_LEAST_KEPT = 0.75
"""Share of the bone that must stay within the MR."""
_MESH_MM, _SEED = 60.0, 20


@dataclass(frozen=True, slots=True, eq=False)
class Aligned:
    """A CT on the lattice of its MR.

    Attributes:
        hu: (slices, rows, columns), float32, HU, table and all; air where the CT has no image.
        body: same shape, bool: the limb in it, without its table.
        sure: same shape, bool: both have an image there and agree on what is body.
        moved: how the bones got there: "as it lay" or "rigid"; then "spline near bone" if it won.
        alike: mutual information near the bones, nats.
        dark_before, dark_after: share of cortical bone that lies on dark MR.
    """

    hu: NDArray[np.float32]
    body: Mask
    sure: Mask
    moved: str
    alike: float
    dark_before: float
    dark_after: float


def align(ct: Any, mr: Any) -> Aligned:
    """Bring `ct` onto `mr`; both SimpleITK images of 3 axes, float32, HU and fat-normalised AU.

    Raises:
        TrainingError: there is no bone in what both show.
    """
    job = _Limb(ct, mr)
    still = sitk.Transform(3, sitk.sitkIdentity)
    found, alike = job.best_rigid()
    rigid = still if found is None else found.GetInverse()
    spline = job.spline(rigid)
    both = job.blend(rigid, spline)
    dark = {name: job.dark(t) for name, t in (("rigid", rigid), ("spline", spline))}
    best, moved = both, "as it lay" if found is None else "rigid"
    if dark["spline"] > dark["rigid"]:
        best, moved = spline, f"{moved}, spline near bone"
    hu, body, sure = job.result(best)
    return Aligned(hu, body, sure, moved, alike, job.dark(still), max(dark.values()))


class _Limb:
    """One pair, and what of it the searches look at."""

    def __init__(self, ct: Any, mr: Any) -> None:
        self.ct, self.mr = ct, mr
        self.hu, self.signal = voxels_of(ct), voxels_of(mr)
        self.bone = bones_of(self.hu, body_of_ct(self.hu), ct.GetSpacing()[::-1])
        self.seen = _covered(self.signal)
        there = _mask_onto(_as_image(self.seen, mr), ct, sitk.Transform(3, sitk.sitkIdentity))
        if not (self.bone & there).any():
            raise TrainingError("no bone in what CT and MR both show")
        middle = [float(x) for x in reversed(ndimage.center_of_mass(self.bone & there))]
        self.centre = ct.TransformContinuousIndexToPhysicalPoint(middle)
        self.near = _as_image(_within(self.bone, ct, 10.0), ct)
        self.fixed = sitk.Clamp(ct, sitk.sitkFloat32, -200.0, 800.0)
        self.moving = sitk.Clamp(mr, sitk.sitkFloat32, 0.0, 1200.0)
        self.cortex = int((self.bone & there & (self.hu > CORTEX_HU)).sum())

    def best_rigid(self) -> tuple[Any, float]:
        """From points of the CT to points of the MR; None: it lay as well before; and how alike."""
        fixed, moving = _halved(self.fixed), _halved(self.moving)
        lay = self._euler((0.0, 0.0, 0.0))
        found: list[tuple[float, int, Any]] = []
        for start in (*self._starts(fixed, moving)[:2], lay):
            try:
                turned = self._descend(fixed, moving, start, 8_000, 2.0)
                turned = self._descend(self.fixed, self.moving, turned, 20_000, 0.5)
                if self._plausible(turned):
                    found.append((self._alike(turned), len(found), turned))
            except RuntimeError:  # SimpleITK: it left the image
                continue
        before = self._alike(lay)
        if not found or min(found)[0] >= before:
            return None, -before
        return min(found)[2], -min(found)[0]

    def spline(self, rigid: Any) -> Any:
        """From points of the MR to points of the CT, all of the limb looked at."""
        region = self.seen & _mask_onto(_whole(self.ct), self.mr, rigid)
        region &= _within(body_of_mr(self.signal), self.mr, 8.0)
        sides = zip(self.mr.GetSize(), self.mr.GetSpacing(), strict=True)
        mesh = [max(1, round(n * mm / _MESH_MM)) for n, mm in sides]
        method = _method(_as_image(region, self.mr), 40_000)
        method.SetMovingInitialTransform(rigid)
        method.SetInitialTransform(sitk.BSplineTransformInitializer(self.mr, mesh), True)
        method.SetOptimizerAsLBFGSB(
            gradientConvergenceTolerance=1e-10,
            numberOfIterations=15,
            maximumNumberOfFunctionEvaluations=30,
            costFunctionConvergenceFactor=1e5,
        )
        smooth = [1.5, 1.5, 0.3]
        made = method.Execute(
            sitk.SmoothingRecursiveGaussian(self.moving, smooth),
            sitk.SmoothingRecursiveGaussian(
                sitk.Clamp(self.ct, sitk.sitkFloat32, -200.0, 500.0), smooth
            ),
        )
        whole = sitk.CompositeTransform(3)
        whole.AddTransform(rigid)
        whole.AddTransform(made)  # what is added last is applied first
        return whole

    def blend(self, rigid: Any, spline: Any) -> Any:
        """`rigid` near the bones, `spline` away from them, smoothly between."""
        bone = _mask_onto(_as_image(self.bone, self.ct), self.mr, rigid)
        away = _distance(bone, self.mr)
        share = 1.0 - np.clip((away - BONE_MM[0]) / (BONE_MM[1] - BONE_MM[0]), 0.0, 1.0)
        share = (share**2 * (3.0 - 2.0 * share))[..., None]
        field = share * self._field(rigid) + (1.0 - share) * self._field(spline)
        image = sitk.GetImageFromArray(field, isVector=True)
        image.CopyInformation(self.mr)
        return sitk.DisplacementFieldTransform(image)

    def dark(self, transform: Any) -> float:
        """Share of cortical bone that lies on dark MR, 0 to 1; of points of the MR to the CT."""
        moved = voxels_of(sitk.Resample(self.ct, self.mr, transform, sitk.sitkLinear, -1000.0))
        bone = _mask_onto(_as_image(self.bone, self.ct), self.mr, transform)
        cortex = self.signal[bone & (moved > CORTEX_HU) & (self.signal > 0)]
        return float((cortex < DARK_AU).mean()) if cortex.size else 0.0

    def result(self, transform: Any) -> tuple[NDArray[np.float32], Mask, Mask]:
        """The moved CT, the limb in it, and where it is sure."""
        hu = voxels_of(sitk.Resample(self.ct, self.mr, transform, sitk.sitkLinear, -1000.0))
        body = body_of_ct(hu)
        agree = (body == body_of_mr(self.signal)) | _within(body & (hu > 200.0), self.mr, 4.0)
        return hu, body, agree & self.seen & _mask_onto(_whole(self.ct), self.mr, transform)

    def _starts(self, fixed: Any, moving: Any) -> list[Any]:
        """Shifts that make the images alike near the bones, the best first; near ones preferred."""
        steps = _STEP_MM * np.arange(-_STEPS, _STEPS + 1)
        method = self._near_bone(None)
        found: list[tuple[float, int, Any]] = []
        for shift in itertools.product(steps, steps, 2 * 3.27 * np.arange(-1, 2)):
            start = self._euler(shift)
            if self._kept(start) < _LEAST_KEPT:
                continue
            method.SetInitialTransform(start)
            try:
                value = method.MetricEvaluate(fixed, moving)
            except RuntimeError:  # SimpleITK: no voxel in common
                continue
            far = math.hypot(*shift[:2]) / _STEP_MM + abs(shift[2]) / 3.27
            found.append((value + 0.003 * far, len(found), start))
        return [start for _, _, start in sorted(found)]

    def _descend(self, fixed: Any, moving: Any, start: Any, samples: int, step: float) -> Any:
        method = self._near_bone(samples)
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=step,
            minStep=1e-3,
            numberOfIterations=80,
            relaxationFactor=0.6,
            gradientMagnitudeTolerance=1e-8,
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(start, False)
        made = method.Execute(fixed, moving)
        only = made.GetNthTransform(0) if made.GetName() == "CompositeTransform" else made
        return sitk.Euler3DTransform(only)

    def _alike(self, transform: Any) -> float:
        """Minus the mutual information near the bones, every voxel counted."""
        method = self._near_bone(None)
        method.SetInitialTransform(transform)
        return float(method.MetricEvaluate(self.fixed, self.moving))

    def _near_bone(self, samples: int | None) -> Any:
        method = _method(self.near, samples)
        method.SetMetricMovingMask(_as_image(self.seen, self.mr))
        return method

    def _kept(self, transform: Any) -> float:
        """How much of the cortical bone in the MR is still in it."""
        there = _mask_onto(_as_image(self.seen, self.mr), self.ct, transform)
        return int((self.bone & there & (self.hu > CORTEX_HU)).sum()) / max(self.cortex, 1)

    def _plausible(self, turned: Any) -> bool:
        angles, shift = turned.GetParameters()[:3], turned.GetParameters()[3:]
        near = math.hypot(*shift[:2]) < _FURTHEST_MM and abs(shift[2]) < _ALONG_MM
        return near and max(map(abs, angles)) < _TURNED and self._kept(turned) > _LEAST_KEPT

    def _euler(self, shift: Sequence[float]) -> Any:
        transform = sitk.Euler3DTransform()
        transform.SetCenter(self.centre)
        transform.SetTranslation([float(x) for x in shift])
        return transform

    def _field(self, transform: Any) -> NDArray[np.float64]:
        grid = self.mr
        place = grid.GetSize(), grid.GetOrigin(), grid.GetSpacing(), grid.GetDirection()
        image = sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat64, *place)
        field: NDArray[np.float64] = sitk.GetArrayFromImage(image)
        return field


def body_of_ct(hu: NDArray[np.float32]) -> Mask:
    """The limb without its table: (slices, rows, columns), HU -> bool."""
    return np.stack([_filled(plane, 3, 0) for plane in hu > _BODY_HU])


def body_of_mr(signal: NDArray[np.float32]) -> Mask:
    """The limb: (slices, rows, columns), fat-normalised AU -> bool."""
    smooth = ndimage.gaussian_filter(signal, (0, 1, 1))
    return np.stack([_filled(plane, 2, 5) for plane in smooth > _BODY_AU])


def bones_of(hu: NDArray[np.float32], body: Mask, spacing_mm: Sequence[float]) -> Mask:
    """Bones inside the limb, away from metal: (slices, rows, columns), bool."""
    dense = ndimage.gaussian_filter(hu, (0.3, 0.7, 0.7)) > _BONE_HU
    dense &= ndimage.binary_erosion(body, np.ones((1, 5, 5)))
    parts, _ = ndimage.label(dense)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    bone: Mask = np.isin(parts, np.flatnonzero(sizes > _LEAST_BONE))
    metal = hu > _METAL_HU
    if metal.any():
        bone &= ndimage.distance_transform_edt(~metal, sampling=list(spacing_mm)) > 8.0
    return bone


def _filled(bright: Mask, opened: int, closed: int) -> Mask:
    """The large parts of a slice, thin ones (a table, a sheet) gone, holes filled."""
    parts, count = ndimage.label(ndimage.binary_opening(bright, iterations=opened))
    if not count:
        return np.zeros(bright.shape, np.bool_)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    large = np.isin(parts, np.flatnonzero(sizes > 0.1 * sizes.max()))
    if closed:  # cortical bone at the edge of the picture is open to outside
        wide = np.pad(large, closed + 3)
        wide = ndimage.binary_closing(wide, iterations=closed)
        large = wide[closed + 3 : -closed - 3, closed + 3 : -closed - 3]
    return np.asarray(ndimage.binary_fill_holes(large), np.bool_)


def _covered(signal: NDArray[np.float32]) -> Mask:
    """Where the MR has an image: resampled ones are exactly 0 in what they do not show."""
    wide = np.pad(signal > 0, ((1, 1), (4, 4), (4, 4)))
    closed = ndimage.binary_closing(wide, np.ones((1, 5, 5)))
    return np.asarray(closed[1:-1, 4:-4, 4:-4], np.bool_)


def _method(mask: Any, samples: int | None) -> Any:
    """Mutual information of 32 bins inside `mask`; None: of every voxel."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricFixedMask(mask)
    method.SetInterpolator(sitk.sitkLinear)
    inside = int(voxels_of(mask).sum())
    if samples is not None and inside > samples:
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(samples / inside, _SEED)
    return method


def _halved(image: Any) -> Any:
    return sitk.Shrink(sitk.SmoothingRecursiveGaussian(image, [1.0, 1.0, 0.1]), [2, 2, 1])


def _as_image(mask: Mask, like: Any) -> Any:
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.CopyInformation(like)
    return image


def _whole(image: Any) -> Any:
    return _as_image(np.ones(voxels_of(image).shape, np.bool_), image)


def _mask_onto(mask: Any, grid: Any, transform: Any) -> Mask:
    moved = sitk.Resample(mask, grid, transform, sitk.sitkNearestNeighbor, 0)
    return np.asarray(sitk.GetArrayFromImage(moved) > 0, np.bool_)


def _distance(mask: Mask, image: Any) -> NDArray[np.float64]:
    """From the mask, mm; endless where there is none."""
    if not mask.any():
        return np.full(mask.shape, np.inf)
    spacing = list(reversed(image.GetSpacing()))
    return np.asarray(ndimage.distance_transform_edt(~mask, sampling=spacing))


def _within(mask: Mask, image: Any, mm: float) -> Mask:
    return np.asarray(_distance(mask, image) <= mm, np.bool_)
