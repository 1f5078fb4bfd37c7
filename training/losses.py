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


def texture(made: Tensor, wanted: Tensor, side: int = 32) -> Tensor:
    """Mean absolute difference of the amplitudes of two images by spatial frequency, HU.

    Of half overlapping squares under a Hann window the power is averaged over rings of equal
    frequency; its root, as the noise it would be in HU, is compared. Where tissue is uniform this
    compares noise: too little of it counts like too much. Phases, that is places, do not count.

    Args:
        made, wanted: (batch, 1, rows, columns), HU, any offset.
    """
    own, true = (_amplitudes(image, side) for image in (made, wanted))
    return (own - true).abs().mean()


def _amplitudes(image: Tensor, side: int) -> Tensor:
    """(squares, rings): root of the mean power at 1, 2, ... side / 2 turns per square, HU."""
    squares = F.unfold(image, side, stride=side // 2).transpose(1, 2).reshape(-1, side, side)
    bell = torch.hann_window(side, periodic=False, device=image.device)
    bell = bell[:, None] * bell
    level = (squares * bell).sum((1, 2), keepdim=True) / bell.sum()
    spectrum = torch.fft.rfft2((squares - level) * bell)
    power = (spectrum.real**2 + spectrum.imag**2) / (bell**2).sum()
    turns = torch.fft.fftfreq(side, 1 / side, device=image.device)
    ring = torch.hypot(turns[:, None], turns[None, : side // 2 + 1]).round().long()
    inside = (ring >= 1) & (ring <= side // 2)
    member = F.one_hot(ring[inside] - 1, side // 2).to(power.dtype)
    return torch.sqrt(power[:, inside] @ (member / member.sum(0)) + 1e-2)
