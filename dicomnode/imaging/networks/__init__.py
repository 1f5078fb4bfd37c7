"""The generators a model package may name, and how one is applied to slices."""

from dicomnode.imaging.networks.apply import (
    PADDING_MODES,
    Scale,
    pad_to_multiple,
    run_generator,
    run_slices,
    run_tiled,
)
from dicomnode.imaging.networks.base import Generator
from dicomnode.imaging.networks.registry import (
    GENERATORS,
    build_generator,
    count_weights,
    plan_generator,
)
from dicomnode.imaging.networks.upstream import load_upstream, read_pth

__all__ = [
    "GENERATORS",
    "PADDING_MODES",
    "Generator",
    "Scale",
    "build_generator",
    "count_weights",
    "load_upstream",
    "pad_to_multiple",
    "plan_generator",
    "read_pth",
    "run_generator",
    "run_slices",
    "run_tiled",
]
