"""Slices of two kinds of images, paired by place or not: found, brought onto one lattice, drawn.

Patients appear as hashes only; names of files are never printed or stored.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.imaging.equalise import with_equalised
from dicomnode.imaging.intensity import Equalised
from dicomnode.imaging.percentiles import Whole, intensity_of
from training.augment import at_least, brightened, cut, cut_weight, draw_change
from training.config import Images, Side
from training.errors import TrainingError
from training.images import is_dicom, onto, read_image, voxels_of, with_spacing
from training.leaks import alike_slices, names_of_one_patient, patient_id_of
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
        marked: (rows, columns), bool, of a target: what `Images.marked` says; None: nothing.
    """

    patient: str
    number: int
    spacing_mm: tuple[float, float]
    network: NDArray[np.float32]
    physical: NDArray[np.float32]
    body: NDArray[np.bool_]
    marked: NDArray[np.bool_] | None = None


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
        TrainingError: no files, an unreadable one, a pattern that names no patient, a patient whose
            partner is missing, or a PatientID under two names.
    """
    root = Path(data.root)
    sources, targets = (
        _without(files_by_patient(root, side.files, data.patient), data.without)
        for side in (data.source, data.target)
    )
    left_out: Counter[str] = Counter()
    _check_patients(sources, targets)
    if data.paired:
        if odd := set(sources) ^ set(targets):
            raise TrainingError(f"data: {len(odd)} patients have only one kind of image")
        pairs = [
            pair
            for patient in sorted(sources)
            for files in partners(sources[patient], targets[patient])
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
    return Found(*found, left_out, _warnings(found, {**sources, **targets}, left_out, data))


def _without(files: Mapping[str, list[Path]], patients: Sequence[str]) -> dict[str, list[Path]]:
    return {patient: paths for patient, paths in files.items() if patient not in patients}


def _check_patients(*kinds: Mapping[str, Sequence[Path]]) -> None:
    """
    Raises:
        TrainingError: DICOM images of one PatientID stand under two names: it would be split.
    """
    named = [
        (name, patient_id_of(path))
        for kind in kinds
        for name, paths in kind.items()
        for path in paths
        if is_dicom(path)
    ]
    if twice := names_of_one_patient(named):
        raise TrainingError(
            f"data.patient: {twice} PatientIDs stand under more than one name, and could train and "
            "test; leave data.patient empty to go by PatientID, or mend the names"
        )


def _warnings(
    found: tuple[Sequence[Plane], Sequence[Plane]],
    files: Mapping[str, Sequence[Path]],
    left_out: Mapping[str, int],
    data: Images,
) -> tuple[str, ...]:
    """What could let a test patient train, and cannot be told for certain."""
    said = []
    if not data.patient and any(not patient_id_of(p) for paths in files.values() for p in paths):
        said.append("no patient ids: slices of one patient may train and test")
    if count := left_out.get("DUPLICATE_OF_ANOTHER", 0):
        said.append(f"{count} slices left out are those of another patient: is it the same one?")
    for side, planes in zip(("source", "target"), found, strict=True):
        alike = alike_slices([p.physical for p in planes], [p.patient for p in planes])
        if alike.slices:
            said.append(
                f"{alike.slices} {side} slices of {alike.patients} patients look like another "
                "patient's: who trains may test"
            )
    return tuple(said)


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
    drawn = []
    for one, other in zip(first, second, strict=True):
        source, target = found.sources[one], found.targets[other]
        at = _place(source.body if not data.paired else target.body, patch, rng)
        there = at if data.paired else _place(target.body, patch, rng)
        change = draw_change(data.mirror, data.rotate_degrees, data.jitter, rng, data.vary)
        weight = at_least(target.body[None].astype(np.float32), patch)
        weight = cut_weight(weight, there, change)
        if data.emphasis is not None:
            true = cut(at_least(target.physical[None], patch), there, change)
            weight = weight * data.emphasis.weight_of(true)
        if data.marked is not None and target.marked is not None:
            share = cut(at_least(target.marked[None].astype(np.float32), patch), there, change)
            weight = weight * data.marked.weight_of(share)
        drawn.append(
            (
                brightened(cut(at_least(source.network, patch), at, change), change),
                cut(at_least(target.network, patch), there, change),
                weight,
            )
        )
    return Batch(*(torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True)))


def files_by_patient(root: Path, files: Sequence[str], pattern: str) -> dict[str, list[Path]]:
    """Hash of a patient -> the files of one kind.

    Args:
        files: patterns below `root`.
        pattern: regular expression whose first group names the patient; empty: PatientID does,
            and a file without one is a patient of its own.

    Raises:
        TrainingError: a pattern finds no file, or names no patient.
    """
    paths = []
    for wanted in files:
        paths += (some := sorted(root.glob(wanted)))
        if not some:
            raise TrainingError(f"data: no file {wanted} below {root}; correct root or files")
    found: dict[str, list[Path]] = {}
    for path in paths:
        name = path.relative_to(root).as_posix()
        if not pattern and is_dicom(path):
            name = patient_id_of(path) or name
        found.setdefault(patient_of(name, pattern), []).append(path)
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


def partners(sources: Sequence[Path], targets: Sequence[Path]) -> list[tuple[Path, Path]]:
    """The pairs of a patient: one of each kind, or in each folder one of each kind.

    Raises:
        TrainingError: it is not clear which belong together.
    """
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
    if data.equalised != "none":
        first = [
            replace(p, network=with_equalised(p.network[None], data.equalised)[0]) for p in first
        ]
    second = _planes(patient, theirs, kept, spacing, data.target, 1)
    if data.marked is not None:
        marked = data.marked.beside(target, tuple(reversed(grid.GetSize())))[box]
        second = [replace(p, marked=own) for p, own in zip(second, marked, strict=True)]
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
    network = intensity_of(side.intensity, Whole(voxels)).to_network(voxels)
    if isinstance(side.intensity, Equalised):  # no HU: errors are in grey values
        voxels = side.intensity.from_network(network)
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
    seen: dict[bytes, str] = {}
    kept = []
    for pair in pairs:
        digest = hashlib.sha256(pair.target.physical.tobytes())
        digest.update(pair.source.physical.tobytes())
        key, patient = digest.digest(), pair.source.patient
        if key in seen:
            same = seen[key] == patient
            left_out["DUPLICATE_PIXELS" if same else "DUPLICATE_OF_ANOTHER"] += 1
        else:
            seen[key] = patient
            kept.append(pair)
    return kept


def _drawn(
    planes: Sequence[Plane], patients: Sequence[str], count: int, rng: np.random.Generator
) -> list[int]:
    chosen = set(patients)
    mine = [index for index, plane in enumerate(planes) if plane.patient in chosen]
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
