"""Shapes as signed distances in mm, negative inside, and how to paint them into an image.

A shape is evaluated at the coordinates of all voxels of a slice at once; painting blends it over
what lies behind by the part of each voxel that it covers, so that edges are smooth. Vessels are
trees of straight rods.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]
"""A value per voxel of a slice, (rows, columns), or per point, (points,)."""
Voxels = NDArray[np.float32]
"""HU, float32."""
EDGE_MM: Final = 0.9
Rods = NDArray[np.float64]
"""(rods, 7): the two ends in mm (x, y, z) and the radius in mm."""


def length(parts: Sequence[Field | float]) -> Field:
    """Length of a vector given by its components; never quite zero, as one divides by it."""
    square = np.square(parts[0])
    for part in parts[1:]:
        square = square + np.square(part)
    return np.asarray(np.sqrt(square) + 1e-6, np.float32)


def ball(p: Sequence[Field | float], centre: Sequence[float], radii: Sequence[float]) -> Field:
    """Signed distance to an ellipse or ellipsoid, in as many dimensions as there are radii."""
    u = [(a - c) / r for a, c, r in zip(p, centre, radii, strict=True)]
    k = length(u)
    slope = length([a / r for a, r in zip(u, radii, strict=True)])
    return np.asarray(k * (k - 1) / slope, np.float32)


def rod(p: Sequence[Field | float], a: Sequence[float], b: Sequence[float], radius: float) -> Field:
    """Signed distance to a straight rod with round ends."""
    axis = np.subtract(b, a)
    from_a = [c - q for c, q in zip(p, a, strict=True)]
    along = np.zeros((), np.float32)
    for c, d in zip(from_a, axis / (axis @ axis), strict=True):
        along = along + c * np.float32(d)
    t = np.clip(along, 0, 1)
    off = [c - t * np.float32(d) for c, d in zip(from_a, axis, strict=True)]
    return length(off) - np.float32(radius)


def barrel(x: Field, y: Field, half_width: Field | float, half_depth: Field | float) -> Field:
    """Signed distance to the outline of a trunk: between an ellipse and a rectangle."""
    u, v = np.abs(x) / half_width, np.abs(y) / half_depth
    u_root, v_root = np.sqrt(u), np.sqrt(v)
    k = (u * u * u_root + v * v * v_root) ** 0.4 + 1e-6
    slope = np.hypot(u * u_root / half_width, v * v_root / half_depth) / (k * np.sqrt(k))
    return np.asarray((k - 1) / (slope + 1e-6), np.float32)


def join(a: Field, b: Field, round_mm: float) -> Field:
    """The union of two shapes, with a fillet."""
    h = np.clip(0.5 + 0.5 * (b - a) / round_mm, 0, 1)
    return np.asarray(b + (a - b) * h - round_mm * h * (1 - h), np.float32)


def covers(distance: Field, edge_mm: float = EDGE_MM) -> Field:
    """The part of each voxel that lies inside, 0 to 1."""
    return np.asarray(np.clip(0.5 - distance / edge_mm, 0, 1), np.float32)


def paint(image: Field, part: Field, hu: Field | float) -> None:
    """Blend `hu` over the image, in place, where `part` is above zero."""
    image += part * (hu - image)


def blur(image: Voxels, sigma_px: float) -> Voxels:
    """The point spread of a soft reconstruction kernel."""
    taps = np.exp(-0.5 * (np.arange(-3, 4) / sigma_px) ** 2)
    for _ in range(2):  # rows, then columns
        padded = np.pad(image, ((3, 3), (0, 0)), "edge")
        blurred = np.zeros_like(image)
        for start, tap in enumerate((taps / taps.sum()).astype(np.float32)):
            blurred += tap * padded[start : start + len(image)]
        image = blurred.T
    return image


def textures(rng: np.random.Generator, matrix: int, spacing_mm: float) -> Iterator[Field]:
    """Per slice (2, rows, columns): grain of 2.5 mm and of 9 mm, zero mean, unit deviation."""
    frequency = np.hypot(np.fft.fftfreq(matrix)[:, None], np.fft.rfftfreq(matrix)[None, :])
    bands = []
    for size_mm in (2.5, 9.0):
        f0 = spacing_mm / (2 * size_mm)
        bands.append(np.exp(-0.5 * ((frequency - f0) / (0.5 * f0)) ** 2))
    white = rng.standard_normal((matrix, matrix), np.float32)
    while True:
        spectrum = np.fft.rfft2(white)
        grain = np.stack([np.fft.irfft2(spectrum * band, s=white.shape) for band in bands])
        yield (grain / grain.std(axis=(1, 2), keepdims=True)).astype(np.float32)
        white = 0.7 * white + 0.714 * rng.standard_normal((matrix, matrix), np.float32)


def tree(targets: NDArray[np.float64], root: Sequence[float], tip_mm: float) -> Rods:
    """Join points to a tree that is short and direct (balanced minimum spanning tree).

    Radii follow Murray's law: the cube of a stem is about the sum of the cubes of its branches.

    Args:
        targets: (points, 3), mm; a twig reaches each.
        root: where the stem begins, mm.
        tip_mm: radius of the last twigs.
    """
    order = np.argsort(np.linalg.norm(targets - root, axis=1))
    nodes = np.concatenate([[root], targets[order]])
    parent = np.zeros(len(nodes), int)
    path = np.zeros(len(nodes))
    for i in range(1, len(nodes)):
        reach = np.linalg.norm(nodes[:i] - nodes[i], axis=1)
        parent[i] = np.argmin(reach + 0.55 * path[:i])
        path[i] = path[parent[i]] + reach[parent[i]]
    leaves = np.ones(len(nodes))
    for i in range(len(nodes) - 1, 0, -1):
        leaves[parent[i]] += leaves[i]
    return np.column_stack([nodes[parent[1:]], nodes[1:], tip_mm * leaves[1:] ** 0.37])


def cut(rods: Rods, x: Field, y: Field, z: float, wider: float = 0.0) -> Field:
    """Where a slice cuts rods, 0 to 1, (rows, columns); thin rods that lie flat in it are faint.

    `wider` thickens each rod by this part of its radius and as many half millimetres.
    """
    part = np.zeros(x.shape, np.float32)
    step, top, left = float(x[0, 1] - x[0, 0]), float(y[0, 0]), float(x[0, 0])
    radii = rods[:, 6] * (1 + wider) + 1.5
    low, high = (
        np.minimum(rods[:, 2], rods[:, 5]) - radii,
        np.maximum(rods[:, 2], rods[:, 5]) + radii,
    )
    for line in rods[(low < z) & (z < high)]:
        a, b, radius = line[:3].tolist(), line[3:6].tolist(), float(line[6])
        margin = radius * (1 + wider) + 2
        box = tuple(
            slice(
                max(0, int((min(a[i], b[i]) - margin - first) / step)),
                max(0, int((max(a[i], b[i]) + margin - first) / step) + 2),
            )
            for i, first in ((1, top), (0, left))
        )
        distance = rod((x[box], y[box], z), a, b, radius) - wider * (radius + 0.5)
        upright = abs(b[2] - a[2]) / (float(np.linalg.norm(line[3:6] - line[:3])) + 1e-6)
        share = upright + (1 - upright) * min(1.0, 0.9 * radius)
        np.maximum(part[box], share * covers(distance), out=part[box])
    return part
