"""The generators a model package may name, and how one is applied to slices."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dicomnode.errors import PackageError

PADDING_MODES = ("reflect", "replicate")


class Generator(nn.Module):
    """A network (batch, channels, rows, columns) -> the same shape, with what callers must know."""

    multiple: int = 1
    """Rows and columns must be multiples of this."""
    receptive_field: int = 1
    """Side, in pixels, of the square of input that one output pixel can depend on."""


class ResidualDenoiser(Generator):
    """Noise estimator without normalisation layers: what to add to a noisy slice.

    Pixel-unshuffle, a convolution, residual blocks at the lower resolution, a convolution,
    pixel-shuffle. No layer looks at statistics of the image, so the result does not depend on
    the field of view, on the batch or on air around the patient. The last convolution starts at
    zero: an untrained network changes nothing. Under autocast the first and last convolutions and
    the sums between the blocks stay float32: a bf16 input would be rounded to steps of 8 HU.

    (batch, 1, rows, columns), float32, in [-1, 1] -> the same shape: the difference to add, in
    the same scale.
    """

    def __init__(
        self,
        width: int = 64,
        blocks: int = 6,
        shuffle: int = 2,
        centre: float = -0.5,
        gain: float = 20.0,
    ) -> None:
        """`centre` and `gain` bring soft tissue near zero and its noise near one, inside only."""
        super().__init__()
        self.centre = centre
        self.gain = gain
        self.multiple = shuffle
        self.receptive_field = shuffle * (2 * (2 + 2 * blocks) + 1)
        self.first = nn.Conv2d(shuffle**2, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.last = nn.Conv2d(width, shuffle**2, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(torch.as_tensor(self.last.bias))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            features = self.first(F.pixel_unshuffle((x - self.centre) * self.gain, self.multiple))
        features = self.blocks(features)
        with torch.autocast(x.device.type, enabled=False):
            change = F.pixel_shuffle(self.last(features), self.multiple)
        return change / self.gain


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():  # many blocks without norm stay calm at the start
            self.second.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.second(F.relu(self.first(x))))


class Identity(Generator):
    """Returns its input. With intensity ``none`` the whole path must give back every value."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Affine(Generator):
    """scale * x + offset, in the unit the intensity leaves: a model whose result is known."""

    def __init__(self, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.offset


GENERATORS: Mapping[str, Callable[..., Generator]] = {
    "residual_denoiser": ResidualDenoiser,
    "identity": Identity,
    "affine": Affine,
}


def build_generator(architecture: str, options: Mapping[str, Any]) -> Generator:
    """Build the generator a package names, in eval mode.

    Raises:
        PackageError: there is no such generator, or it does not take these options.
    """
    if architecture not in GENERATORS:
        known = ", ".join(sorted(GENERATORS))
        raise PackageError(f"generator.architecture: no {architecture!r}; known: {known}")
    try:
        return GENERATORS[architecture](**options).eval()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PackageError(f"generator.options of {architecture}: {error}") from error


class Scale(Protocol):
    """What `run_generator` needs of an intensity (dicomnode.imaging.intensity)."""

    @property
    def unit_per_network(self) -> float: ...
    def to_network(self, voxels: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def from_network(self, values: NDArray[np.float32]) -> NDArray[np.float32]: ...


@torch.inference_mode()
def run_generator(
    generator: Generator,
    voxels: NDArray[np.float32],
    source_scale: Scale,
    result_scale: Scale,
    *,
    residual: bool,
    padding: str = "reflect",
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Apply `generator` to each slice of `voxels`.

    (slices, rows, columns), float32, physical unit -> the same shape and, with `residual`, the
    source plus the predicted difference, so that values outside the window survive.

    One slice at a time: on a CPU that is as fast as a batch, and a slice's result then depends on
    that slice alone, whatever convolution kernels are chosen for a batch size.
    """
    _, rows, columns = voxels.shape
    pad = (0, -columns % generator.multiple, 0, -rows % generator.multiple)
    result = np.empty_like(voxels)
    for index, plane in enumerate(voxels):
        x = torch.from_numpy(source_scale.to_network(plane))[None, None].to(device)
        if any(pad):
            x = F.pad(x, pad, mode=padding)
        y = generator(x)[0, 0, :rows, :columns].float().cpu().numpy()
        if residual:
            result[index] = plane + y * np.float32(result_scale.unit_per_network)
        else:
            result[index] = result_scale.from_network(y)
    return result
