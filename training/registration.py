"""Bring one image of a patient onto another: rigid, then B-splines; and judge how well it went.

Mattes mutual information needs no common unit. Rigid: Euler angles, from the best of three starts,
coarse to fine. Deformable: B-splines on ever denser control points, the last 15 mm apart (levels,
distances and bins as SynthRAD2025 prepared its data; the optimiser is another). SimpleITK has no
penalty on bending, so a stage that folds space, or after which the images share less information or
their bodies overlap less, is taken back, and the one before it stands.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.imaging.units import Unit
from training.alignment import Alike, alikeness, body_of, clipped, folded_share
from training.errors import TrainingError
from training.images import voxels_of

Progress = Callable[[str], None]
_SAMPLES = 20_000
"""Voxels that mutual information looks at, unless a B-spline has more parameters."""
_SMALLEST = 16
"""No axis is shrunk to fewer voxels."""
_SEED = 20
_HEADER_FIRST = 1.5
"""Another start must be so much more alike than the scanner's: parts of a body look alike."""


@dataclass(frozen=True, slots=True)
class Rigid:
    """Six degrees of freedom; of single slices three."""

    shrink: tuple[int, ...] = (8, 4, 2, 1)
    """How much coarser each level is than the image."""
    iterations: tuple[int, ...] = (1000, 1000, 500, 500)
    bins: int = 32

    def __post_init__(self) -> None:
        if len(self.shrink) != len(self.iterations):
            raise TrainingError("rigid: as many iterations as shrink factors")


@dataclass(frozen=True, slots=True)
class Deformable:
    """B-splines, each level with control points twice as near as the one before."""

    spacing_mm: float = 15.0
    """Between the control points of the last level."""
    shrink: tuple[int, ...] = (4, 2, 1)
    iterations: tuple[int, ...] = (30, 20, 10)
    """Of LBFGS-B, which needs fewer than a descent of small steps."""
    bins: int = 32
    most_folded: float = 0.0005
    """A level that folds a larger share of the body is taken back."""

    def __post_init__(self) -> None:
        if len(self.shrink) != len(self.iterations):
            raise TrainingError("deformable: as many iterations as shrink factors")


@dataclass(frozen=True, slots=True)
class Quality:
    """How alike the two images are, before and after, over the body of the fixed one."""

    nmi_before: float
    """Normalised mutual information (H(A) + H(B)) / H(A, B), 1 to 2."""
    nmi_after: float
    dice_before: float
    """Overlap of the two bodies where both have an image, 0 to 1."""
    dice_after: float
    folded: float
    """Share of the body where the Jacobian is not positive: space would be turned inside out."""
    covered: float
    """Share of the fixed body of which the moving image shows anything."""


@dataclass(frozen=True, slots=True, eq=False)
class Registered:
    """One image on the lattice of the other.

    Attributes:
        moved: SimpleITK image, float32, on the lattice of the fixed image.
        transform: from a point of the fixed image to the same point of the moving one, in mm.
        stages: what was done, in words.
    """

    moved: Any
    transform: Any
    quality: Quality
    stages: tuple[str, ...]


def register(
    fixed: Any,
    moving: Any,
    units: tuple[Unit, Unit],
    outside: float,
    rigid: Rigid,
    deformable: Deformable | None,
    progress: Progress = lambda words: None,
) -> Registered:
    """Bring `moving` onto `fixed`; both SimpleITK images of 3 axes, float32, any unit.

    Two single slices are registered within their plane, wherever they lie along the body.

    Args:
        units: of the two; they tell the body from what is around it.
        outside: value where the moving image shows nothing.
        progress: called with a few words now and then.

    Raises:
        TrainingError: a slice cannot be registered to a volume, or the images have nothing in
            common to start from.
    """
    flat = fixed.GetDepth() == moving.GetDepth() == 1
    if not flat and min(fixed.GetDepth(), moving.GetDepth()) < 4:
        raise TrainingError("too few slices: want volumes of 4 or more, or two single slices")
    a, b = (_plane(fixed), _plane(moving)) if flat else (fixed, moving)
    body, theirs = body_of(a, units[0]), body_of(b, units[1])
    job = _Job(_for_metric(a), _for_metric(b), _grown(body, a), progress)
    start = job.best_start(body, theirs)
    turned = job.rigid(start, rigid)
    identity = sitk.Transform(a.GetDimension(), sitk.sitkIdentity)

    def judged(transform: Any) -> Alike:
        return alikeness(a, b, (body, theirs), transform)

    before, first, now = judged(identity), judged(start), judged(turned)
    best = _Best(turned, now, 0.0, (f"rigid over {len(rigid.shrink)} levels",))
    if now.worse_than(first):
        best = _Best(start, first, 0.0, ("rigid is no better: taken back",))
    if deformable is not None:
        best = _deform(job, best, deformable, judged, body)
    moved = sitk.Resample(b, a, best.transform, sitk.sitkLinear, outside)
    now = best.alike
    quality = Quality(before.nmi, now.nmi, before.dice, now.dice, best.folded, now.covered)
    return Registered(_on(moved, fixed), best.transform, quality, best.stages)


