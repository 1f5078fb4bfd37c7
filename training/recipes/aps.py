"""APS (Ang 2022): adversarial, pixel and structural loss on paired images, one way, no cycle.

Its repository (paul-ang/aps-deep-learning-framework) is where the MR-CT paper's weights 1/100/10
and learning rate come from. Order of a step: structure encoder SE, discriminator D, generator G.
Different from it on purpose: a flat map of D weighs every pixel 1 instead of dividing by zero, the
encoder's wrong answers are shuffled instead of flipped (any batch size), and values are those of
the fixed window, so that HU come out at inference.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dicomnode.errors import ConfigError
from dicomnode.imaging.networks import Generator
from training.adversarial import (
    ImagePool,
    discriminator_loss,
    finite,
    generator_loss,
    initialise,
    require_grad,
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
from training.structure import (
    SpatialCorrelation,
    Vgg16,
    contrast_loss,
    mind_loss,
    pixel_weight,
    structure_loss,
)


class Aps(Parts):
    """G, D and the structure encoder SE."""

    def __init__(
        self,
        generator: Generator,
        settings: Adversarial,
        run: Run,
    ) -> None:
        """The generator gets fresh weights.

        Raises:
            ConfigError: the gradient penalty is asked for, which this method does not have.
        """
        if settings.gan == "wgangp":
            raise ConfigError("adversarial.gan: wgangp is not for aps; take lsgan or vanilla")
        self.settings, self.run = settings, run
        initialise(generator, step_rng(run.seed, 0), settings.initial_spread)
        self.generator = generator.train()
        self.average = Average(self.generator, settings.ema_decay)
        self.discriminator = build_discriminator(settings, 1, run.seed + 1)
        file = settings.structure_features
        weights = None if file == "random" else Path(file)
        step_rng(run.seed, 2)  # the encoder's first weights
        self.features = Vgg16(weights, divide=settings.structure_divide)
        self.correlation = SpatialCorrelation(self.features.channels())
        self.training = Training(settings, run.epoch_steps)
        self.optimizer_g = self.training.adam([self.generator])
        self.optimizer_d = self.training.adam([self.discriminator])
        self.optimizer_s = self.training.adam([self.features, self.correlation])
        self.pool = ImagePool(settings.pool)
        self.descent = Descent(run.precision, run.gradient_clip)
        super().__init__(
            generator=self.generator,
            average=self.average,
            discriminator=self.discriminator,
            features=self.features,
            correlation=self.correlation,
            optimizer_g=self.optimizer_g,
            optimizer_d=self.optimizer_d,
            optimizer_s=self.optimizer_s,
            pool=self.pool,
            descent=self.descent,
        )

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        s, draw = self.settings, step_rng(self.run.seed, step)
        self.training.set_rate([self.optimizer_g, self.optimizer_d, self.optimizer_s], step)
        prediction = translate(
            self.generator, batch.source, residual=self.run.residual, precision=self.run.precision
        )
        middle = batch.source.shape[1] // 2
        source = batch.source[:, middle : middle + 1]
        losses: dict[str, float] = {}
        if s.structure == "sc_map":
            losses |= self._encoder_step(source, prediction.detach(), batch.target, draw, step)

        # L_D = 1/2 [(D(y) - 1)^2 + D(G(x))^2]
        require_grad([self.discriminator], True)
        fake = self.pool.exchange(prediction, draw)
        loss_d = discriminator_loss(s.gan, self._judge(batch.target), self._judge(fake))
        losses |= finite({"discriminator": loss_d}, step)
        self.descent(loss_d, self.optimizer_d, [self.discriminator], step)

        # L_G = L_adv + 100 L_pix + 10 L_str
        require_grad([self.discriminator, self.features, self.correlation], False)
        judged = self._judge(prediction)
        rows, columns = prediction.shape[-2:]
        weight = batch.weight * pixel_weight(judged, (rows, columns), s.pixel_map)
        terms = {
            "adversarial": s.adversarial_weight * generator_loss(s.gan, judged),
            "pixel": s.pixel_weight * (weight * (prediction - batch.target).abs()).mean(),
        }
        if s.structure == "sc_map":
            pairs = self.correlation(self.features(source), self.features(prediction), draw)
            terms["structure"] = s.structure_weight * structure_loss(pairs)
        elif s.structure == "mind":
            terms["structure"] = s.structure_weight * mind_loss(source, prediction)
        losses |= finite(terms, step)
        loss_g = torch.stack(list(terms.values())).sum()
        self.descent(loss_g, self.optimizer_g, [self.generator], step)
        self.average.update(step)
        return losses

    def results(self) -> Mapping[str, Generator]:
        return {"forward": self.average.result()}

    def _judge(self, images: Tensor) -> Tensor:
        return judge(self.discriminator, images, self.run.precision)

    def _encoder_step(
        self, source: Tensor, prediction: Tensor, target: Tensor, draw: torch.Generator, step: int
    ) -> dict[str, float]:
        """x = [source, source], y = [prediction, target]: their maps of one place are alike."""
        encoder = [self.features, self.correlation]
        require_grad(encoder, True)
        ours = self.features(torch.cat([source, source]))
        theirs = self.features(torch.cat([prediction, target]))
        pairs = self.correlation(ours, theirs, draw)
        others = [pair.target[torch.randperm(len(pair.target), generator=draw)] for pair in pairs]
        others = [other.roll(1, 1) for other in others]  # another query, whatever the shuffle
        loss = contrast_loss(pairs, others, self.settings.structure_temperature)
        losses = finite({"encoder": loss}, step)
        self.descent(loss, self.optimizer_s, encoder, step)
        return losses
