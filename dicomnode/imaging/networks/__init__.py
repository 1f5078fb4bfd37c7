"""The generators and classifiers a package may name, and how one is applied to slices."""

from dicomnode.imaging.networks.apply import (
    PADDING_MODES,
    Scale,
    is_tiled,
    pad_to_multiple,
    padded,
    run_generator,
    run_slices,
    run_tiled,
    start_batch,
)
from dicomnode.imaging.networks.base import Classifier, Generator
from dicomnode.imaging.networks.classifiers import (
    CLASSIFIERS,
    as_squares,
    build_classifier,
    plan_classifier,
    probabilities_of,
)
from dicomnode.imaging.networks.registry import (
    GENERATORS,
    build_generator,
    count_weights,
    plan_generator,
)
from dicomnode.imaging.networks.upstream import load_upstream, read_pth

__all__ = [
    "CLASSIFIERS",
    "GENERATORS",
    "PADDING_MODES",
    "Classifier",
    "Generator",
    "Scale",
    "as_squares",
    "build_classifier",
    "build_generator",
    "count_weights",
    "is_tiled",
    "load_upstream",
    "pad_to_multiple",
    "padded",
    "plan_classifier",
    "plan_generator",
    "probabilities_of",
    "read_pth",
    "run_generator",
    "run_slices",
    "run_tiled",
    "start_batch",
]
