"""Losses of an error image in HU, (batch, 1, rows, columns), float32."""

import torch
from torch import Tensor
from torch.nn import functional as F


def charbonnier(error_hu: Tensor, knee_hu: float, weight: Tensor) -> Tensor:
    """Weighted mean of sqrt(e^2 + knee^2) - knee: quadratic for noise, linear for outliers, HU."""
    return (weight * (torch.sqrt(error_hu**2 + knee_hu**2) - knee_hu)).mean()


def local_bias(error_hu: Tensor, side: int = 16) -> Tensor:
    """Mean absolute value of the mean error of `side` x `side` pixel squares, HU.

    A denoiser may smooth; it may not make tissue denser or lighter.
    """
    return F.avg_pool2d(error_hu, side).abs().mean()
