"""GAN-CIRCLE (You 2020): Wasserstein CycleGAN with gradient penalty for low-dose CT.

A is low dose, B full dose. Terms: Wasserstein with penalty, cycle, identity and the joint
sparsifying transform, weights 1, 1, 0.5 and 0.001. The penalty here is that of Gulrajani: the norm
over a whole sample, between images of one kind; the released code has neither.
"""

import torch
from torch import Tensor

from dicomnode.errors import ConfigError
from dicomnode.imaging.networks import Generator
from training.recipes.adversarial import Adversarial, Run
from training.recipes.cyclegan import CycleGan

IMAGE_SHARE, DIFFERENCE_SHARE = 0.1, 0.9


class GanCircle(CycleGan):
    """CycleGan with the sparsifying term."""

    def __init__(
        self,
        forward: Generator,
        backward_: Generator,
        settings: Adversarial,
        run: Run,
    ) -> None:
        """As CycleGan.

        Raises:
            ConfigError: `gan` is not wgangp.
        """
        if settings.gan != "wgangp":
            raise ConfigError("adversarial.gan: gan_circle is defined with wgangp")
        super().__init__(
            forward,
            backward_,
            settings,
            run,
        )

    def _generator_terms(
        self, a: Tensor, b: Tensor, fake_a: Tensor, fake_b: Tensor
    ) -> dict[str, Tensor]:
        terms = super()._generator_terms(a, b, fake_a, fake_b)
        sparse = _sparsifying(a, fake_b) + _sparsifying(b, fake_a)
        return terms | {"sparsity": self.settings.sparsity_weight * sparse}


def _sparsifying(source: Tensor, prediction: Tensor) -> Tensor:
    """tau TV(G(x)) + (1 - tau) TV(x - G(x)), tau = 0.1."""
    difference = source - prediction
    return IMAGE_SHARE * total_variation(prediction) + DIFFERENCE_SHARE * total_variation(
        difference
    )


def total_variation(images: Tensor) -> Tensor:
    """Mean over the batch of the sum of |differences| of neighbours, (batch, 1, rows, columns)."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().sum((1, 2, 3))
    across = (images[..., :, 1:] - images[..., :, :-1]).abs().sum((1, 2, 3))
    return torch.mean(down + across)
