"""ResNet generators of CycleGAN and its relatives (Zhu 2017; Johnson 2016), with upstream's keys.

The layers lie in one `model` sequence in the order of junyanz/pytorch-CycleGAN-and-pix2pix and,
with `antialias`, of taesungp/contrastive-unpaired-translation: their state dicts load unchanged.
"""

from torch import Tensor, nn, outer, tensor
from torch.nn import functional as F

from dicomnode.imaging.networks.base import (
    Generator,
    MakeNorm,
    centre_slice,
    check,
    check_common,
    in_float32,
    norm_layer,
)


class ResNet(Generator):
    """Convolutions down by four, residual blocks, convolutions up by four.

    (batch, slices, rows, columns), float32, in [-1, 1] -> (batch, outputs, rows, columns), with
    the tanh head in [-1, 1]. Each block keeps its size with reflection; first and last convolution
    are 7 x 7 and stay float32 under autocast.
    """

    def __init__(
        self,
        blocks: int = 9,
        width: int = 64,
        norm: str = "instance",
        slices: int = 1,
        outputs: int = 1,
        head: str = "tanh",
        antialias: bool = False,
        separable: bool = False,
        dropout: bool = False,
        downsample: bool = True,
    ) -> None:
        """Options as a package names them.

        Args:
            antialias: blur before halving and after doubling instead of strided and transposed
                convolutions (Zhang 2019).
            separable: depthwise and pointwise convolutions in the blocks (GAN Compression).
            dropout: upstream's key names with dropout; nothing is dropped when serving.
            downsample: False: everything at full resolution and `width` channels, as the text of
                the MR-CT paper describes its generator.
        """
        super().__init__()
        check_common(slices, outputs, head, norm)
        check(1 <= blocks <= 64 and 1 <= width <= 512, "blocks, width: out of range")
        levels = 2 if downsample else 0
        self.slices, self.head, self.uses_statistics = slices, head, norm == "instance"
        self.tiles_exactly = not self.uses_statistics
        self.multiple = 2**levels
        self.receptive_field = _receptive_field(blocks, levels, antialias)
        bias = norm != "batch"
        make_norm = norm_layer(norm)
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(slices, width, 7, bias=bias)]
        layers += [make_norm(width), nn.ReLU()]
        for level in range(levels):
            layers += _down(width * 2**level, make_norm, bias, antialias)
        inner = width * 2**levels
        layers += [_Block(inner, norm, dropout, separable) for _ in range(blocks)]
        for level in range(levels, 0, -1):
            layers += _up(width * 2**level, make_norm, bias, antialias)
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, outputs, 7)]
        self.model = nn.Sequential(*layers, *([nn.Tanh()] if head == "tanh" else []))

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.model) - (2 if self.head == "tanh" else 1)
        features = in_float32(self.model[:2], x)
        result = in_float32(self.model[last:], self.model[2:last](features))
        return centre_slice(x) + result if self.head == "residual" else result


class _Block(nn.Module):
    """x + convolution, norm, ReLU, convolution, norm of x."""

    def __init__(self, channels: int, norm: str, dropout: bool, separable: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.ReflectionPad2d(1), _convolution(channels, norm, separable)]
            layers += [norm_layer(norm)(channels)]
            if len(layers) == 3:
                layers += [nn.ReLU(), *([nn.Dropout(0.5)] if dropout else [])]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.conv_block(x)
        return result


class _Separable(nn.Module):
    """3 x 3 within each channel, norm, 1 x 1 across channels; keys as in gan-compression."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        bias = norm != "batch"
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, groups=channels, bias=bias),
            norm_layer(norm)(channels),
            nn.Conv2d(channels, channels, 1, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return result


def _convolution(channels: int, norm: str, separable: bool) -> nn.Module:
    if separable:
        return _Separable(channels, norm)
    return nn.Conv2d(channels, channels, 3, bias=norm != "batch")


def _down(channels: int, make_norm: MakeNorm, bias: bool, antialias: bool) -> list[nn.Module]:
    """Half the size, twice the channels."""
    stride = 1 if antialias else 2
    convolution = nn.Conv2d(channels, 2 * channels, 3, stride, 1, bias=bias)
    blur = [Halve(2 * channels)] if antialias else []
    return [convolution, make_norm(2 * channels), nn.ReLU(), *blur]


def _up(channels: int, make_norm: MakeNorm, bias: bool, antialias: bool) -> list[nn.Module]:
    """Twice the size, half the channels."""
    half = channels // 2
    if antialias:
        first = [Double(channels), nn.Conv2d(channels, half, 3, 1, 1, bias=bias)]
    else:
        first = [nn.ConvTranspose2d(channels, half, 3, 2, 1, output_padding=1, bias=bias)]
    return [*first, make_norm(half), nn.ReLU()]


class Halve(nn.Module):
    """Blur with [1, 2, 1] in both directions, then every second pixel; edges are reflected."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", _filter((1.0, 2.0, 1.0), channels))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.filt.to(x.dtype), stride=2, groups=x.shape[1])


class Double(nn.Module):
    """Twice the size: zeros between the pixels, blurred with [1, 3, 3, 1]; edges are repeated."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", _filter((1.0, 3.0, 3.0, 1.0), channels) * 4)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        wide = F.conv_transpose2d(
            padded, self.filt.to(x.dtype), stride=2, padding=2, groups=x.shape[1]
        )
        return wide[:, :, 1:-1, 1:-1]


def _filter(taps: tuple[float, ...], channels: int) -> Tensor:
    line = tensor(taps) / sum(taps)
    return outer(line, line).repeat(channels, 1, 1, 1)


def _receptive_field(blocks: int, levels: int, antialias: bool) -> int:
    """Side of the square of input that can reach one output pixel, the worst phase counted.

    Counted backwards from the output: `reach` pixels to either side at the resolution at hand.
    """
    reach = 3  # last 7 x 7
    for _ in range(levels):  # to half the resolution
        reach = -(-(reach + 1) // 2) + (1 if antialias else 0)
    reach += 2 * blocks
    for _ in range(levels):  # to twice the resolution, then its 3 x 3 and blur
        reach = 2 * reach + (2 if antialias else 1)
    return 2 * (reach + 3) + 1  # first 7 x 7
