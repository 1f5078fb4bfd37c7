"""Supervised residual denoising: the generator learns the noise of paired images, without a GAN.

The optimum of this loss is the mean of the full-dose images that fit the input: it invents no
texture, and is the baseline that every adversarial recipe must beat. Where a known detail was put
in, errors count more, which is the same as saying that details are more frequent than the
training images show: the network errs on the side of keeping them.
"""

from collections.abc import Mapping

import torch

from dicomnode.imaging.networks import Generator
from training.adversarial import finite
from training.losses import charbonnier, local_bias, texture
from training.recipes import Average, Batch, Parts
from training.recipes.adversarial import translate
from training.recipes.descent import Descent
from training.recipes.optimisation import Optimisation

WARM_UP_STEPS = 200


class Supervised(Parts):
    """Adam, cosine learning rate, running mean of the weights."""

    def __init__(
        self,
        generator: Generator,
        settings: Optimisation,
        hu_per_unit: float,
        *,
        residual: bool = True,
    ) -> None:
        """`hu_per_unit`: what one unit of the network stands for, HU (or the target's unit)."""
        self.generator = generator.train()
        self.average = Average(self.generator, settings.ema_decay)
        self.settings = settings
        self.hu_per_unit, self.residual = hu_per_unit, residual
        self.optimizer = torch.optim.Adam(
            generator.parameters(), lr=settings.learning_rate, fused=True
        )
        self.descent = Descent(settings.precision, settings.gradient_clip)
        super().__init__(
            generator=self.generator,
            average=self.average,
            optimizer=self.optimizer,
            descent=self.descent,
        )

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        self.optimizer.param_groups[0]["lr"] = self._learning_rate(step)
        prediction = translate(
            self.generator,
            batch.source,
            residual=self.residual,
            precision=self.settings.precision,
        )
        error_hu = (prediction - batch.target) * self.hu_per_unit
        fidelity = charbonnier(error_hu, self.settings.charbonnier_hu, batch.weight)
        bias = local_bias(error_hu)
        loss = fidelity + self.settings.bias_weight * bias
        parts = {"fidelity_hu": fidelity, "bias_hu": bias}
        if self.settings.texture_weight > 0:
            target_hu = batch.target * self.hu_per_unit
            parts["texture_hu"] = texture(error_hu + target_hu, target_hu)
            loss = loss + self.settings.texture_weight * parts["texture_hu"]
        losses = finite(parts, step)
        self.descent(loss, self.optimizer, [self.generator], step)
        self.average.update(step)
        return losses

    def results(self) -> Mapping[str, Generator]:
        return {"forward": self.average.result()}

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to the final rate."""
        if step < WARM_UP_STEPS:
            return self.settings.learning_rate * (step + 1) / WARM_UP_STEPS
        done = (step - WARM_UP_STEPS) / max(1, self.settings.steps - WARM_UP_STEPS)
        return self.settings.half_cosine(min(done, 1.0))
