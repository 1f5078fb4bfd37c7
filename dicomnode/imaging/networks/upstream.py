"""Weights of published projects, brought to our generators; never by unpickling objects."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dicomnode.errors import PackageError
from dicomnode.imaging.networks.base import Generator

LARGEST_BYTES = 2 << 30
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def read_pth(path: Path) -> dict[str, Tensor]:
    """The state dict of a ``.pth`` file, tensors only.

    For training and conversion by hand: a node reads safetensors and nothing else.

    Raises:
        PackageError: it is too large, holds anything but tensors by name, or cannot be read.
    """
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise PackageError(f"{path.name} is larger than {LARGEST_BYTES} bytes")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise PackageError(f"{path.name}: not a file of weights alone: {error}") from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise PackageError(f"{path.name}: not a state dict: want tensors by name")
    return state


def load_upstream(generator: Generator, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of pytorch-CycleGAN-and-pix2pix, CUT, gan-compression or RED-CNN.

    Prefixes of parallel training go; running statistics that old versions kept for instance
    normalisation go, for they were never used; biases that upstream leaves out are zero.

    Raises:
        PackageError: a weight is missing, left over or of another shape.
    """
    wanted = generator.state_dict()
    found = {key.removeprefix("module."): value for key, value in state.items()}
    for key in list(found):
        if key not in wanted and key.endswith(_STATISTICS):
            del found[key]
    for key, value in wanted.items():
        if key not in found and key.endswith(".bias"):
            found[key] = torch.zeros_like(value)
    try:
        generator.load_state_dict(found, strict=True)
    except RuntimeError as error:
        raise PackageError(f"these weights do not fit: {error}") from error
