"""How a generator is applied to the slices of a volume: neighbours, padding, scale and back."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.errors import PackageError
from dicomnode.imaging.equalise import Equalisation, with_equalised
from dicomnode.imaging.networks.base import Generator

PADDING_MODES = ("reflect", "replicate", "air")
"""How a slice is brought to a multiple; `air`: with the lowest value that a network sees, -1."""

Voxels = NDArray[np.float32]
Run = Callable[[Voxels], Voxels]
"""(batch, slices, rows, columns), float32, network scale -> (batch, 1, rows, columns)."""


class Scale(Protocol):
    """What is needed here of an intensity (dicomnode.imaging.intensity)."""

    @property
    def unit_per_network(self) -> float: ...
    def to_network(self, voxels: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def from_network(self, values: NDArray[np.float32]) -> NDArray[np.float32]: ...


def run_generator(
    generator: Generator,
    voxels: Voxels,
    source_scale: Scale,
    result_scale: Scale,
    *,
    residual: bool,
    padding: str = "reflect",
    device: str = "cpu",
    extra: Equalisation | None = None,
) -> Voxels:
    """Apply `generator` to each slice of `voxels`, in float32: the reference of every engine.

    (slices, rows, columns), float32, physical unit -> the same shape and, with `residual`, the
    source plus the predicted difference, so that values outside the window survive.
    """

    @torch.inference_mode()
    def run(x: Voxels) -> Voxels:
        y: Voxels = generator(torch.from_numpy(x).to(device)).float().cpu().numpy()
        return y

    grid = (generator.slices - (extra is not None), generator.multiple)
    scales = (source_scale, result_scale)
    return run_slices(run, voxels, *scales, grid, residual=residual, padding=padding, extra=extra)


def run_slices(
    run: Run,
    voxels: Voxels,
    source_scale: Scale,
    result_scale: Scale,
    grid: tuple[int, int],
    *,
    residual: bool,
    padding: str = "reflect",
    batch: int = 1,
    extra: Equalisation | None = None,
) -> Voxels:
    """Apply `run` to each slice of `voxels` with its neighbours.

    (slices, rows, columns), float32, physical unit -> the same shape. A result depends on its own
    slice and its neighbours alone: not on the batch, not on the order of work.

    Args:
        grid: slices that go in together, odd, and what rows and columns must be a multiple of. At
            the ends of the volume the last slice stands in for those beyond.
        batch: results per call of `run`; one is as fast as many on a CPU.
        extra: the middle slice goes in once more, equalised so, as the first channel.

    Raises:
        PackageError: the slices are too small to be padded as the model was trained.
    """
    count, slices = len(voxels), grid[0]
    around = np.arange(-(slices // 2), slices - slices // 2)
    scales = (source_scale, result_scale)
    result = np.empty_like(voxels)
    for start in range(0, count, batch):
        index = np.arange(start, min(start + batch, count))
        window = voxels[np.clip(index[:, None] + around, 0, count - 1)]
        result[index] = run_batch(
            run, window, *scales, grid[1], residual=residual, padding=padding, extra=extra
        )
    return result


def run_batch(
    run: Run,
    window: Voxels,
    source_scale: Scale,
    result_scale: Scale,
    multiple: int,
    *,
    residual: bool,
    padding: str = "reflect",
    extra: Equalisation | None = None,
) -> Voxels:
    """Apply `run` once.

    (batch, slices, rows, columns), float32, physical unit: each slice between its neighbours ->
    (batch, rows, columns), float32, physical unit. `multiple` of rows and columns; the rest as of
    `run_slices`.

    Raises:
        PackageError: the slices are too small to be padded as the model was trained.
    """
    rows, columns = window.shape[2:]
    x = source_scale.to_network(window)
    x = pad_to_multiple(with_equalised(x, extra) if extra else x, multiple, padding)
    y = run(np.ascontiguousarray(x, np.float32))
    if y.shape != (len(window), 1, *x.shape[2:]):
        raise PackageError(f"the generator made {y.shape} of {x.shape}: one result per slice")
    change = y[:, 0, :rows, :columns]
    if not residual:
        return result_scale.from_network(change)
    unit = np.float32(result_scale.unit_per_network)
    middle: Voxels = window[:, window.shape[1] // 2]
    return middle + change * unit


def pad_to_multiple(x: Voxels, multiple: int, mode: str) -> Voxels:
    """Grow the last two axes at their ends to a multiple.

    Raises:
        PackageError: there is less to reflect than is missing: no such slice was trained on.
    """
    below, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    if not (below or right):
        return x
    if mode == "reflect" and (below >= x.shape[-2] or right >= x.shape[-1]):
        raise PackageError(
            f"slices of {x.shape[-2]} x {x.shape[-1]} cannot be padded to a multiple of {multiple}"
            " by reflection; this model takes larger ones"
        )
    width = [(0, 0)] * (x.ndim - 2) + [(0, below), (0, right)]
    if mode == "air":
        return np.pad(x, width, constant_values=-1.0)
    return np.pad(x, width, mode="reflect" if mode == "reflect" else "edge")


def run_tiled(run: Run, cut: tuple[int, int, int], x: Voxels) -> Voxels:
    """Apply `run` to tiles of a size where a slice is larger, and put the middles together.

    Exact where the overlap covers the receptive field and nothing looks at the whole slice: every
    result is the same sum of the same products, and, with tiles no smaller than the manifest
    allows, in the same order: no bit differs from the whole slice (tests/test_engines.py, every
    engine). Every tile starts at a multiple, so that strides fall alike; at the edges of the slice
    a tile ends where the slice ends.

    Args:
        cut: overlap of neighbouring tiles, largest side of a tile, and the multiple; in pixels.
        x: (batch, slices, rows, columns), float32; rows and columns are multiples.
    """
    overlap, side, multiple = cut
    side -= side % multiple
    halo = -(-overlap // (2 * multiple)) * multiple
    if max(x.shape[2:]) <= side or side <= 2 * halo:
        return run(x)
    result: Voxels = np.empty((len(x), 1, *x.shape[2:]), np.float32)
    for top, row in _tiles(x.shape[2], side, halo):
        for left, column in _tiles(x.shape[3], side, halo):
            tile = run(np.ascontiguousarray(x[:, :, top : top + side, left : left + side]))
            result[:, :, row, column] = tile[
                :, :, row.start - top : row.stop - top, column.start - left : column.stop - left
            ]
    return result


def _tiles(length: int, side: int, halo: int) -> list[tuple[int, slice]]:
    """Where each tile starts, and what of the slice is taken from it."""
    if length <= side:
        return [(0, slice(0, length))]
    found, done = [], 0
    while done < length:
        start = min(max(done - halo, 0), length - side)
        end = length if start + side == length else start + side - halo
        found.append((start, slice(done, end)))
        done = end
    return found
