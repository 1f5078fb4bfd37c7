"""What the recipes with a discriminator share: settings, optimisers, rates, translation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dicomnode.imaging.networks import Generator
from training.adversarial import (
    GanMode,
    Norm,
    PatchDiscriminator,
    PixelDiscriminator,
    initialise,
    linear_decay,
)
from training.recipes.descent import Precision, autocast


@dataclass(frozen=True, slots=True)
class Discriminator:
    """Which discriminator."""

    kind: Literal["patch", "pixel"] = "patch"
    width: int = 64
    layers: int = 3
    """Of a patch discriminator; 3 judges patches of 70 x 70 pixels."""
    norm: Norm = "instance"
    conditional: bool = False
    """Judge source and image together (pix2pix)."""

    @property
    def least_patch(self) -> int:
        """Pixels of a side from which on its last map has more than one value."""
        return 3 * 2**self.layers if self.kind == "patch" else 1


@dataclass(frozen=True, slots=True)
class Adversarial:
    """Settings of the recipes with a discriminator; the defaults are CycleGAN's."""

    gan: GanMode = "lsgan"
    discriminator: Discriminator = Discriminator()
    learning_rate: float = 2e-4
    beta1: float = 0.5
    beta2: float = 0.999
    epoch_steps: int = 0
    """Steps that count as one epoch; 0: as many as bring each slice once."""
    constant_epochs: int = 100
    decay_epochs: int = 100
    """Then so many epochs down to nearly no learning rate, in even steps."""
    adversarial_weight: float = 1.0
    pixel_weight: float = 100.0
    """Mean absolute error in [-1, 1] (pix2pix, APS)."""
    cycle_weight: float = 10.0
    identity_weight: float = 0.5
    """Of what the generator makes of an image that is of the target's kind; times cycle_weight."""
    structure: Literal["none", "sc_map", "mind"] = "none"
    structure_weight: float = 10.0
    structure_features: str = "random"
    """random, or the path of a .safetensors with VGG-16's weights; for sc_map."""
    structure_divide: int = 1
    """Divides the channels of those features, for small machines; 1 with weights."""
    structure_temperature: float = 0.1
    pixel_map: Literal["aps", "uniform", "inverse"] = "aps"
    """How APS weights the error of a pixel by the discriminator's opinion."""
    sparsity_weight: float = 0.001
    """Joint sparsifying transform of GAN-CIRCLE: total variation of image and of difference."""
    penalty_weight: float = 10.0
    """Gradient penalty of wgangp."""
    critic_steps: int = 1
    """Discriminator steps per generator step."""
    pool: int = 50
    """Generated images that are kept for the discriminator; 0: none."""
    ema_decay: float = 0.0
    """The package holds this running mean of the weights; 0: the weights themselves."""
    initial_spread: float = 0.02
    """Standard deviation of the first weights; 0: the architecture's own."""


@dataclass(frozen=True, slots=True)
class Run:
    """What of a run's configuration every recipe takes."""

    seed: int
    residual: bool
    """The generator gives the difference to its source."""
    epoch_steps: int = 1
    """Steps that bring every training slice once."""
    precision: Precision = "fp32"
    gradient_clip: float = 0.0
    """Largest norm of a gradient; 0: any."""


class Training:
    """Optimisers and their learning rate over the steps of a run."""

    def __init__(self, settings: Adversarial, epoch_steps: int) -> None:
        self.settings = settings
        self.epoch_steps = settings.epoch_steps or max(1, epoch_steps)

    def adam(self, networks: Iterable[nn.Module]) -> torch.optim.Adam:
        """One optimiser over the weights of all of them; fused: one pass over them per step."""
        weights = [weight for network in networks for weight in network.parameters()]
        betas = (self.settings.beta1, self.settings.beta2)
        return torch.optim.Adam(weights, lr=self.settings.learning_rate, betas=betas, fused=True)

    def set_rate(self, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
        s = self.settings
        factor = linear_decay(step, self.epoch_steps, s.constant_epochs, s.decay_epochs)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = s.learning_rate * max(factor, 0.0)


def build_discriminator(settings: Adversarial, channels: int, seed: int) -> nn.Module:
    """A discriminator with fresh weights; `channels` of the image it judges, source included."""
    spec = settings.discriminator
    network: nn.Module = (
        PixelDiscriminator(channels, width=spec.width, norm=spec.norm)
        if spec.kind == "pixel"
        else PatchDiscriminator(channels, width=spec.width, layers=spec.layers, norm=spec.norm)
    )
    initialise(network, torch.Generator().manual_seed(seed), settings.initial_spread)
    return network.train()


def judge(discriminator: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    """The map of logits, float32."""
    with autocast(precision, images):
        judged = discriminator(images)
    return torch.as_tensor(judged).float()


def translate(
    generator: Generator, source: Tensor, *, residual: bool, precision: Precision
) -> Tensor:
    """The prediction for `source`, float32; with `residual` the generator gives the difference.

    The middle channel of several (neighbouring slices) is the slice that is predicted.
    """
    with autocast(precision, source):
        made = generator(source)
    made = torch.as_tensor(made).float()
    middle = source.shape[1] // 2
    return source[:, middle : middle + 1] + made if residual else made
