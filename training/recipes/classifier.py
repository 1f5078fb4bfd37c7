"""A classifier by cross-entropy: Adam, cosine learning rate, running mean of the weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from dicomnode.imaging.networks import Classifier
from training.adversarial import finite
from training.recipes import Average, Batch, Parts, step_rng
from training.recipes.descent import Descent
from training.recipes.optimisation import Optimisation

_SMOOTHING = 0.05
"""Share of certainty that is spread over all classes: labels by folder are not all right."""


class Classify(Parts):
    """The network that is trained, and the mean of its weights that is kept."""

    def __init__(self, network: Classifier, settings: Optimisation, seed: int) -> None:
        self.network = network.train()
        self.average = Average(self.network, settings.ema_decay)
        self.settings, self.seed = settings, seed
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, weight_decay=1e-2, fused=True
        )
        self.descent = Descent("fp32", settings.gradient_clip)
        super().__init__(network=self.network, average=self.average, optimizer=self.optimizer)

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        step_rng(self.seed, step)
        self.network.train()
        self.optimizer.param_groups[0]["lr"] = self.settings.half_cosine(step / self.settings.steps)
        logits = self.network(batch.source.expand(-1, self.network.channels, -1, -1))
        each = F.cross_entropy(logits, batch.target, reduction="none", label_smoothing=_SMOOTHING)
        loss = (each * batch.weight).mean()
        losses = finite({"cross_entropy": loss}, step)
        self.descent(loss, self.optimizer, [self.network], step)
        self.average.update(step)
        return losses

    def results(self) -> Mapping[str, Any]:
        return {"forward": self.average.result()}
