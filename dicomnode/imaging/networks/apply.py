"""How a generator is applied to the slices of a volume: neighbours, padding, scale and back."""

import functools
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.errors import PackageError
from dicomnode.imaging.equalise import Equalisation, with_equalised
from dicomnode.imaging.networks.base import Generator
from dicomnode.imaging.pending import Pending, Ready, Then

PADDING_MODES = ("reflect", "replicate", "air")
"""How a slice is brought to a multiple; `air`: with the lowest value that a network sees, -1."""

Voxels = NDArray[np.float32]
Run = Callable[[Voxels], Voxels]
"""(batch, slices, rows, columns), float32, network scale -> (batch, 1, rows, columns)."""
Start = Callable[[Voxels], Pending[Voxels]]
"""The same, begun; the result is waited for later."""


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

    def now(x: Voxels) -> Pending[Voxels]:
        return Ready(run(x))

    for start in range(0, count, batch):
        index = np.arange(start, min(start + batch, count))
        window = voxels[np.clip(index[:, None] + around, 0, count - 1)]
        begun = start_batch(
            now, window, *scales, grid[1], residual=residual, padding=padding, extra=extra
        )
        result[index] = begun.result()
    return result


def start_batch(
    start: Start,
    window: Voxels,
    source_scale: Scale,
    result_scale: Scale,
    multiple: int,
    *,
    residual: bool,
    padding: str = "reflect",
    extra: Equalisation | None = None,
) -> Pending[Voxels]:
    """Begin one batch; what comes after the network is done when the result is asked for.

    (batch, slices, rows, columns), float32, physical unit: each slice between its neighbours ->
    (batch, rows, columns), float32, physical unit. `multiple` of rows and columns; the rest as of
    `run_slices`.

    Raises:
        PackageError: the slices are too small to be padded as the model was trained.
    """
    x = source_scale.to_network(window)
    x = pad_to_multiple(with_equalised(x, extra) if extra else x, multiple, padding)
    middle = window[:, window.shape[1] // 2] if residual else None
    shape = (*window.shape[:1], *window.shape[2:])
    finish = functools.partial(_finished, x.shape, shape, result_scale, middle)
    return Then(start(np.ascontiguousarray(x, np.float32)), finish)


def _finished(
    given: tuple[int, ...],
    shape: tuple[int, ...],
    scale: Scale,
    middle: Voxels | None,
    y: Voxels,
) -> Voxels:
    """What the network made of `given` in the physical unit, without padding, added to `middle`."""
    if y.shape != (given[0], 1, *given[2:]):
        raise PackageError(f"the generator made {y.shape} of {given}: one result per slice")
    change = y[:, 0, : shape[1], : shape[2]]
    if middle is None:
        return scale.from_network(change)
    result: Voxels = middle + change * np.float32(scale.unit_per_network)
    return result


def padded(shape: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    """The sides that `pad_to_multiple` makes of these."""
    return tuple(side + -side % multiple for side in shape)


def pad_to_multiple(x: Voxels, multiple: int, mode: str) -> Voxels:
    """Grow the last two axes at their ends to a multiple.

    Raises:
        PackageError: there is less to reflect than is missing: no such slice was trained on.
    """
    rows, columns = padded(x.shape[-2:], multiple)
    below, right = rows - x.shape[-2], columns - x.shape[-1]
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
    if not is_tiled(cut, x.shape):
        return run(x)
    side, halo = _side_and_halo(cut)
    result: Voxels = np.empty((len(x), 1, *x.shape[2:]), np.float32)
    for top, row in _tiles(x.shape[2], side, halo):
        for left, column in _tiles(x.shape[3], side, halo):
            tile = run(np.ascontiguousarray(x[:, :, top : top + side, left : left + side]))
            result[:, :, row, column] = tile[
                :, :, row.start - top : row.stop - top, column.start - left : column.stop - left
            ]
    return result


def is_tiled(cut: tuple[int, int, int], shape: tuple[int, ...]) -> bool:
    """Whether `run_tiled` cuts an array of this shape."""
    side, halo = _side_and_halo(cut)
    return max(shape[2:]) > side > 2 * halo


def _side_and_halo(cut: tuple[int, int, int]) -> tuple[int, int]:
    overlap, side, multiple = cut
    return side - side % multiple, -(-overlap // (2 * multiple)) * multiple


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
