"""What every generator has in common, and the parts that several of them are made of."""

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor, autocast, nn

Norm = Literal["instance", "batch", "none"]
"""Normalisation layers; `instance` looks at the statistics of the whole slice."""
MakeNorm = Callable[[int], nn.Module]
"""Channels -> normalisation layer."""
Head = Literal["tanh", "linear", "residual"]
"""How the last convolution becomes the result: bounded to [-1, 1], as it is, or added to the
(central) input slice."""


class Generator(nn.Module):
    """A network (batch, slices, rows, columns) -> (batch, outputs, rows, columns), float32."""

    multiple: int = 1
    """Rows and columns must be multiples of this."""
    receptive_field: int = 1
    """Side, in pixels, of the square of input that one output pixel can depend on through
    convolutions; statistics of the slice (`uses_statistics`) reach everywhere."""
    uses_statistics: bool = False
    """Whether a result depends on mean and variance of its whole slice: then also on the field of
    view, on the matrix and on air around the patient."""
    slices: int = 1
    """Neighbouring slices that go in; the middle one comes out."""
    tiles_exactly: bool = False
    """Whether a tile has the bits of the whole slice in every engine: shown by tests."""


class Classifier(nn.Module):
    """A network (batch, channels, rows, columns) -> (batch, classes), float32: logits."""

    smallest: int = 1
    """Images with fewer rows or columns leave nothing of themselves."""

    def __init__(self, classes: int, channels: int) -> None:
        """`channels`: of the image; a grey one goes into each of three.

        Raises:
            ValueError: an option is out of range.
        """
        super().__init__()
        check(2 <= classes <= 10000, "classes: from 2 to 10000")
        check(channels in (1, 3), "channels: 1 or 3")
        self.classes, self.channels = classes, channels


def centre_slice(x: Tensor) -> Tensor:
    """(batch, slices, rows, columns) -> the middle slice, (batch, 1, rows, columns).

    Of an even number the first is a channel more (imaging.equalise), and the rest are slices.
    """
    middle = x.shape[1] // 2
    return x[:, middle : middle + 1]


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply `layer` in float32, also under autocast.

    The first and the last convolution of a generator see whole intensities: rounded to bfloat16
    these would come in steps of 8 HU.
    """
    with autocast(x.device.type, enabled=False):
        result: Tensor = layer(x.float())
    return result


def norm_layer(kind: str) -> MakeNorm:
    """The normalisation layer of that kind, as a function of the channels.

    Raises:
        ValueError: there is no such kind.
    """
    if kind == "instance":
        return lambda channels: nn.InstanceNorm2d(channels)
    if kind == "batch":
        return lambda channels: nn.BatchNorm2d(channels)
    check(kind in get_args(Norm), f"norm: {kind!r} is not one of {', '.join(get_args(Norm))}")
    return lambda channels: nn.Identity()


def check_common(slices: int, outputs: int, head: str, norm: str) -> None:
    """Options that most generators share.

    Raises:
        ValueError: one is out of range; the message names it.
    """
    check(head in get_args(Head), f"head: {head!r} is not one of {', '.join(get_args(Head))}")
    check(norm in get_args(Norm), f"norm: {norm!r} is not one of {', '.join(get_args(Norm))}")
    check(1 <= slices <= 31, "slices: from 1 to 31")
    check(1 <= outputs <= 31, "outputs: from 1 to 31")
    check(head != "residual" or outputs == 1, "head: residual has one output")


def check(holds: bool, message: str) -> None:
    """Raises ValueError with `message` unless `holds`."""
    if not holds:
        raise ValueError(message)
