"""A generator with convolutions in 8-bit integers, as far as its package was calibrated for it.

Written as rounding of floating-point numbers, which PyTorch computes as it stands and OpenVINO
turns into integer kernels. Weights have 127 steps to either side and a scale per output channel;
what goes into a convolution has 256 values and one scale, from limits found on training images.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicomnode.imaging.engines.base import EngineError
from dicomnode.imaging.engines.subpixel import without_transposed
from dicomnode.imaging.networks import Generator

Limits = Mapping[str, tuple[float, float]]
"""Name of a convolution in `convolutions` -> least and largest value that goes into it."""


def convolutions(generator: Generator) -> dict[str, nn.Conv2d]:
    """Name -> convolution, of a generator without transposed ones."""
    named = generator.named_modules()
    return {name: module for name, module in named if isinstance(module, nn.Conv2d)}


def in_int8(generator: Generator, limits: Limits) -> Generator:
    """A copy without transposed convolutions, with the convolutions of `limits` in 8 bits.

    Raises:
        EngineError: `limits` names none, or something that is no convolution of this generator.
    """
    changed = without_transposed(generator)
    found = convolutions(changed)
    if not limits or limits.keys() - found.keys():
        wrong = ", ".join(sorted(limits.keys() - found.keys())[:3]) or "none at all"
        raise EngineError(f"int8: not convolutions of this generator: {wrong}")
    for name, (low, high) in limits.items():
        parent, _, own = name.rpartition(".")
        setattr(changed.get_submodule(parent), own, Int8Conv(found[name], low, high))
    return changed


class Int8Conv(nn.Module):
    """A convolution of rounded weights with a rounded input.

    An input that is never negative has the whole steps 0 to 255, any other -128 to 127: of 255
    values OpenVINO makes others of its own, with 1.7 times the error.
    """

    def __init__(self, layer: nn.Conv2d, low: float, high: float) -> None:
        super().__init__()
        self.lowest, self.highest = (0, 255) if low >= 0 else (-128, 127)
        self.step = max(abs(low), abs(high), 1e-12) / self.highest
        self.layer = layer
        largest = layer.weight.detach().abs().amax(dim=(1, 2, 3)).clamp(min=1e-12)
        self.register_buffer("scale", largest / 127)
        self.register_buffer("zero", torch.zeros(len(largest), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        rounded = torch.fake_quantize_per_tensor_affine(x, self.step, 0, self.lowest, self.highest)
        weight = torch.fake_quantize_per_channel_affine(
            self.layer.weight, self.get_buffer("scale"), self.get_buffer("zero"), 0, -127, 127
        )
        layer = self.layer
        padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
        return F.conv2d(
            rounded, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups
        )