@dataclass(frozen=True, slots=True, eq=False)
class _Best:
    """The best transform up to now, and how it was come by."""

    transform: Any
    alike: Alike
    folded: float
    stages: tuple[str, ...]


def _deform(
    job: "_Job",
    best: _Best,
    settings: Deformable,
    judged: Callable[[Any], Alike],
    body: NDArray[np.bool_],
) -> _Best:
    """Level by level, as long as it gets better and space is not folded."""
    rigid, spline = best.transform, None
    for level in range(len(settings.shrink)):
        spline = job.spline(rigid, spline, settings, level)
        candidate, name = _both(rigid, spline), f"B-spline level {level + 1}"
        after, folded = judged(candidate), folded_share(candidate, job.fixed, body)
        if folded > settings.most_folded or after.worse_than(best.alike):
            why = "folds" if folded > settings.most_folded else "is no better"
            return replace(best, stages=(*best.stages, f"{name} {why}: taken back"))
        best = _Best(candidate, after, folded, (*best.stages, name))
    return best


class _Job:
    """One pair, its values fit for mutual information."""

    def __init__(self, fixed: Any, moving: Any, mask: Any, progress: Progress) -> None:
        self.fixed, self.moving, self.mask, self.progress = fixed, moving, mask, progress
        self.axes: int = fixed.GetDimension()

    def best_start(self, ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> Any:
        """As the scanner placed them, unless centre on centre or body on body is clearly better."""
        found: list[tuple[float, int, Any]] = []
        for kind in ("header", "centre", "body"):
            try:
                start = self._start(kind, ours, theirs)
                method = self._method(32, 8)
                method.SetInitialTransform(start)
                value = method.MetricEvaluate(*self._shrunk(8))
            except RuntimeError:  # no voxel in common
                continue
            found.append((value * (_HEADER_FIRST if kind == "header" else 1), len(found), start))
        if not found:
            raise TrainingError("source and target have nothing in common, wherever put")
        return min(found)[2]

    def rigid(self, start: Any, settings: Rigid) -> Any:
        transform = start
        for level, shrink in enumerate(settings.shrink):
            self.progress(f"rigid {level + 1}/{len(settings.shrink)}")
            method = self._method(settings.bins, shrink)
            method.SetOptimizerAsRegularStepGradientDescent(
                learningRate=min(4.0, float(shrink)),
                minStep=1e-3 * shrink,
                numberOfIterations=settings.iterations[level],
                relaxationFactor=0.6,
                gradientMagnitudeTolerance=1e-8,
            )
            method.SetOptimizerScalesFromPhysicalShift()
            method.SetInitialTransform(transform, inPlace=False)
            result = method.Execute(*self._shrunk(shrink))
            transform = _euler_of(result, start)
        return transform

    def spline(self, rigid: Any, coarser: Any, settings: Deformable, level: int) -> Any:
        """The B-spline of a level, applied before `rigid`; it starts as the coarser one."""
        self.progress(f"B-spline {level + 1}/{len(settings.shrink)}")
        sides = zip(self.fixed.GetSize(), self.fixed.GetSpacing(), strict=True)
        coarsest = settings.spacing_mm * 2 ** (len(settings.shrink) - 1)
        mesh = [max(1, round(n * mm / coarsest)) * 2**level for n, mm in sides]
        spline = sitk.BSplineTransformInitializer(self.fixed, mesh)
        if coarser is not None:
            spline = _refined(coarser, spline)
        shrink, iterations = settings.shrink[level], settings.iterations[level]
        method = self._method(settings.bins, shrink, len(spline.GetParameters()))
        method.SetMovingInitialTransform(rigid)
        method.SetInitialTransform(spline, True)
        method.SetOptimizerAsLBFGSB(
            gradientConvergenceTolerance=1e-10,
            numberOfIterations=iterations,
            maximumNumberOfFunctionEvaluations=2 * iterations,
            costFunctionConvergenceFactor=1e5,
        )
        return sitk.BSplineTransform(method.Execute(*self._shrunk(shrink)))

    def _method(self, bins: int, shrink: int, parameters: int = 0) -> Any:
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=bins)
        method.SetMetricFixedMask(self.mask)
        voxels = math.prod(self._shrunk(shrink)[0].GetSize())
        samples = max(_SAMPLES, parameters)
        if voxels > samples:
            method.SetMetricSamplingStrategy(method.RANDOM)
            method.SetMetricSamplingPercentage(samples / voxels, _SEED)
        method.SetInterpolator(sitk.sitkLinear)
        return method

    def _shrunk(self, factor: int) -> tuple[Any, Any]:
        return _shrunk(self.fixed, factor), _shrunk(self.moving, factor)

    def _start(self, kind: str, ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> Any:
        transform = sitk.Euler2DTransform() if self.axes == 2 else sitk.Euler3DTransform()
        centre, other = _middle(self.fixed), _middle(self.moving)
        if kind == "body":
            centre, other = _centroid(self.fixed, ours), _centroid(self.moving, theirs)
        transform.SetCenter(centre)
        if kind != "header":
            transform.SetTranslation([b - a for a, b in zip(centre, other, strict=True)])
        return transform


def _refined(coarser: Any, spline: Any) -> Any:
    """The same displacement on the denser control points of `spline`."""
    identity = sitk.Transform(spline.GetDimension(), sitk.sitkIdentity)
    by_axis = zip(coarser.GetCoefficientImages(), spline.GetCoefficientImages(), strict=True)
    coefficients = [
        sitk.BSplineDecomposition(
            sitk.Resample(old, new, identity, sitk.sitkBSplineResampler, 0.0, old.GetPixelID())
        )
        for old, new in by_axis
    ]
    return sitk.BSplineTransform(coefficients, 3)


def _both(rigid: Any, spline: Any) -> Any:
    both = sitk.CompositeTransform(rigid.GetDimension())
    both.AddTransform(rigid)
    both.AddTransform(spline)  # what is added last is applied first
    return both


def _euler_of(result: Any, like: Any) -> Any:
    """What an optimiser gives, as the Euler transform it was started with."""
    only = result.GetNthTransform(0) if result.GetName() == "CompositeTransform" else result
    kind = sitk.Euler2DTransform if like.GetDimension() == 2 else sitk.Euler3DTransform
    return kind(only)


def _for_metric(image: Any) -> Any:
    """Values cut where one in two hundred is beyond: a few bright ones would fill the histogram."""
    cut = sitk.GetImageFromArray(clipped(voxels_of(image)).astype(np.float32))
    cut.CopyInformation(image)
    return cut


def _shrunk(image: Any, factor: int) -> Any:
    """Coarser by `factor` along each axis that stays long enough, smoothed before."""
    size, spacing = image.GetSize(), image.GetSpacing()
    finest = min(spacing)
    factors = [
        max(1, min(round(factor * finest / mm), n // _SMALLEST))
        for n, mm in zip(size, spacing, strict=True)
    ]
    if max(factors) == 1:
        return image
    spread = [0.5 * f * mm if f > 1 else 1e-3 for f, mm in zip(factors, spacing, strict=True)]
    if min(size) >= 4:
        image = sitk.SmoothingRecursiveGaussian(image, spread)
    return sitk.Shrink(image, factors)


def _grown(body: NDArray[np.bool_], image: Any) -> Any:
    """The body and about 10 mm around it, as a SimpleITK mask: its outline is worth seeing."""
    steps = [10.0 / mm for mm in reversed(image.GetSpacing())]
    distance = ndimage.distance_transform_edt(~body, sampling=[1 / s for s in steps])
    mask = sitk.GetImageFromArray((distance <= 1.0).astype(np.uint8))
    mask.CopyInformation(image)
    return mask


def _plane(image: Any) -> Any:
    """The only slice, 2 axes, with its place in the plane."""
    plane = sitk.GetImageFromArray(voxels_of(image)[0])
    plane.SetSpacing(image.GetSpacing()[:2])
    axes = np.asarray(image.GetDirection()).reshape(3, 3)
    plane.SetOrigin([float(x) for x in (np.asarray(image.GetOrigin()) @ axes)[:2]])
    return plane


def _on(moved: Any, fixed: Any) -> Any:
    """The result with the geometry of the fixed image, 3 axes."""
    voxels = voxels_of(moved)
    whole = sitk.GetImageFromArray(voxels.reshape(voxels_of(fixed).shape))
    whole.CopyInformation(fixed)
    return whole


def _middle(image: Any) -> Sequence[float]:
    place: Sequence[float] = image.TransformContinuousIndexToPhysicalPoint(
        [(n - 1) / 2 for n in image.GetSize()]
    )
    return place


def _centroid(image: Any, body: NDArray[np.bool_]) -> Sequence[float]:
    if not body.any():
        return _middle(image)
    index = [float(x) for x in reversed(ndimage.center_of_mass(body))]
    place: Sequence[float] = image.TransformContinuousIndexToPhysicalPoint(index)
    return place
