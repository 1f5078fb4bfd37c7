"""The generator of GAN-CIRCLE (You 2019), after the released graph."""

from itertools import pairwise

from torch import Tensor, cat, nn
from torch.nn import functional as F

from dicomnode.imaging.networks.base import (
    Generator,
    centre_slice,
    check,
    check_common,
    in_float32,
)

LAYERS = 12
"""Convolutions whose results are all joined."""


class GanCircle(Generator):
    """Twelve convolutions with fewer and fewer channels, joined, rebuilt, added to the input.

    (batch, slices, rows, columns), float32, in [-1, 1] -> (batch, 1, rows, columns). Stride 2 works
    at half the resolution, as the released graph does; stride 1 keeps the size throughout. There
    is no normalisation layer. The authors' dropout only trains.
    """

    def __init__(
        self, width: int = 64, stride: int = 1, slices: int = 1, head: str = "residual"
    ) -> None:
        """`width`: channels of the first convolution; 128 with stride 2 is the released graph."""
        super().__init__()
        check_common(slices, 1, head, "none")
        check(stride in (1, 2), "stride: 1 or 2")
        check(16 <= width <= 512, "width: from 16 to 512")
        self.slices, self.head, self.multiple = slices, head, stride
        self.receptive_field = 2 * (LAYERS + 4) + 1 if stride == 1 else 2 * (2 * LAYERS + 6) + 1
        channels = [slices, *filters(width)]
        self.features = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride if place == 0 else 1, 1)
            for place, (before, after) in enumerate(pairwise(channels))
        )
        joined = sum(channels[1:])
        self.a1 = nn.Conv2d(joined, 64, 1)
        self.b1 = nn.Conv2d(joined, 32, 1)
        self.b2 = nn.Conv2d(32, 8, 3, 1, 1)
        self.join = nn.Conv2d(72, 72, 3, 1, 1)
        self.up: nn.Module = nn.Conv2d(72, 36, 3, 1, 1)
        if stride == 2:
            self.up = nn.ConvTranspose2d(72, 36, 4, 2, 1)
        self.last = nn.Conv2d(36, 1, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found = [_leaky(in_float32(self.features[0], x))]
        for layer in self.features[1:]:
            found.append(_leaky(layer(found[-1])))
        joined = cat([f.to(found[-1].dtype) for f in found], 1)
        rebuilt = cat([_leaky(self.a1(joined)), _leaky(self.b2(_leaky(self.b1(joined))))], 1)
        result = in_float32(self.last, _leaky(self.up(self.join(rebuilt))))
        if self.head == "residual":
            return centre_slice(x) + result
        return result.tanh() if self.head == "tanh" else result


def filters(width: int) -> list[int]:
    """Channels of the twelve convolutions: from `width` down to 16."""
    steps = [(place / (LAYERS - 1)) ** (1 / 1.5) for place in range(LAYERS)]
    return [int((width - 16) * (1 - step) + 16) for step in steps]


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)
