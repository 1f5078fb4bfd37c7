"""Losses on structure: spatially-correlative maps (Zheng 2021, APS) and MIND (Heinrich 2012).

Both compare where things are, not how bright they are, so that source and prediction may be of two
modalities. Images are (batch, 1, rows, columns), float32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from training.errors import TrainingError

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512)
"""Channels of the convolutions up to relu4_3; M: 2 x 2 maximum (Simonyan 2014, D)."""
RELUS = (4, 7, 9)
"""Which of its rectifiers are looked at: relu3_1, relu4_1, relu4_3."""
QUERIES, WINDOW = 256, 64


class Vgg16(nn.Module):
    """The first layers of VGG-16 for one channel, with torchvision's names of weights.

    Without a file of weights they stay random: a fixed, untrained bank of filters. `width` divides
    the channels, for small machines; weights from elsewhere need 1.
    """

    def __init__(self, weights: Path | None = None, *, divide: int = 1) -> None:
        """`weights`: a .safetensors of VGG-16; its first layer is averaged over the colours.

        Raises:
            TrainingError: the file is not one.
        """
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for channels in VGG16:
            if isinstance(channels, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(before, channels // divide, 3, padding=1), nn.ReLU()]
            before = channels // divide
        self.features = nn.Sequential(*layers)
        if weights is not None:
            self._load(weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps of RELUS, (batch, channels, rows / 4 or 8, columns / 4 or 8)."""
        maps, rectifier = [], -1
        for layer in self.features:
            images = layer(images)
            if isinstance(layer, nn.ReLU):
                rectifier += 1
                if rectifier in RELUS:
                    maps.append(images)
        return maps

    def channels(self) -> list[int]:
        """Channels of each map."""
        every = [layer.out_channels for layer in self.features if isinstance(layer, nn.Conv2d)]
        return [every[index] for index in RELUS]

    def _load(self, weights: Path) -> None:
        try:
            found = load_file(weights)
            first = found["features.0.weight"]
            found["features.0.weight"] = first.mean(1, keepdim=True) * first.shape[1]
            wanted = self.state_dict()
            self.load_state_dict({name: found[name] for name in wanted})
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise TrainingError(f"{weights}: not the weights of VGG-16: {error!r}") from error


class Correlation(NamedTuple):
    """Similarity of each query to its window, of two images, (batch, queries, positions)."""

    source: Tensor
    target: Tensor


