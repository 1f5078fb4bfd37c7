"""Find, on training slices, between which values the inputs of a generator's convolutions lie."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dicomnode.imaging.engines import Limits, convolutions, in_int8
from dicomnode.imaging.engines.subpixel import without_transposed
from dicomnode.imaging.networks import Generator

BINS = 2048
SHARES = np.linspace(0.2, 1.0, 33)
"""Of the largest magnitude: limits that are tried."""
Seen = Callable[[str, Tensor], None]


def calibrate(generator: Generator, given: Sequence[NDArray[np.float32]]) -> Limits:
    """Limits of every convolution but the first and the last one, which stay as they are.

    Of each the limit is taken that loses least, in mean square, to steps and to clipping together.

    Args:
        given: slices, (1, slices, rows, columns), float32, in [-1, 1].
    """
    network = without_transposed(generator).eval()
    largest: dict[str, float] = {}
    least: dict[str, float] = {}

    def extend(name: str, x: Tensor) -> None:
        largest[name] = max(largest.get(name, 0.0), float(x.abs().max()))
        least[name] = min(least.get(name, 0.0), float(x.min()))

    _look(network, given, extend)
    counts = {name: torch.zeros(BINS) for name in largest}

    def count(name: str, x: Tensor) -> None:
        high = max(largest[name], 1e-12)
        counts[name] += torch.histc(x.abs().float(), BINS, 0.0, high)

    _look(network, given, count)
    inner = list(largest)[1:-1]
    return {
        name: _limits(counts[name].numpy(), largest[name], signed=least[name] < 0) for name in inner
    }


def least_harmful(
    generator: Generator, limits: Limits, harm: Callable[[Generator], float]
) -> list[str]:
    """Convolutions, those first that alone do least harm in 8 bits."""
    alone = {name: harm(in_int8(generator, {name: limits[name]})) for name in limits}
    return sorted(alone, key=lambda name: alone[name])


def most_that_pass(
    order: Sequence[str], generator: Generator, limits: Limits, passes: Callable[[Generator], bool]
) -> dict[str, tuple[float, float]]:
    """As many of `order`, from its start, as can be in 8 bits at once; maybe none."""
    fit, too_many = 0, len(order) + 1
    count = len(order)
    while fit < too_many - 1:
        chosen = {name: limits[name] for name in order[:count]}
        if passes(in_int8(generator, chosen)):
            fit = count
        else:
            too_many = count
        count = (fit + too_many) // 2
    return {name: limits[name] for name in order[:fit]}


def _limits(counts: NDArray[np.float32], largest: float, *, signed: bool) -> tuple[float, float]:
    middles = (np.arange(BINS) + 0.5) * largest / BINS
    steps = 127 if signed else 255

    def loss(high: float) -> float:
        step = high / steps
        rounded = np.minimum(np.rint(middles / step), steps) * step
        return float((counts * (rounded - middles) ** 2).sum())

    high = min((float(share * max(largest, 1e-12)) for share in SHARES), key=loss)
    return (-high if signed else 0.0), high


@torch.inference_mode()
def _look(network: Generator, given: Iterable[NDArray[np.float32]], seen: Seen) -> None:
    with _watched(network, seen):
        for x in given:
            network(torch.from_numpy(x))


@contextmanager
def _watched(network: Generator, seen: Seen) -> Iterator[None]:
    """`seen` is told of what goes into each convolution, in the order in which they run."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen(name, inputs[0])

    hooks = [
        layer.register_forward_pre_hook(hook(name)) for name, layer in convolutions(network).items()
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
