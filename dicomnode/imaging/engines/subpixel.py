"""Transposed convolutions rewritten as convolutions; those of stride two with a pixel shuffle.

The same numbers in the same places; OpenVINO runs a convolution in bf16 several times as fast as a
transposed one (research figure for U-Net-256: 0.168 s -> 0.044 s). And both engines choose the
kernel of a transposed one by the size of the slice, so that a tile differed from the whole in the
last bit; of convolutions it does not.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicomnode.imaging.networks import Generator


def without_transposed(generator: Generator) -> Generator:
    """A copy of `generator` without transposed convolutions of stride one or two."""
    changed = copy.deepcopy(generator)
    for module in list(changed.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ConvTranspose2d) and child.groups == 1:
                if _doubles(child):
                    setattr(module, name, SubPixel(child))
                elif _keeps_steps(child):
                    setattr(module, name, _turned(child))
    return changed


def _doubles(layer: nn.ConvTranspose2d) -> bool:
    """Twice the size with 3 or 4 taps, as ResNet and U-Net have it."""
    kinds = {((3, 3), (1, 1)), ((4, 4), (0, 0))}
    doubling = layer.stride == (2, 2) and layer.padding == (1, 1) and layer.dilation == (1, 1)
    return doubling and (layer.kernel_size, layer.output_padding) in kinds


def _keeps_steps(layer: nn.ConvTranspose2d) -> bool:
    """Stride one, as RED-CNN has it."""
    return (layer.stride, layer.dilation, layer.output_padding) == ((1, 1), (1, 1), (0, 0))


def _turned(layer: nn.ConvTranspose2d) -> nn.Conv2d:
    """A transposed convolution of stride one: a convolution with its taps turned half round."""
    taps = (layer.kernel_size[0], layer.kernel_size[1])
    padding = (taps[0] - 1 - int(layer.padding[0]), taps[1] - 1 - int(layer.padding[1]))
    inputs, outputs, bias = layer.in_channels, layer.out_channels, layer.bias
    made = nn.Conv2d(inputs, outputs, taps, padding=padding, bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(layer.weight.flip(2, 3).transpose(0, 1))
        if bias is not None and made.bias is not None:
            made.bias.copy_(bias)
    return made.requires_grad_(False)


class SubPixel(nn.Module):
    """What a transposed convolution of stride two, padding one and 3 or 4 taps computes.

    Output pixel 2i + phase sees input pixels i - 1, i, i + 1 through the taps k with
    2 * (i + offset) - 1 + k = 2i + phase.
    """

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        taps = layer.kernel_size[0]
        inputs, outputs = layer.in_channels, layer.out_channels
        weight = torch.zeros(outputs, 2, 2, inputs, 3, 3)
        source = layer.weight.detach()
        for row, column, down, right in _places():
            k, m = row + 1 - 2 * down, column + 1 - 2 * right
            if 0 <= k < taps and 0 <= m < taps:
                weight[:, row, column, :, down + 1, right + 1] = source[:, :, k, m].T
        self.spread = nn.Conv2d(inputs, 4 * outputs, 3, padding=1, bias=layer.bias is not None)
        with torch.no_grad():
            self.spread.weight.copy_(weight.reshape(4 * outputs, inputs, 3, 3))
            if layer.bias is not None and self.spread.bias is not None:
                self.spread.bias.copy_(layer.bias.repeat_interleave(4))
        self.spread.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.spread(x), 2)


def _places() -> list[tuple[int, int, int, int]]:
    """Phases of the output in both directions, offsets of the input in both directions."""
    near = (-1, 0, 1)
    return [(r, c, d, e) for r in (0, 1) for c in (0, 1) for d in near for e in near]
