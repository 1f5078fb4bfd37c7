"""Generators without normalisation layers: the residual denoiser, the identity, an affine map."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicomnode.imaging.networks.base import Generator, check, in_float32

COARSER = 4
"""How many pixels of the blocks one of the side path is, in each direction."""


class ResidualDenoiser(Generator):
    """Noise estimator without normalisation layers: what to add to a noisy slice.

    Pixel-unshuffle, a convolution, residual blocks at the lower resolution, a convolution,
    pixel-shuffle. No layer looks at statistics of the image, so the result does not depend on
    the field of view, on the batch or on air around the patient. The last convolution starts at
    zero: an untrained network changes nothing. Under autocast the first and last convolutions and
    the sums between the blocks stay float32: a bf16 input would be rounded to steps of 8 HU.

    (batch, slices, rows, columns), float32, in [-1, 1] -> (batch, 1, rows, columns): the
    difference to add to the middle slice, in the same scale.
    """

    def __init__(
        self,
        width: int = 64,
        blocks: int = 6,
        shuffle: int = 2,
        centre: float = -0.5,
        gain: float = 20.0,
        coarse: int = 0,
        strength: float = 1.0,
        slices: int = 1,
    ) -> None:
        """`centre` and `gain` bring soft tissue near zero and its noise near one, inside only.

        `coarse`: blocks of a side path between the halves of the others, at a quarter of their
        resolution: noise that is coarser than a tile of pixels is told from tissue farther around.
        It starts at zero as well. Without it the network is as it was before there was one.
        `strength`: share of the difference that is given. What is predicted is a mean, smoother
        than any scan; a rest of the source's own noise brings its grain back.
        """
        super().__init__()
        check(1 <= width <= 1024 and 0 <= blocks <= 64 and 1 <= shuffle <= 16, "out of range")
        check(0 <= coarse <= 64, "coarse: from 0 to 64")
        check(0.0 < strength <= 1.0, "strength: above 0, at most 1")
        check(1 <= slices <= 31 and slices % 2 == 1, "slices: odd, from 1 to 31")
        self.slices = slices
        self.centre = centre
        self.gain = gain
        self.strength = strength
        self.shuffle = self.multiple = shuffle
        self.tiles_exactly = True
        self.receptive_field = 2 * (shuffle * (3 + 2 * blocks) - 1) + 1
        self.coarse: nn.Sequential | None = None
        if coarse:
            self.multiple = shuffle * COARSER
            self.receptive_field += 2 * self.multiple * (2 * coarse + 1)
            self.coarse = nn.Sequential(*(_Block(width) for _ in range(coarse)), _silent(width))
        self.first = nn.Conv2d(slices * shuffle**2, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.last = nn.Conv2d(width, shuffle**2, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(torch.as_tensor(self.last.bias))

    def forward(self, x: Tensor) -> Tensor:
        scaled = (x.float() - self.centre) * self.gain
        features = in_float32(self.first, F.pixel_unshuffle(scaled, self.shuffle))
        change = in_float32(self.last, self._between(features))
        return F.pixel_shuffle(change, self.shuffle) / (self.gain / self.strength)

    def _between(self, features: Tensor) -> Tensor:
        """All blocks, (batch, width, rows, columns) -> the same shape."""
        if self.coarse is None:
            return torch.as_tensor(self.blocks(features))
        half = len(self.blocks) // 2
        features = torch.as_tensor(self.blocks[:half](features))
        wide = self.coarse(F.avg_pool2d(features, COARSER))
        features = features + F.interpolate(wide, scale_factor=float(COARSER), mode="nearest")
        return torch.as_tensor(self.blocks[half:](features))


def _silent(width: int) -> nn.Conv2d:
    """A convolution that gives zero until it is trained."""
    layer = nn.Conv2d(width, width, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(torch.as_tensor(layer.bias))
    return layer


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():  # many blocks without norm stay calm at the start
            self.second.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.second(F.relu(self.first(x))))


class Identity(Generator):
    """Returns its input. With intensity ``none`` the whole path must give back every value."""

    tiles_exactly = True

    def forward(self, x: Tensor) -> Tensor:
        return x


class Affine(Generator):
    """scale * x + offset, in the unit the intensity leaves: a model whose result is known."""

    tiles_exactly = True

    def __init__(self, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.offset
