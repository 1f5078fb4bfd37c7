"""How a generator is fitted: settings that the recipes share."""

import math
from dataclasses import dataclass

from training.recipes.descent import Precision


@dataclass(frozen=True, slots=True)
class Optimisation:
    """How the generator is fitted."""

    steps: int
    batch_size: int = 16
    patch: int = 96
    """Side of a training patch, pixels; a multiple of the generator's."""
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    charbonnier_hu: float = 10.0
    """Below this error, in HU, the loss is quadratic, above it is linear."""
    bias_weight: float = 0.5
    """Weight of the mean error of 16 x 16 pixel squares."""
    texture_weight: float = 0.0
    """Weight of the difference in texture from the target, HU of noise in squares of 32 pixels
    (training/losses.py); 0: none. Of the recipe `supervised`."""
    ema_decay: float = 0.999
    """The package holds this running mean of the weights."""
    gradient_clip: float = 1.0
    """Largest norm of a gradient; 0: any."""
    precision: Precision = "fp32"
    """bf16, fp16: the middle of the networks only; losses, first and last layer stay fp32."""

    def half_cosine(self, done: float) -> float:
        """The learning rate after this share of the steps, from the first to the final one."""
        high, low = self.learning_rate, self.final_learning_rate
        return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * done))
