"""The physics of dose in CT: parallel-beam line integrals, filtered backprojection, quantum noise.

Noise of a lower dose is inserted in the projections, where it is born: each ray's noise grows with
what the ray passes, and reconstruction gives it its texture (Yu et al. 2012; Zabic et al. 2013).
Everything here is a pure function on the CPU; random numbers come from the caller.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

WATER_PER_MM = 0.0192
"""Linear attenuation of water near 70 keV, 1/mm."""
KERNEL_CUTOFF_PER_MM = 0.8
"""Where the Hann window of the reconstruction ends, in line pairs per mm: half its height at
0.4/mm, as the soft-tissue kernels of scanners (STANDARD, B30) have it."""
_OVERSAMPLING = 8
"""The filter leaves this many samples per detector, so that the nearest one is exact enough."""
_COARSE_COLUMNS = 128
"""Line integrals vary slowly: those that only weigh noise are computed on about this matrix."""


def attenuation(hu: NDArray[np.float32], water_per_mm: float = WATER_PER_MM) -> NDArray[np.float32]:
    """HU, any shape, float32 -> linear attenuation in 1/mm, same shape, never negative."""
    relative = np.maximum(1.0 + hu / np.float32(1000.0), np.float32(0.0))
    return np.asarray(relative * np.float32(water_per_mm), np.float32)


def project(
    hu: NDArray[np.float32], pixel_spacing_mm: float, views: int = 360
) -> NDArray[np.float32]:
    """Line integrals of attenuation over half a turn, parallel beam.

    (slices, rows, columns), float32, HU -> (slices, views, detectors), float32, no unit. Detectors
    are one pixel apart and cover the diagonal; outside the image is air.
    """
    mu = torch.from_numpy(attenuation(hu))[None]  # one "batch", slices as channels
    rows, columns = hu.shape[1:]
    detectors = _detectors(rows, columns)
    along = torch.arange(detectors, dtype=torch.float32) - (detectors - 1) / 2
    sinogram = torch.empty(len(hu), views, detectors)
    for view, angle in enumerate(_angles(views)):
        # x, y in pixels of the points of every ray: detector position t, depth s
        x = along[:, None] * math.cos(angle) - along[None, :] * math.sin(angle)
        y = along[:, None] * math.sin(angle) + along[None, :] * math.cos(angle)
        grid = torch.stack([2 * x / columns, 2 * y / rows], dim=-1)[None]
        rays = F.grid_sample(mu, grid, mode="bilinear", align_corners=False)
        sinogram[:, view] = rays[0].sum(dim=2) * pixel_spacing_mm
    return np.asarray(sinogram.numpy())


def reconstruct(
    sinogram: NDArray[np.float32],
    pixel_spacing_mm: float,
    matrix: tuple[int, int],
    *,
    cutoff_per_mm: float = KERNEL_CUTOFF_PER_MM,
) -> NDArray[np.float32]:
    """Filtered backprojection with a ramp under a Hann window.

    (slices, views, detectors), float32, as `project` gives -> (slices, rows, columns), float32,
    linear attenuation in 1/mm.
    """
    filtered = _filter(torch.from_numpy(sinogram), pixel_spacing_mm, cutoff_per_mm)
    return np.asarray(_backproject(filtered, sinogram.shape[1], matrix).numpy())


def quantum_noise(
    hu: NDArray[np.float32],
    pixel_spacing_mm: float,
    photons_before: float,
    photons_after: float,
    rng: np.random.Generator,
    *,
    views: int = 360,
    electronic: float = 0.0,
    cutoff_per_mm: float = KERNEL_CUTOFF_PER_MM,
) -> NDArray[np.float32]:
    """The noise to ADD to a CT image to lower its dose.

    A ray with line integral p that starts with N photons arrives with N e^-p of them, and its
    measured p has the variance e^p / N (Poisson) + (`electronic` e^p / N)^2. What is added is the
    variance at `photons_after` less that at `photons_before`, which the image already holds;
    math.inf for an image without noise. At least one photon per ray arrives.

    Args:
        hu: (slices, rows, columns), float32, HU.
        photons_before: photons per ray in air of the dose the image was taken with.
        photons_after: the same of the lower dose, not more than `photons_before`.
        rng: one stream for all slices, in order.
        electronic: standard deviation of the detector's own noise, in photons.

    Returns:
        (slices, rows, columns), float32, HU; mean zero, independent between slices.

    Raises:
        ValueError: `photons_after` is not above zero and at most `photons_before`.
    """
    if not 0 < photons_after <= photons_before:
        raise ValueError("want 0 < photons_after <= photons_before")
    rows, columns = hu.shape[1:]
    integrals = coarse_integrals(hu, pixel_spacing_mm, views)
    variance = _variance(integrals, photons_after, electronic)
    variance -= _variance(integrals, photons_before, electronic)
    deviation = np.sqrt(np.maximum(variance, 0.0), dtype=np.float32)
    noise = rng.standard_normal(deviation.shape, dtype=np.float32) * deviation
    image = reconstruct(noise, pixel_spacing_mm, (rows, columns), cutoff_per_mm=cutoff_per_mm)
    return image * np.float32(1000.0 / WATER_PER_MM)


def _variance(
    integrals: NDArray[np.float32], photons: float, electronic: float
) -> NDArray[np.float32]:
    """Variance of a measured line integral; zero for infinitely many photons."""
    if math.isinf(photons):
        return np.zeros_like(integrals)
    arriving = np.maximum(photons * np.exp(-integrals), 1.0)
    return (1.0 / arriving + (electronic / arriving) ** 2).astype(np.float32)


def coarse_integrals(
    hu: NDArray[np.float32], pixel_spacing_mm: float, views: int
) -> NDArray[np.float32]:
    """As `project`, from an image averaged to a small matrix, on the detectors of the full one."""
    rows, columns = hu.shape[1:]
    factor = max(1, columns // _COARSE_COLUMNS)
    pad = (0, -columns % factor, 0, -rows % factor)
    air = F.pad(torch.from_numpy(hu)[:, None], pad, value=-1000.0)
    coarse = F.avg_pool2d(air, factor)[:, 0].contiguous().numpy()
    integrals = torch.from_numpy(project(coarse, pixel_spacing_mm * factor, views))
    # A detector at t full pixels from the centre lies at t / factor coarse pixels.
    detectors = _detectors(rows, columns)
    offsets = (torch.arange(detectors) - (detectors - 1) / 2) / factor
    x = 2 * offsets / integrals.shape[2]
    y = (2 * torch.arange(views) + 1) / views - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    fine = F.grid_sample(integrals[None], grid, align_corners=False)
    return np.asarray(fine[0].numpy())


def _filter(sinogram: Tensor, spacing_mm: float, cutoff_per_mm: float) -> Tensor:
    """Ramp and Hann along the detectors; returns (slices, views, detectors * oversampling)."""
    detectors = sinogram.shape[2]
    length = 1 << (2 * detectors - 1).bit_length()
    taps = torch.zeros(length)  # band-limited ramp (Kak and Slaney 3.3), so that DC is right
    odd = torch.arange(1, length // 2, 2)
    taps[0] = 0.25
    taps[odd] = taps[-odd] = -1.0 / (math.pi * odd) ** 2
    ramp = torch.fft.rfft(taps).real / spacing_mm
    frequency = torch.arange(length // 2 + 1) / (length * spacing_mm)  # line pairs per mm
    hann = 0.5 + 0.5 * torch.cos(math.pi * frequency / cutoff_per_mm)
    response = torch.where(frequency < cutoff_per_mm, ramp * hann, torch.zeros(()))
    spectrum = torch.fft.rfft(sinogram, length, dim=2) * response
    fine: Tensor = torch.fft.irfft(spectrum, length * _OVERSAMPLING, dim=2) * _OVERSAMPLING
    return fine[:, :, : detectors * _OVERSAMPLING]


def _backproject(filtered: Tensor, views: int, matrix: tuple[int, int]) -> Tensor:
    """Smear each view back; (slices, views, fine detectors) -> (slices, rows, columns)."""
    rows, columns = matrix
    centre = (_detectors(rows, columns) - 1) / 2
    x = torch.arange(columns, dtype=torch.float32) - (columns - 1) / 2
    y = torch.arange(rows, dtype=torch.float32) - (rows - 1) / 2
    by_view = filtered.permute(1, 2, 0).contiguous()  # slices last: one look-up serves them all
    image = torch.zeros(rows * columns, filtered.shape[0])
    for view, angle in enumerate(_angles(views)):
        position = y[:, None] * math.sin(angle) + x[None, :] * math.cos(angle) + centre
        nearest = (position * _OVERSAMPLING).round().long().clamp_(0, filtered.shape[2] - 1)
        image += by_view[view].index_select(0, nearest.view(-1))
    return (image * (math.pi / views)).T.reshape(-1, rows, columns)


def _angles(views: int) -> list[float]:
    return [math.pi * view / views for view in range(views)]


def _detectors(rows: int, columns: int) -> int:
    return math.ceil(math.hypot(rows, columns)) + 1
