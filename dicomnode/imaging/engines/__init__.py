"""What computes a generator: PyTorch everywhere, OpenVINO where it is installed and faster."""

from dicomnode.imaging.engines.base import Engine, EngineError, Precision, Starting
from dicomnode.imaging.engines.hardware import cpu_features, engines_for, runs_well
from dicomnode.imaging.engines.int8 import Limits, convolutions, in_int8
from dicomnode.imaging.engines.memory import WithinMemory, is_out_of_memory
from dicomnode.imaging.engines.openvino_engine import OpenVinoEngine, installed
from dicomnode.imaging.engines.store import FormStore
from dicomnode.imaging.engines.torch_engine import TorchEngine

__all__ = [
    "Engine",
    "EngineError",
    "FormStore",
    "Limits",
    "OpenVinoEngine",
    "Precision",
    "Starting",
    "TorchEngine",
    "WithinMemory",
    "convolutions",
    "cpu_features",
    "engines_for",
    "in_int8",
    "installed",
    "is_out_of_memory",
    "runs_well",
]
