"""DenseNet (Huang et al. 2017, arXiv:1608.06993), a classifier of images.

State keys are torchvision's (`features.denseblock1.denselayer1.norm1.weight`), so weights that were
published for `densenet121` load as they are.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dicomnode.imaging.networks.base import Classifier, check

_BOTTLENECK = 4
"""A layer's 1 x 1 convolution gives this many times `growth` channels (DenseNet-B)."""
MOST_LAYERS = 64
"""Of one block; the largest published network has 48."""


class _Layer(nn.Module):
    """BN, ReLU, 1 x 1; BN, ReLU, 3 x 3: `growth` new channels, put beside those that came in."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        inner = _BOTTLENECK * growth
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, new], 1)


def _block(channels: int, layers: int, growth: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            (f"denselayer{layer + 1}", _Layer(channels + layer * growth, growth))
            for layer in range(layers)
        )
    )


def _transition(channels: int) -> nn.Sequential:
    """Between blocks: half the channels, half the rows and columns."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )


class DenseNet(Classifier):
    """Blocks of densely connected layers, halved in between; logits of the mean over all places.

    Args:
        classes: how many.
        channels: of the image; torchvision's weights want 3.
        blocks: layers of each block; (6, 12, 24, 16) is DenseNet-121.
        growth: channels that a layer adds.
        width: channels of the first convolution; torchvision's DenseNet-121 has 64.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        blocks: Sequence[int] = (6, 12, 24, 16),
        growth: int = 32,
        width: int = 64,
    ) -> None:
        check(1 <= len(blocks) <= 6, "blocks: from 1 to 6")
        check(all(1 <= layers <= MOST_LAYERS for layers in blocks), f"blocks: 1 to {MOST_LAYERS}")
        check(1 <= growth <= 128 and 1 <= width <= 512, "growth: 1 to 128; width: 1 to 512")
        super().__init__(classes, channels)
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False),
            norm0=nn.BatchNorm2d(width),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.smallest = 2 ** (len(blocks) + 1)
        for number, layers in enumerate(blocks, 1):
            parts[f"denseblock{number}"] = _block(width, layers, growth)
            width += layers * growth
            if number < len(blocks):
                parts[f"transition{number}"] = _transition(width)
                width //= 2
        parts["norm5"] = nn.BatchNorm2d(width)  # by that name whatever the number of blocks
        self.features = nn.Sequential(parts)
        self.classifier = nn.Linear(width, classes)
        self._first_weights()

    def _first_weights(self) -> None:
        """As the paper and torchvision begin: He for convolutions, no bias of the last layer."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(F.relu(self.features(x)).mean((2, 3)))
        return result


class Brightness(Classifier):
    """A logit of each class is weight x mean of the image + bias. No trained model: it can only
    tell bright images from dark ones, and is there to test what goes on around a classifier."""

    def __init__(self, classes: int, channels: int = 1) -> None:
        super().__init__(classes, channels)
        self.classifier = nn.Linear(1, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(x.mean((1, 2, 3))[:, None])
        return result
