"""The closed list of generators that a package may name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import device, nn

from dicomnode.errors import PackageError
from dicomnode.imaging.networks.base import Generator
from dicomnode.imaging.networks.gan_circle import GanCircle
from dicomnode.imaging.networks.redcnn import RedCnn
from dicomnode.imaging.networks.residual import Affine, Identity, ResidualDenoiser
from dicomnode.imaging.networks.resnet import ResNet
from dicomnode.imaging.networks.students import UnshuffleResNet
from dicomnode.imaging.networks.unet import UNet

_N = TypeVar("_N", bound=nn.Module)
GENERATORS: Mapping[str, Callable[..., Generator]] = {
    "residual_denoiser": ResidualDenoiser,
    "identity": Identity,
    "affine": Affine,
    "resnet": ResNet,
    "resnet_6": partial(ResNet, blocks=6),
    "resnet_9": partial(ResNet, blocks=9),
    "mr_ct_full": partial(ResNet, blocks=9, downsample=False),
    "unet_128": partial(UNet, levels=7),
    "unet_256": partial(UNet, levels=8),
    "gan_circle": GanCircle,
    "red_cnn": RedCnn,
    "unshuffle_resnet": UnshuffleResNet,
}
"""Name in a manifest -> generator. `mr_ct_full` is the generator as the text of the MR-CT paper has
it, at full resolution throughout."""

MOST_WEIGHTS = 1 << 29
"""A generator with more is refused: in fp32 they fill the largest file a package may have."""


def build_generator(architecture: str, options: Mapping[str, Any]) -> Generator:
    """Build the generator a package names, in eval mode.

    Raises:
        PackageError: there is no such generator, or it does not take these options.
    """
    plan_generator(architecture, options)
    return GENERATORS[architecture](**options).eval()


def plan_generator(architecture: str, options: Mapping[str, Any]) -> Generator:
    """The same without memory for its weights, which live on torch's `meta` device.

    Raises:
        PackageError: as `build_generator`; or it would have more weights than a package may.
    """
    return plan_network(GENERATORS, "generator", architecture, options, MOST_WEIGHTS)


def plan_network(
    table: Mapping[str, Callable[..., _N]],
    key: str,
    architecture: str,
    options: Mapping[str, Any],
    most_weights: int,
) -> _N:
    """A network of `table` in eval mode, on torch's `meta` device.

    Args:
        key: of the manifest, for messages: generator or network.

    Raises:
        PackageError: there is no such network, it does not take these options, or it would have
            more weights than `most_weights`.
    """
    if architecture not in table:
        known = ", ".join(sorted(table))
        raise PackageError(f"{key}.architecture: no {architecture!r}; known: {known}")
    try:
        with device("meta"):
            plan = table[architecture](**options).eval()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PackageError(f"{key}.options of {architecture}: {error}") from error
    weights = count_weights(plan)
    if weights > most_weights:
        raise PackageError(
            f"{key}.options of {architecture}: {weights} weights; at most {most_weights}"
        )
    return plan


def count_weights(network: nn.Module) -> int:
    """Trained numbers; running statistics and fixed filters are not among them."""
    return sum(parameter.numel() for parameter in network.parameters())
