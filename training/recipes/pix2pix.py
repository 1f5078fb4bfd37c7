"""pix2pix (Isola 2017): a conditional GAN on paired images, L1 beside it.

Symbols of the paper: x source, y target, G generator, D discriminator. D first, then G.
"""

from collections.abc import Mapping

import torch
from torch import cat

from dicomnode.imaging.networks import Generator
from training.adversarial import (
    ImagePool,
    discriminator_loss,
    finite,
    generator_loss,
    gradient_penalty,
    initialise,
    require_grad,
    shares,
)
from training.recipes import Average, Batch, Parts, step_rng
from training.recipes.adversarial import (
    Adversarial,
    Run,
    Training,
    build_discriminator,
    judge,
    translate,
)
from training.recipes.descent import Descent


class Pix2Pix(Parts):
    """G and D, an optimiser for each."""

    def __init__(
        self,
        generator: Generator,
        settings: Adversarial,
        run: Run,
        channels: int = 1,
    ) -> None:
        """`channels`: of the source. The generator gets fresh weights."""
        self.settings, self.run = settings, run
        initialise(generator, step_rng(run.seed, 0), settings.initial_spread)
        self.generator = generator.train()
        self.average = Average(self.generator, settings.ema_decay)
        judged = channels + 1 if settings.discriminator.conditional else 1
        self.discriminator = build_discriminator(settings, judged, run.seed + 1)
        self.training = Training(settings, run.epoch_steps)
        self.optimizer_g = self.training.adam([self.generator])
        self.optimizer_d = self.training.adam([self.discriminator])
        self.pool = ImagePool(settings.pool)
        self.descent = Descent(run.precision, run.gradient_clip)
        super().__init__(
            generator=self.generator,
            average=self.average,
            discriminator=self.discriminator,
            optimizer_g=self.optimizer_g,
            optimizer_d=self.optimizer_d,
            pool=self.pool,
            descent=self.descent,
        )

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        s, draw = self.settings, step_rng(self.run.seed, step)
        self.training.set_rate([self.optimizer_g, self.optimizer_d], step)
        prediction = translate(
            self.generator, batch.source, residual=self.run.residual, precision=self.run.precision
        )

        # L_D = 1/2 [D(x, y) real + D(x, G(x)) fake]
        require_grad([self.discriminator], True)
        real = self._judged(batch, batch.target)
        fake = self.pool.exchange(self._judged(batch, prediction), draw)
        loss_d = discriminator_loss(s.gan, self._judge(real), self._judge(fake))
        if s.gan == "wgangp":
            at = shares(real, draw)
            loss_d = loss_d + gradient_penalty(self.discriminator, real, fake, at, s.penalty_weight)
        losses = finite({"discriminator": loss_d}, step)
        self.descent(loss_d, self.optimizer_d, [self.discriminator], step)

        # L_G = D(x, G(x)) real + lambda |y - G(x)|
        require_grad([self.discriminator], False)
        adversarial = generator_loss(s.gan, self._judge(self._judged(batch, prediction)))
        pixel = (batch.weight * (prediction - batch.target).abs()).mean()
        loss_g = s.adversarial_weight * adversarial + s.pixel_weight * pixel
        losses |= finite({"adversarial": adversarial, "pixel": pixel, "generator": loss_g}, step)
        self.descent(loss_g, self.optimizer_g, [self.generator], step)
        self.average.update(step)
        return losses

    def results(self) -> Mapping[str, Generator]:
        return {"forward": self.average.result()}

    def _judge(self, images: torch.Tensor) -> torch.Tensor:
        return judge(self.discriminator, images, self.run.precision)

    def _judged(self, batch: Batch, image: torch.Tensor) -> torch.Tensor:
        return cat([batch.source, image], 1) if self.settings.discriminator.conditional else image
