"""What runs each model: engine, number format, device, self-test; for `status` and metrics."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dicomnode import metrics
from dicomnode.errors import OutOfResources
from dicomnode.spool import write_durably

FILE = "models.json"
"""In data_dir, for `dicomnode status`, which is a process of its own. Nothing depends on it."""


@dataclass(frozen=True, slots=True)
class Serving:
    """One loaded model.

    Attributes:
        engine: with its version, for example "openvino 2026.4.1".
        precision: number format of the convolutions.
        self_test: what it found, and what is allowed, in words.
        refused: why no faster engine or number format, a sentence each.
        forms: how each size of batch is computed on a GPU, a sentence each.
    """

    engine: str
    precision: str
    device: str
    self_test: str
    refused: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()


def tell(data_dir: Path, serving: Mapping[str, Serving], failures: Mapping[str, str]) -> None:
    """Note what a worker has loaded, for `told` and /metrics; a full disk is no matter."""
    metrics.model_info.clear()
    metrics.model_usable.clear()
    for name, one in serving.items():
        metrics.model_info.labels(name, one.engine, one.precision, one.device).set(1)
        metrics.model_usable.labels(name).set(1)
    for name in failures:
        metrics.model_usable.labels(name).set(0)
    data = {name: asdict(one) for name, one in serving.items()}
    data |= {name: {"failed": why} for name, why in failures.items()}
    with contextlib.suppress(OutOfResources):
        write_durably(data_dir / FILE, json.dumps(data, indent=1).encode())


def told(data_dir: Path) -> dict[str, Any]:
    """What `tell` noted last, by model; empty: nothing yet."""
    with contextlib.suppress(OSError, ValueError):
        data = json.loads((data_dir / FILE).read_text("utf-8"))
        if isinstance(data, dict):
            return data
    return {}


def in_words(name: str, model: Mapping[str, Any]) -> str:
    """A line of `dicomnode status`."""
    if why := model.get("failed"):
        return f"model {name}: not loaded: {why}"
    chosen = f"{model['engine']}, {model['precision']} on {model['device']}"
    return "; ".join(
        [
            f"model {name}: {chosen}",
            f"self-test: {model['self_test']}",
            *model["refused"],
            *model.get("forms", ()),
        ]
    )
