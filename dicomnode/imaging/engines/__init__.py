"""What computes a generator: PyTorch everywhere, OpenVINO where it is installed and faster."""

from dicomnode.imaging.engines.base import Engine, EngineError, Precision
from dicomnode.imaging.engines.hardware import cpu_features, runs_well
from dicomnode.imaging.engines.openvino_engine import OpenVinoEngine, installed
from dicomnode.imaging.engines.store import FormStore
from dicomnode.imaging.engines.torch_engine import TorchEngine

__all__ = [
    "Engine",
    "EngineError",
    "FormStore",
    "OpenVinoEngine",
    "Precision",
    "TorchEngine",
    "cpu_features",
    "installed",
    "runs_well",
]
