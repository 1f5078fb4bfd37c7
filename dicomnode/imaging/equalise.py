"""Histogram equalisation of slices: whole, or contrast-limited in tiles (CLAHE, Zuiderveld 1994).

Made of the slice alone, by counting: training and serving get the same bits. What comes out is a
rank, not a physical value: the same tissue has another one in every slice.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Equalisation = Literal["global", "clahe"]

_BINS = 4096
"""Of the whole slice: as many as CT has values."""
_TILES, _TILE_BINS = 8, 256
_CLIP = 3.0
"""A bin of a tile counts at most so many times the mean; the rest is spread over all."""


def equalised(values: NDArray[np.float32], method: Equalisation) -> NDArray[np.float32]:
    """Each slice with its grey values evenly used.

    (..., rows, columns), float32, in [-1, 1] -> the same shape, float32, in [-1, 1]; slices are
    independent of one another. A slice of one value becomes -1.
    """
    planes = values.reshape(-1, *values.shape[-2:])
    apply = _whole if method == "global" else _in_tiles
    result = np.stack([apply(plane) for plane in planes])
    return result.reshape(values.shape).astype(np.float32)


def with_equalised(x: NDArray[np.float32], method: Equalisation) -> NDArray[np.float32]:
    """The middle slice, equalised, put before the slices as a channel more.

    (batch, slices, rows, columns), float32, in [-1, 1] -> (batch, slices + 1, rows, columns). The
    middle slice then is number (slices + 1) // 2, as it is among an odd number of slices.
    """
    middle = x[:, x.shape[1] // 2]
    return np.concatenate([equalised(middle, method)[:, None], x], axis=1)


def _levels(plane: NDArray[np.float32], bins: int) -> NDArray[np.int64]:
    """Which of `bins` equal steps from -1 to 1 each value is in."""
    steps = (plane.astype(np.float64) + 1.0) / 2.0 * bins
    return np.clip(steps.astype(np.int64), 0, bins - 1)


def _whole(plane: NDArray[np.float32]) -> NDArray[np.float64]:
    level = _levels(plane, _BINS)
    below = np.cumsum(np.bincount(level.ravel(), minlength=_BINS))
    lowest = below[below > 0][0]  # the darkest values stay dark, however many they are
    if lowest == plane.size:
        return np.full(plane.shape, -1.0)
    rank = np.maximum(below - lowest, 0) / (plane.size - lowest)
    mapped: NDArray[np.float64] = (2.0 * rank - 1.0)[level]
    return mapped


def _in_tiles(plane: NDArray[np.float32]) -> NDArray[np.float64]:
    if plane.min() == plane.max():
        return np.full(plane.shape, -1.0)
    rows, columns = plane.shape
    tiles = min(_TILES, rows), min(_TILES, columns)
    high, wide = -(-rows // tiles[0]), -(-columns // tiles[1])
    level = _levels(plane, _TILE_BINS)
    around = ((0, high * tiles[0] - rows), (0, wide * tiles[1] - columns))
    tables = _tables(np.pad(level, around, mode="symmetric"), tiles, (high, wide))
    first, second, row_share = _between(rows, high, tiles[0])
    left, right, column_share = _between(columns, wide, tiles[1])
    result = np.zeros(plane.shape)
    for row, share in ((first, 1.0 - row_share), (second, row_share)):
        for column, part in ((left, 1.0 - column_share), (right, column_share)):
            weight = share[:, None] * part[None, :]
            result += weight * tables[row[:, None], column[None, :], level]
    return result


def _tables(
    level: NDArray[np.int64], tiles: tuple[int, int], side: tuple[int, int]
) -> NDArray[np.float64]:
    """Of each tile: level -> value, (tiles down, tiles across, bins), float64, -1 to 1."""
    down = (np.arange(level.shape[0]) // side[0])[:, None]
    across = (np.arange(level.shape[1]) // side[1])[None, :]
    tile = down * tiles[1] + across
    count = tiles[0] * tiles[1]
    counts = np.bincount((tile * _TILE_BINS + level).ravel(), minlength=count * _TILE_BINS)
    histogram = counts.reshape(count, _TILE_BINS).astype(np.float64)
    pixels = side[0] * side[1]
    limit = max(1.0, _CLIP * pixels / _TILE_BINS)
    beyond = np.maximum(histogram - limit, 0.0).sum(axis=1, keepdims=True)
    histogram = np.minimum(histogram, limit) + beyond / _TILE_BINS
    rank = np.minimum(np.cumsum(histogram, axis=1) / pixels, 1.0)
    return (2.0 * rank - 1.0).reshape(*tiles, _TILE_BINS)


def _between(
    length: int, side: int, tiles: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """For each pixel of a line the two tiles it lies between, and the share of the second."""
    place = (np.arange(length) + 0.5) / side - 0.5
    first = np.floor(place).astype(np.int64)
    share = place - first
    return np.clip(first, 0, tiles - 1), np.clip(first + 1, 0, tiles - 1), share
