"""CycleGAN (Zhu 2017) on unpaired images of two kinds, A and B; scCycleGAN with a structure loss.

G_AB makes B of A, G_BA the way back; D_A and D_B judge. G first, then D. With `structure: mind` the
prediction must have its source's structure (Yang 2018).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

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
from training.structure import mind_loss


class CycleGan(Parts):
    """Two generators, two discriminators, one optimiser for each pair."""

    def __init__(
        self,
        forward: Generator,
        backward_: Generator,
        settings: Adversarial,
        run: Run,
    ) -> None:
        """`forward` is G_AB, `backward_` is G_BA; both get fresh weights."""
        self.settings, self.run = settings, run
        initialise(forward, step_rng(run.seed, 0), settings.initial_spread)
        initialise(backward_, step_rng(run.seed, 1), settings.initial_spread)
        self.g_ab, self.g_ba = forward.train(), backward_.train()
        self.average_ab = Average(self.g_ab, settings.ema_decay)
        self.average_ba = Average(self.g_ba, settings.ema_decay)
        self.d_a = build_discriminator(settings, 1, run.seed + 1)
        self.d_b = build_discriminator(settings, 1, run.seed + 2)
        self.training = Training(settings, run.epoch_steps)
        self.optimizer_g = self.training.adam([self.g_ab, self.g_ba])
        self.optimizer_d = self.training.adam([self.d_a, self.d_b])
        self.pool_a, self.pool_b = ImagePool(settings.pool), ImagePool(settings.pool)
        self.descent = Descent(run.precision, run.gradient_clip)
        super().__init__(
            g_ab=self.g_ab,
            g_ba=self.g_ba,
            average_ab=self.average_ab,
            average_ba=self.average_ba,
            d_a=self.d_a,
            d_b=self.d_b,
            optimizer_g=self.optimizer_g,
            optimizer_d=self.optimizer_d,
            pool_a=self.pool_a,
            pool_b=self.pool_b,
            descent=self.descent,
        )

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        draw = step_rng(self.run.seed, step)
        self.training.set_rate([self.optimizer_g, self.optimizer_d], step)
        a, b = batch.source, batch.target
        fake_b, fake_a = self._translate(self.g_ab, a), self._translate(self.g_ba, b)

        require_grad([self.d_a, self.d_b], False)
        terms = self._generator_terms(a, b, fake_a, fake_b)
        losses = finite(terms, step)
        loss_g = torch.stack(list(terms.values())).sum()
        self.descent(loss_g, self.optimizer_g, [self.g_ab, self.g_ba], step)

        require_grad([self.d_a, self.d_b], True)
        loss_a = self._critic(self.d_a, a, self.pool_a.exchange(fake_a, draw), draw)
        loss_b = self._critic(self.d_b, b, self.pool_b.exchange(fake_b, draw), draw)
        losses |= finite({"discriminator_a": loss_a, "discriminator_b": loss_b}, step)
        self.descent(loss_a + loss_b, self.optimizer_d, [self.d_a, self.d_b], step)
        for average in (self.average_ab, self.average_ba):
            average.update(step)
        return losses

    def results(self) -> Mapping[str, Generator]:
        return {"forward": self.average_ab.result(), "backward": self.average_ba.result()}

    def _translate(self, generator: Generator, image: Tensor) -> Tensor:
        return translate(generator, image, residual=self.run.residual, precision=self.run.precision)

    def _generator_terms(
        self, a: Tensor, b: Tensor, fake_a: Tensor, fake_b: Tensor
    ) -> dict[str, Tensor]:
        """Every term of L_G, weighted."""
        s = self.settings
        adversarial = generator_loss(s.gan, self._judge(self.d_b, fake_b)) + generator_loss(
            s.gan, self._judge(self.d_a, fake_a)
        )
        cycle = (self._translate(self.g_ba, fake_b) - a).abs().mean() + (
            self._translate(self.g_ab, fake_a) - b
        ).abs().mean()
        terms = {
            "adversarial": s.adversarial_weight * adversarial,
            "cycle": s.cycle_weight * cycle,
        }
        if s.identity_weight > 0:
            same = (self._translate(self.g_ab, b) - b).abs().mean() + (
                self._translate(self.g_ba, a) - a
            ).abs().mean()
            terms["identity"] = s.cycle_weight * s.identity_weight * same
        if s.structure == "mind":
            alike = mind_loss(a, fake_b) + mind_loss(b, fake_a)
            terms["structure"] = s.structure_weight * alike
        return terms

    def _judge(self, discriminator: nn.Module, images: Tensor) -> Tensor:
        return judge(discriminator, images, self.run.precision)

    def _critic(
        self, discriminator: nn.Module, real: Tensor, fake: Tensor, draw: torch.Generator
    ) -> Tensor:
        """What D_A or D_B goes down."""
        s = self.settings
        loss = discriminator_loss(
            s.gan, self._judge(discriminator, real), self._judge(discriminator, fake)
        )
        if s.gan == "wgangp":
            at = shares(real, draw)
            loss = loss + gradient_penalty(discriminator, real, fake, at, s.penalty_weight)
        return loss
