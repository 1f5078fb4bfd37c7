"""Supervised residual denoising: the generator learns the noise of paired images, without a GAN.

The optimum of this loss is the mean of the full-dose images that fit the input: it invents no
texture, and is the baseline that every adversarial recipe must beat. Where a known detail was put
in, errors count more, which is the same as saying that details are more frequent than the
training images show: the network errs on the side of keeping them.
"""

import math
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from dicomnode.imaging.networks import Generator
from training.config import Optimisation
from training.errors import TrainingError
from training.losses import charbonnier, local_bias
from training.recipes import Batch

WARM_UP_STEPS = 200


class Supervised:
    """Adam, cosine learning rate, running mean of the weights."""

    def __init__(self, generator: Generator, settings: Optimisation, hu_per_unit: float) -> None:
        self.generator = generator.train()
        self.average = deepcopy(generator).eval()
        self.settings = settings
        self.hu_per_unit = hu_per_unit
        self.optimizer = torch.optim.Adam(generator.parameters(), lr=settings.learning_rate)

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        self.optimizer.param_groups[0]["lr"] = self._learning_rate(step)
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(batch.source.device.type, torch.bfloat16, enabled=bf16):
            difference = self.generator(batch.source)
        error_hu = (batch.source + difference.float() - batch.target) * self.hu_per_unit
        fidelity = charbonnier(error_hu, self.settings.charbonnier_hu, batch.weight)
        bias = local_bias(error_hu)
        loss = fidelity + self.settings.bias_weight * bias
        if not math.isfinite(loss.item()):
            raise TrainingError(f"step {step}: the loss is not finite; lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.generator.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        self._update_average(step)
        return {"fidelity_hu": fidelity.item(), "bias_hu": bias.item()}

    def result(self) -> Generator:
        return self.average

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "generator": self.generator,
            "average": self.average,
            "optimizer": self.optimizer,
        }

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to the final rate."""
        high, low = self.settings.learning_rate, self.settings.final_learning_rate
        if step < WARM_UP_STEPS:
            return high * (step + 1) / WARM_UP_STEPS
        done = (step - WARM_UP_STEPS) / max(1, self.settings.steps - WARM_UP_STEPS)
        return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        """w' <- d w' + (1 - d) w, with a shorter memory at the start."""
        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
        pairs = zip(self.average.parameters(), self.generator.parameters(), strict=True)
        for mean, current in pairs:
            mean.lerp_(current, 1.0 - decay)
