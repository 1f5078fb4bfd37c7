"""Long and short axis of lymph nodes in mm, from masks, and how well two sets of masks agree.

    python training/axes.py MASK
    python training/axes.py MASK other=MASK [out=axes.json]
    python training/axes.py FOLDER other=FOLDER out=axes.json

MASK is a NIfTI, MetaImage or NRRD file whose whole numbers above zero name the nodes; a mask of
zeros and ones may hold several, and every connected part is then a node. With `other` (masks drawn
on the generated image, or by another reader) nodes are matched by overlap, and long axis, short
axis and their ratio are compared by Bland and Altman's limits of agreement. Of folders, files of
the same name belong together.

As in RECIST 1.1 the axes are those of one transverse slice: here that with the largest area. The
long axis is the longest distance between two corners of the node's pixels, the short axis the
longest chord perpendicular to it, both of the convex hull.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage, spatial

from dicomnode.errors import ConfigError, DicomNodeError
from training.errors import TrainingError
from training.images import ITK_SUFFIXES
from training.intervals import agreement

Points = NDArray[np.float64]
Labels = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Node:
    """One lymph node.

    Attributes:
        label: its number in the mask.
        slice: index of the slice with its largest area.
    """

    label: int
    slice: int
    long_mm: float
    short_mm: float

    @property
    def ratio(self) -> float:
        """Short over long axis; near 1: round."""
        return self.short_mm / self.long_mm


def axes_mm(region: NDArray[np.bool_], spacing_mm: tuple[float, float]) -> tuple[float, float]:
    """Long and short axis of a region of one slice, mm.

    Args:
        region: (rows, columns), not empty.
        spacing_mm: between rows, between columns.
    """
    pixels = np.argwhere(region)
    corners = np.unique(
        np.concatenate([pixels + shift for shift in ((0, 0), (0, 1), (1, 0), (1, 1))]), axis=0
    )
    points = corners * np.asarray(spacing_mm, np.float64)
    hull = points[spatial.ConvexHull(points).vertices]  # counter-clockwise
    apart = hull[:, None] - hull[None]
    distances = np.hypot(apart[..., 0], apart[..., 1])
    first, last = np.unravel_index(int(distances.argmax()), distances.shape)
    long_mm = float(distances[first, last])
    along = apart[first, last] / long_mm
    return long_mm, _longest_chord(hull, along)


def _longest_chord(hull: Points, along: Points) -> float:
    """Of a convex polygon (corners in order, 2), the longest chord perpendicular to `along`.

    A chord's length is linear between the corners, so that the longest goes through one.
    """
    place = hull @ along
    height = hull @ np.array([-along[1], along[0]])
    longest = 0.0
    for at in place:
        cuts = []
        for one, two, low, high in zip(
            place, np.roll(place, -1), height, np.roll(height, -1), strict=True
        ):
            if min(one, two) <= at <= max(one, two):
                cuts += (
                    [low, high] if one == two else [low + (high - low) * (at - one) / (two - one)]
                )
        longest = max(longest, max(cuts) - min(cuts))
    return float(longest)


def measure(labels: Labels, spacing_mm: tuple[float, float, float]) -> list[Node]:
    """Every node of a mask.

    Args:
        labels: (slices, rows, columns), whole numbers; 0 is none.
        spacing_mm: between slices, rows and columns.

    Raises:
        TrainingError: there is none.
    """
    nodes = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        own = labels[box] == label
        index = int(own.sum(axis=(1, 2)).argmax())
        nodes.append(Node(label, box[0].start + index, *axes_mm(own[index], spacing_mm[1:])))
    if not nodes:
        raise TrainingError("no node in the mask: every voxel is 0")
    return nodes


def match(labels: Labels, others: Labels) -> list[tuple[int, int]]:
    """Labels of the same node in two masks: each one's largest overlap, where it is mutual.

    Raises:
        TrainingError: the masks are not of one size.
    """
    if labels.shape != others.shape:
        raise TrainingError(f"masks of {labels.shape} and {others.shape} do not match")
    both = (labels > 0) & (others > 0)
    shared = np.zeros((labels.max() + 1, others.max() + 1), np.intp)
    np.add.at(shared, (labels[both], others[both]), 1)
    rows, columns = shared.argmax(axis=1), shared.argmax(axis=0)
    return [
        (label, int(rows[label]))
        for label in range(1, len(rows))
        if shared[label].any() and columns[rows[label]] == label
    ]


def read_mask(path: Path) -> tuple[Labels, tuple[float, float, float]]:
    """Labels, (slices, rows, columns), and the spacing of slices, rows and columns, mm.

    Raises:
        TrainingError: it cannot be read, is not of three axes, or its values are not whole numbers.
    """
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise TrainingError(f"{path}: cannot be read as NIfTI, MetaImage or NRRD") from error
    values = sitk.GetArrayFromImage(image)
    if values.ndim != 3:
        raise TrainingError(f"{path}: {values.ndim} axes; want slices, rows, columns")
    labels = values.astype(np.intp)
    if (labels != values).any() or labels.min() < 0:
        raise TrainingError(f"{path}: not a mask: its values are not whole numbers from 0")
    if labels.max() == 1:
        labels = np.asarray(ndimage.label(labels, np.ones((3, 3, 3)))[0], np.intp)
    column, row, between = image.GetSpacing()
    return labels, (between, row, column)


def compared(path: Path, other: Path) -> tuple[list[tuple[Node, Node]], int]:
    """The nodes that both masks have, and how many only one has."""
    (labels, spacing), (others, other_spacing) = read_mask(path), read_mask(other)
    if not np.allclose(spacing, other_spacing, rtol=1e-3):
        raise TrainingError(f"{path}: voxels of {spacing} mm, in the other of {other_spacing} mm")
    one = {node.label: node for node in measure(labels, spacing)}
    two = {node.label: node for node in measure(others, spacing)}
    pairs = [(one[first], two[second]) for first, second in match(labels, others)]
    return pairs, len(one) + len(two) - 2 * len(pairs)


def main(argv: Sequence[str]) -> None:
    options = {"other": "", "out": ""}
    for word in argv[1:]:
        key, equals, value = word.partition("=")
        if key not in options or not equals:
            raise ConfigError(f"{word}: want one of {', '.join(f'{name}=' for name in options)}")
        options[key] = value
    if not argv:
        raise ConfigError(f"want a mask\n{__doc__}")
    found: dict[str, object]
    if options["other"]:
        found = _print_pairs(_partners(Path(argv[0]), Path(options["other"])))
    else:
        found = _print_nodes(_masks(Path(argv[0])))
    if options["out"]:
        Path(options["out"]).write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def _print_nodes(paths: Sequence[Path]) -> dict[str, object]:
    nodes = []
    print("mask  node  slice  long mm  short mm  short/long")
    for number, path in enumerate(paths, start=1):
        for node in measure(*read_mask(path)):
            print(f"{number:4} {_row(node)}")
            nodes.append({"mask": number, **asdict(node), "ratio": node.ratio})
    return {"nodes": nodes}


def _print_pairs(files: Sequence[tuple[Path, Path]]) -> dict[str, object]:
    pairs: list[tuple[Node, Node]] = []
    alone = 0
    print("mask  node  slice  long mm  short mm  short/long, then the same of the other mask")
    for number, (path, other) in enumerate(files, start=1):
        own, left = compared(path, other)
        alone += left
        for one, two in own:
            print(f"{number:4} {_row(one)} {_row(two)}")
        pairs += own
    print(f"{len(pairs)} nodes in both, {alone} in one only\n")
    agreements: dict[str, object] = {}
    for name in ("long_mm", "short_mm", "ratio"):
        first = [getattr(one, name) for one, _ in pairs]
        second = [getattr(two, name) for _, two in pairs]
        found = agreement(second, first)
        agreements[name] = asdict(found)
        print(
            f"{name}: other minus first {found.bias:+.3f}, "
            f"95 % limits of agreement {found.lower:+.3f} to {found.upper:+.3f}"
        )
    rows = [{"first": _plain(one), "other": _plain(two)} for one, two in pairs]
    return {"nodes": rows, "in_one_only": alone, "agreement": agreements}


def _plain(node: Node) -> dict[str, float]:
    return {**asdict(node), "ratio": node.ratio}


def _row(node: Node) -> str:
    numbers = f"{node.long_mm:8.2f} {node.short_mm:9.2f} {node.ratio:11.3f}"
    return f"{node.label:5} {node.slice:6} {numbers}"


def _masks(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (found := sorted(p for p in path.iterdir() if p.name.endswith(ITK_SUFFIXES))):
        raise TrainingError(f"{path}: no mask in it; want {', '.join(ITK_SUFFIXES)}")
    return found


def _partners(path: Path, other: Path) -> list[tuple[Path, Path]]:
    if not path.is_dir():
        return [(path, other)]
    names = {p.name for p in _masks(path)} & {p.name for p in _masks(other)}
    if not names:
        raise TrainingError(f"{path} and {other}: no file of one has the name of one of the other")
    return [(path / name, other / name) for name in sorted(names)]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