class SpatialCorrelation(nn.Module):
    """Spatially-correlative maps of feature maps, each through two 1x1 convolutions."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(count, max(32, count // 4), 1),
                nn.ReLU(),
                nn.Conv2d(max(32, count // 4), max(32, count // 4), 1),
            )
            for count in channels
        )

    def forward(
        self, source: Sequence[Tensor], target: Sequence[Tensor], draw: torch.Generator
    ) -> list[Correlation]:
        """The maps of both at the same random queries, one pair per feature map."""
        pairs = []
        for head, ours, theirs in zip(self.heads, source, target, strict=True):
            rows, columns = ours.shape[-2:]
            queries = torch.randperm(rows * columns, generator=draw)[:QUERIES].to(ours.device)
            pairs.append(
                Correlation(
                    correlative_map(head(ours), queries), correlative_map(head(theirs), queries)
                )
            )
        return pairs


def correlative_map(features: Tensor, queries: Tensor, window: int = WINDOW) -> Tensor:
    """Cosine similarity of the features at `queries` to those of the window around each.

    One product of matrices and one gather for all queries: 25 times faster than a loop over them.

    Args:
        features: (batch, channels, rows, columns).
        queries: flat positions, row * columns + column.
        window: side; the window is moved inside at the border, and is the whole map if that is
            smaller.

    Returns:
        (batch, queries, positions), in [-1, 1].
    """
    rows, columns = features.shape[-2:]
    centred = features - features.mean((2, 3), keepdim=True)
    flat = F.normalize(centred, dim=1).flatten(2)
    every = flat[:, :, queries].transpose(1, 2) @ flat
    height, width = min(window, rows), min(window, columns)
    row = torch.div(queries, columns, rounding_mode="floor")
    top = (row - height // 2).clamp(0, rows - height)
    left = (queries % columns - width // 2).clamp(0, columns - width)
    down = torch.arange(height, device=queries.device)
    across = torch.arange(width, device=queries.device)
    at = (top[:, None, None] + down[:, None]) * columns + left[:, None, None] + across
    return every.gather(2, at.flatten(1).expand(len(every), -1, -1))


def structure_loss(pairs: Sequence[Correlation]) -> Tensor:
    """1 - cosine of the two maps, over the quarter of positions most alike in the target."""
    return torch.stack([_unlike(pair) for pair in pairs]).mean()


def _unlike(pair: Correlation) -> Tensor:
    keep = max(1, pair.target.shape[-1] // 4)
    bound = pair.target.detach().topk(keep, dim=-1).values[..., -1:]
    kept = (pair.target >= bound).to(pair.target.dtype)
    return (1.0 - F.cosine_similarity(pair.source * kept, pair.target * kept, dim=-1)).abs().mean()


def contrast_loss(
    pairs: Sequence[Correlation], others: Sequence[Tensor], temperature: float = 0.1
) -> Tensor:
    """InfoNCE for the encoder: a query's map is that of the same place, not of any other.

    Args:
        others: maps of another image at the same queries, further wrong answers.
    """
    losses = []
    for pair, other in zip(pairs, others, strict=True):
        ours, theirs = F.normalize(pair.source, dim=-1), F.normalize(pair.target, dim=-1)
        wrong = F.normalize(other, dim=-1)
        alike = torch.cat([ours @ theirs.transpose(1, 2), ours @ wrong.transpose(1, 2)], dim=2)
        right = torch.arange(ours.shape[1], device=ours.device).expand(len(ours), -1)
        losses.append(F.cross_entropy((alike / temperature).flatten(0, 1), right.flatten()))
    return torch.stack(losses).mean()


def mind(images: Tensor, radius: int = 1, spread: float = 1.0) -> Tensor:
    """Modality-independent neighbourhood descriptor, (batch, neighbours, rows, columns), in (0, 1].

    exp(-D / V): D the Gaussian-weighted squared difference of the patches around a pixel and its
    neighbour, V its mean over the four nearest. Brightness and contrast cancel.

    Args:
        radius: neighbours are those up to this far, in pixels.
        spread: standard deviation of the patch weights, pixels.
    """
    reach = range(-radius, radius + 1)
    places = [(down, across) for down in reach for across in reach if (down, across) != (0, 0)]
    distance = torch.cat([_patch_distance(images, place, spread) for place in places], dim=1)
    nearest = [places.index(place) for place in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    variance = distance[:, nearest].mean(1, keepdim=True)
    level = variance.mean((2, 3), keepdim=True)
    variance = torch.clamp(variance, min=1e-3 * level.detach()) + 1e-12
    descriptor = torch.exp(-distance / variance)
    return descriptor / descriptor.amax(1, keepdim=True).clamp_min(1e-12)


def mind_loss(source: Tensor, prediction: Tensor) -> Tensor:
    """Mean absolute difference of the descriptors of two images of any modality."""
    return (mind(source) - mind(prediction)).abs().mean()


def _patch_distance(images: Tensor, place: tuple[int, int], spread: float) -> Tensor:
    half = max(1, round(2 * spread))
    down, across = place
    rows, columns = images.shape[-2:]
    edge = max(abs(down), abs(across))
    wide = F.pad(images, (edge,) * 4, mode="replicate")
    top, left = edge + down, edge + across
    moved = wide[..., top : top + rows, left : left + columns]
    at = torch.arange(-half, half + 1, device=images.device, dtype=images.dtype)
    bell = torch.exp(-(at**2) / (2 * spread**2))
    bell = bell / bell.sum()
    squared = F.pad((images - moved) ** 2, (half,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(squared, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))


PixelWeight = Literal["aps", "uniform", "inverse"]


@torch.no_grad()
def pixel_weight(judged: Tensor, size: tuple[int, int], kind: PixelWeight) -> Tensor:
    """Weight of each pixel's error in APS, (batch, 1, rows, columns), in [0, 1].

    aps: where the discriminator believes the image, scaled to [0, 1] per sample as published;
    inverse: where it does not; uniform: 1. A map without any difference weighs 1 everywhere,
    where the published code divides by zero.
    """
    if kind == "uniform":
        return judged.new_ones(len(judged), 1, *size)
    believed = F.interpolate(F.relu(judged), size, mode="bilinear", align_corners=False)
    low, high = believed.amin((1, 2, 3), keepdim=True), believed.amax((1, 2, 3), keepdim=True)
    weight = (believed - low) / (high - low).clamp_min(1e-8)
    if kind == "inverse":
        weight = 1.0 - weight
    differs = high - low > 1e-5 * high  # more than rounding of the interpolation
    return torch.where(differs, weight, torch.ones_like(weight))
