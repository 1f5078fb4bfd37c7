"""Fast generators: the work is done at a fraction of the resolution, nothing is thrown away."""

from torch import Tensor, nn
from torch.nn import functional as F

from dicomnode.imaging.networks.base import (
    Generator,
    centre_slice,
    check,
    check_common,
    in_float32,
    norm_layer,
)


class UnshuffleResNet(Generator):
    """Pixel-unshuffle, a convolution, residual blocks, a convolution, pixel-shuffle.

    (batch, slices, rows, columns), float32, in [-1, 1] -> (batch, outputs, rows, columns). With
    shuffle 4 and 64 channels about a hundredth of ResNet-9's time on a CPU.
    """

    def __init__(
        self,
        blocks: int = 9,
        width: int = 64,
        shuffle: int = 4,
        norm: str = "none",
        slices: int = 1,
        outputs: int = 1,
        head: str = "linear",
    ) -> None:
        super().__init__()
        check_common(slices, outputs, head, norm)
        check(1 <= blocks <= 64 and 1 <= width <= 1024, "blocks, width: out of range")
        check(1 <= shuffle <= 16, "shuffle: from 1 to 16")
        self.slices, self.head, self.uses_statistics = slices, head, norm == "instance"
        self.multiple = self.shuffle = shuffle
        self.tiles_exactly = not self.uses_statistics
        self.receptive_field = 2 * (shuffle * (3 + 2 * blocks) - 1) + 1
        bias, area = norm != "batch", shuffle**2
        self.first = nn.Conv2d(slices * area, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(width, norm, bias) for _ in range(blocks)))
        self.last = nn.Conv2d(width, outputs * area, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(in_float32(self.first, F.pixel_unshuffle(x, self.shuffle)))
        result = F.pixel_shuffle(in_float32(self.last, self.blocks(features)), self.shuffle)
        if self.head == "residual":
            return centre_slice(x) + result
        return result.tanh() if self.head == "tanh" else result


class _Block(nn.Module):
    def __init__(self, width: int, norm: str, bias: bool) -> None:
        super().__init__()
        make_norm = norm_layer(norm)
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=bias),
            make_norm(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=bias),
            make_norm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result
