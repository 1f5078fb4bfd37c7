"""The seam between a model and what computes it."""

from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dicomnode.errors import PackageError
from dicomnode.imaging.pending import Pending

Precision = Literal["fp32", "fp16", "bf16", "int8"]
"""Number format of the convolutions; first and last layer of a generator stay fp32."""
Voxels = NDArray[np.float32]


class EngineError(PackageError):
    """An engine cannot run this generator here; another one may."""


class Engine(Protocol):
    """A generator ready to run on one device in one number format."""

    @property
    def name(self) -> str:
        """Engine with its version, for example ``openvino 2026.4.1``."""

    @property
    def precision(self) -> Precision: ...

    def batch(self, rows: int, columns: int) -> int:
        """How many results of that size to ask for at once."""

    def run(self, x: Voxels) -> Voxels:
        """(batch, slices, rows, columns), float32 -> (batch, 1, rows, columns), float32.

        On a CPU the same input gives the same bits, whatever else is in the batch.
        """


@runtime_checkable
class Starting(Engine, Protocol):
    """An engine that computes beside the thread that uses it."""

    @property
    def ahead(self) -> int:
        """How many batches to begin beyond the one that is waited for; 0: it does not gain."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """How it computes each shape it has met, a sentence each."""

    def start(self, x: Voxels) -> Pending[Voxels]:
        """Begin `run`; `x` may be written to as soon as this returns. Raises what `run` raises."""
