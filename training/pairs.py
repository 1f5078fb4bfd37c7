"""Slices of two kinds of images, paired by place or not: found, brought onto one lattice, drawn.

Patients appear as hashes only; names of files are never printed or stored.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.imaging.percentiles import intensity_of
from training.config import Images, Side
from training.errors import TrainingError
from training.images import onto, read_image, voxels_of, with_spacing
from training.recipes import Batch

_TRIES = 20
"""Random places tried for a patch with enough of the patient in it."""


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """One slice of one kind.

    Attributes:
        patient: hash of what names the patient.
        network: (channels, rows, columns), float32, in [-1, 1]; the slice and its neighbours.
        physical: (rows, columns), float32, in the unit of its side.
        body: (rows, columns), bool: the patient, where both kinds have an image.
    """

    patient: str
    number: int
    spacing_mm: tuple[float, float]
    network: NDArray[np.float32]
    physical: NDArray[np.float32]
    body: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Source and target of one place; for unpaired images two planes of chance."""

    source: Plane
    target: Plane


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What there is to train on."""

    sources: tuple[Plane, ...]
    targets: tuple[Plane, ...]
    """Of paired images: one per source, in the same order."""
    left_out: Mapping[str, int]
    warnings: tuple[str, ...]

    @property
    def patients(self) -> set[str]:
        return {plane.patient for plane in (*self.sources, *self.targets)}


def find_images(data: Images) -> Found:
    """Every usable slice.

    Raises:
        TrainingError: no files, an unreadable one, a pattern that names no patient, or a patient
            whose partner is missing.
    """
    root = Path(data.root)
    sources, targets = (_files(root, side, data.patient) for side in (data.source, data.target))
    warnings = () if data.patient else ("no patient ids: slices of one patient may train and test",)
    left_out: Counter[str] = Counter()
    if data.paired:
        if odd := set(sources) ^ set(targets):
            raise TrainingError(f"data: {len(odd)} patients have only one kind of image")
        pairs = [
            pair
            for patient in sorted(sources)
            for files in _partners(sources[patient], targets[patient])
            for pair in _pairs_of(patient, *files, data, left_out)
        ]
        kept = _distinct(pairs, left_out)
        found = tuple(p.source for p in kept), tuple(p.target for p in kept)
    else:
        found = (
            _unpaired(sources, data.source, data, left_out),
            _unpaired(targets, data.target, data, left_out),
        )
    if not found[0] or not found[1]:
        raise TrainingError(f"data: no usable slice; left out: {dict(left_out)}")
    return Found(*found, left_out, warnings)


def draw_batch(
    found: Found,
    patients: Sequence[str],
    data: Images,
    batch_size: int,
    patch: int,
    rng: np.random.Generator,
) -> Batch:
    """Patches of the slices of `patients`, (batch_size, channels, patch, patch).

    A patient with n slices is drawn in proportion to the square root of n.
    """
    first = _drawn(found.sources, patients, batch_size, rng)
    second = first if data.paired else _drawn(found.targets, patients, batch_size, rng)
    cut = []
    for one, other in zip(first, second, strict=True):
        source, target = found.sources[one], found.targets[other]
        at = _place(source.body if not data.paired else target.body, patch, rng)
        there = at if data.paired else _place(target.body, patch, rng)
        mirrored = data.mirror and bool(rng.integers(2))
        cut.append(
            [
                _turned(plane[..., *place], mirrored)
                for plane, place in (
                    (_at_least(source.network, patch), at),
                    (_at_least(target.network, patch), there),
                    (_at_least(target.body[None].astype(np.float32), patch), there),
                )
            ]
        )
    return Batch(*(torch.from_numpy(np.stack(part)) for part in zip(*cut, strict=True)))


def _files(root: Path, side: Side, pattern: str) -> dict[str, list[Path]]:
    """Patient -> its files of one side."""
    paths = []
    for wanted in side.files:
        paths += (some := sorted(root.glob(wanted)))
        if not some:
            raise TrainingError(f"data: no file {wanted} below {root}; correct root or files")
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(patient_of(path.relative_to(root).as_posix(), pattern), []).append(path)
    return found


def patient_of(name: str, pattern: str) -> str:
    """The hash of the patient whose file this is.

    Args:
        name: of the file below the root of the data.
        pattern: regular expression whose first group names the patient; empty: `name` does.

    Raises:
        TrainingError: the pattern names no patient in it.
    """
    if pattern:
        match = re.search(pattern, name)
        if match is None or not match.groups():
            raise TrainingError(f"data.patient: {pattern!r} names no patient in a path")
        name = match.group(1)
    return _hash(name)


def _hash(name: str) -> str:
    return hashlib.sha256(f"dicomnode split {name}".encode()).hexdigest()[:16]


def _partners(sources: Sequence[Path], targets: Sequence[Path]) -> list[tuple[Path, Path]]:
    """The pairs of a patient: one of each kind, or in each folder one of each kind."""
    if len(sources) == len(targets) == 1:
        return [(sources[0], targets[0])]
    folders = [[path.parent for path in paths] for paths in (sources, targets)]
    if folders[0] != folders[1] or len(set(folders[0])) != len(sources):
        raise TrainingError(
            f"data: a patient has {len(sources)} images of one kind and {len(targets)} of the "
            "other; pairs need one of each, or one of each in every folder"
        )
    return list(zip(sources, targets, strict=True))


def _pairs_of(
    patient: str, source: Path, target: Path, data: Images, left_out: Counter[str]
) -> list[Pair]:
    grid = _read(target, data.target, data)
    image, covered = onto(_read(source, data.source, data), grid, data.source.outside)
    ours, theirs = voxels_of(image), voxels_of(grid)
    kept = _body(theirs, data) & covered
    box = _box(covered)
    if box is None:
        raise TrainingError("data: source and target of a patient do not overlap anywhere")
    ours, theirs, kept = ours[box], theirs[box], kept[box]
    spacing = (grid.GetSpacing()[1], grid.GetSpacing()[0])
    first = _planes(patient, ours, kept, spacing, data.source, data.slices)
    second = _planes(patient, theirs, kept, spacing, data.target, 1)
    pairs = []
    for one, other in zip(first, second, strict=True):
        if other.body.mean() < data.least_body:
            left_out["LITTLE_BODY"] += 1
        else:
            pairs.append(Pair(one, other))
    return pairs


def _unpaired(
    files: Mapping[str, Sequence[Path]], side: Side, data: Images, left_out: Counter[str]
) -> tuple[Plane, ...]:
    planes = []
    for patient in sorted(files):
        for path in files[patient]:
            image = _read(path, side, data)
            voxels = voxels_of(image)
            spacing = (image.GetSpacing()[1], image.GetSpacing()[0])
            for plane in _planes(patient, voxels, _body(voxels, data), spacing, side, 1):
                if plane.body.mean() < data.least_body:
                    left_out["LITTLE_BODY"] += 1
                else:
                    planes.append(plane)
    pairs = [Pair(plane, plane) for plane in planes]
    return tuple(pair.source for pair in _distinct(pairs, left_out))


def _read(path: Path, side: Side, data: Images) -> Any:
    eight_bit = (side.eight_bit[0], side.eight_bit[1]) if side.eight_bit else None
    image = read_image(path, side.unit, eight_bit)
    return with_spacing(image, data.spacing_mm, side.outside) if data.spacing_mm else image


def _body(voxels: NDArray[np.float32], data: Images) -> NDArray[np.bool_]:
    if data.body_above is None:
        return np.ones(voxels.shape, np.bool_)
    return voxels > data.body_above


def _box(covered: NDArray[np.bool_]) -> tuple[slice, slice, slice] | None:
    """The smallest box that holds what both have; None: they have nothing in common."""
    if not covered.any():
        return None
    ends = []
    for axis in range(3):
        line = covered.any(axis=tuple(other for other in range(3) if other != axis))
        places = np.flatnonzero(line)
        ends.append(slice(int(places[0]), int(places[-1]) + 1))
    return ends[0], ends[1], ends[2]


def _planes(
    patient: str,
    voxels: NDArray[np.float32],
    body: NDArray[np.bool_],
    spacing: tuple[float, float],
    side: Side,
    channels: int,
) -> list[Plane]:
    network = intensity_of(side.intensity, voxels).to_network(voxels)
    last, reach = len(voxels) - 1, channels // 2
    return [
        Plane(
            patient,
            index,
            spacing,
            network[np.clip(np.arange(index - reach, index + reach + 1), 0, last)],
            voxels[index],
            body[index],
        )
        for index in range(len(voxels))
    ]


def _distinct(pairs: Sequence[Pair], left_out: Counter[str]) -> list[Pair]:
    """Without slices whose pixels came before: they would leak over the split."""
    seen: set[bytes] = set()
    kept = []
    for pair in pairs:
        digest = hashlib.sha256(pair.target.physical.tobytes())
        digest.update(pair.source.physical.tobytes())
        if digest.digest() in seen:
            left_out["DUPLICATE_PIXELS"] += 1
        else:
            seen.add(digest.digest())
            kept.append(pair)
    return kept


def _drawn(
    planes: Sequence[Plane], patients: Sequence[str], count: int, rng: np.random.Generator
) -> list[int]:
    mine = [index for index, plane in enumerate(planes) if plane.patient in patients]
    if not mine:
        raise TrainingError("data: no slice of one kind among the training patients")
    share = Counter(planes[index].patient for index in mine)
    weight = np.array([share[planes[index].patient] ** -0.5 for index in mine])
    return [mine[i] for i in rng.choice(len(mine), size=count, p=weight / weight.sum())]


def _place(body: NDArray[np.bool_], patch: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Where a patch is cut; mostly with a fifth of it inside the patient."""
    rows, columns = (max(side, patch) for side in body.shape)
    for _ in range(_TRIES):
        top, left = int(rng.integers(rows - patch + 1)), int(rng.integers(columns - patch + 1))
        at = (slice(top, top + patch), slice(left, left + patch))
        if body[at].sum() > 0.2 * patch * patch:
            break
    return at


def _at_least(planes: NDArray[np.float32], patch: int) -> NDArray[np.float32]:
    """Small slices are continued by their border; the weight of what is added is its value."""
    _, rows, columns = planes.shape
    more = (0, max(0, patch - rows)), (0, max(0, patch - columns))
    if more == ((0, 0), (0, 0)):
        return planes
    return np.pad(planes, ((0, 0), *more), mode="edge")


def _turned(patch: NDArray[np.float32], mirrored: bool) -> NDArray[np.float32]:
    return np.ascontiguousarray(patch[..., ::-1] if mirrored else patch)
