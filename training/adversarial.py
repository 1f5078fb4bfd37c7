"""What adversarial recipes share: discriminators, their losses, the image pool.

Images are (batch, channels, rows, columns), float32, in [-1, 1]; a discriminator answers with a map
of logits, one per patch. Names and numbers are those of pix2pix (Isola 2017) and CycleGAN (Zhu
2017); exact parameter counts are in tests/test_adversarial.py.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import processes
from training.errors import TrainingError

GanMode = Literal["vanilla", "lsgan", "wgangp", "hinge"]
Norm = Literal["instance", "batch", "none"]


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """A normalisation layer; instance normalisation has no parameters and no running statistics."""
    if norm == "instance":
        return nn.InstanceNorm2d(channels, affine=False, track_running_stats=False)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


class PatchDiscriminator(nn.Module):
    """PatchGAN: real or generated, for each patch (70 x 70 pixels with 3 layers).

    4x4 convolutions: stride 2 with 64, 128, ... channels (at most 512), then two of stride 1.
    A convolution before batch normalisation has no bias, as upstream.
    """

    def __init__(
        self, channels: int, *, width: int = 64, layers: int = 3, norm: Norm = "instance"
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        before = width
        for layer in range(1, layers + 1):
            after = width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            parts += [
                nn.Conv2d(before, after, 4, stride, 1, bias=norm != "batch"),
                norm_layer(norm, after),
                nn.LeakyReLU(0.2, True),
            ]
            before = after
        parts.append(nn.Conv2d(before, 1, 4, 1, 1))
        self.model = nn.Sequential(*parts)

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.model(images))


class PixelDiscriminator(nn.Module):
    """Judges each pixel alone (1x1 convolutions)."""

    def __init__(self, channels: int, *, width: int = 64, norm: Norm = "instance") -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(width, 2 * width, 1, bias=norm != "batch"),
            norm_layer(norm, 2 * width),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(2 * width, 1, 1, bias=norm != "batch"),
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.model(images))


@torch.no_grad()
def initialise(network: nn.Module, generator: torch.Generator, spread: float = 0.02) -> None:
    """Weights of convolutions from N(0, spread), biases 0, batch norm weights from N(1, spread).

    A spread of 0 leaves the network its own first weights.
    """
    if spread == 0:
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.normal_(0.0, spread, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.normal_(1.0, spread, generator=generator)
        else:
            continue
        if module.bias is not None:
            module.bias.zero_()


def generator_loss(mode: GanMode, judged: Tensor) -> Tensor:
    """What the generator wants: its images `judged` real. Mean over the map."""
    if mode in ("wgangp", "hinge"):
        return -judged.mean()
    return _distance(mode, judged, 1.0)


def discriminator_loss(mode: GanMode, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator wants: logits `real` real and `fake` not. Halved but for wgangp.

    wgangp is the Wasserstein estimate alone; add `gradient_penalty`.
    """
    if mode == "wgangp":
        return fake.mean() - real.mean()
    if mode == "hinge":
        return (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()) / 2
    return (_distance(mode, real, 1.0) + _distance(mode, fake, 0.0)) / 2


def _distance(mode: GanMode, logits: Tensor, label: float) -> Tensor:
    wanted = torch.full_like(logits, label)
    if mode == "lsgan":
        return F.mse_loss(logits, wanted)
    return F.binary_cross_entropy_with_logits(logits, wanted)


def gradient_penalty(
    discriminator: nn.Module, real: Tensor, fake: Tensor, share: Tensor, weight: float = 10.0
) -> Tensor:
    """weight * mean over samples of (|gradient| - 1)^2 between real and fake (Gulrajani 2017).

    The norm is over the whole sample; `share` (batch,) in [0, 1] says where between the two.
    """
    at = share.view(-1, *(1,) * (real.dim() - 1))
    between = (at * real + (1 - at) * fake).detach().requires_grad_(True)
    judged = discriminator(between)
    (slope,) = torch.autograd.grad(judged.sum(), between, create_graph=True)
    norm = torch.sqrt(slope.flatten(1).square().sum(1) + 1e-16)
    return weight * (norm - 1.0).square().mean()


class ImagePool:
    """Generated images for the discriminator, half of them from earlier steps (Shrivastava 2017).

    Until `size` images are held each is kept and given back; then with probability 1/2 a held one
    is given back and replaced. Its random numbers come from the caller. Several processes hold the
    same pool: that of the whole batch.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.images: list[Tensor] = []

    def exchange(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """(batch, ...) in, as many out, detached."""
        if self.size == 0:
            return images.detach()
        every = [self._one(image, draw) for image in processes.gather(images)]
        return processes.own_rows(torch.stack(every))

    def _one(self, image: Tensor, draw: torch.Generator) -> Tensor:
        if len(self.images) < self.size:
            self.images.append(image.clone())
            return image
        if torch.rand((), generator=draw) > 0.5:
            index = int(torch.randint(self.size, (), generator=draw))
            held = self.images[index].to(image.device)
            self.images[index] = image.clone()
            return held
        return image

    def state_dict(self) -> dict[str, Any]:
        return {"images": list(self.images)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.images = list(state["images"])


def linear_decay(step: int, steps_per_epoch: int, constant_epochs: int, decay_epochs: int) -> float:
    """Factor of the learning rate: 1, then down to nearly 0 in even steps, one per epoch.

    1 - max(0, epoch + 1 - constant) / (decay + 1), the rule of the pix2pix/CycleGAN code with
    epochs counted from 0.
    """
    epoch = step // steps_per_epoch
    return 1.0 - max(0, epoch + 1 - constant_epochs) / (decay_epochs + 1)


def require_grad(networks: Sequence[nn.Module], wanted: bool) -> None:
    """Whether the weights of these networks take part in the next backward pass."""
    for network in networks:
        for weight in network.parameters():
            weight.requires_grad_(wanted)


def shares(images: Tensor, draw: torch.Generator) -> Tensor:
    """A random number in [0, 1) for each image, (batch,); see `gradient_penalty`."""
    whole = torch.rand(len(images) * processes.count(), generator=draw)
    return processes.own_rows(whole).to(images.device)


def finite(losses: Mapping[str, Tensor], step: int) -> dict[str, float]:
    """The losses as numbers, each the mean over all processes.

    Raises:
        TrainingError: one is not finite; nothing has been changed by it yet.
    """
    values = processes.mean_([torch.stack([loss.detach().float() for loss in losses.values()])])
    numbers = dict(zip(losses, values[0].tolist(), strict=True))
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise TrainingError(
                f"step {step}: the loss {name} is not finite; lower the learning rate"
            )
    return numbers
