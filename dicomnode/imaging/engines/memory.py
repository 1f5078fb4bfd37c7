"""Batches that fit: halved when memory runs out, on any device and in any engine."""

import logging
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from dicomnode.errors import OutOfMemory
from dicomnode.imaging.engines.base import Engine, Starting, Voxels
from dicomnode.imaging.pending import Pending, Ready

log = logging.getLogger(__name__)

Done = TypeVar("Done")
_WORDS = (
    "not enough memory",
    "can't allocate memory",
    "bad_alloc",
    "bad allocation",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""How PyTorch's allocator for CPUs, C++ itself and CUDA's libraries say that there is no memory
left, where PyTorch has no class of its own for it."""


class WithinMemory:
    """Runs one engine over one volume; a batch as large as one that did not fit is not tried again.

    Attributes:
        halved: how often a batch was halved because memory ran out.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._most: int | None = None
        self.halved = 0

    def batch(self, rows: int, columns: int) -> int:
        """How many results of that size to ask for at once."""
        wanted = self._engine.batch(rows, columns)
        return wanted if self._most is None else min(wanted, self._most)

    @property
    def ahead(self) -> int:
        """How many batches to start beyond the one that is waited for."""
        return self._engine.ahead if isinstance(self._engine, Starting) else 0

    def start(self, x: Voxels) -> Pending[Voxels]:
        """Begin `run`, if the engine computes beside this thread; a batch that does not fit is run
        at once, in halves.

        Raises:
            OutOfMemory: not even one fits.
        """
        if not isinstance(self._engine, Starting) or len(x) > (self._most or len(x)):
            return Ready(self.run(x))
        begun = self._try(self._engine.start, x)
        if begun is None:
            self._halve(len(x))
            return Ready(self.run(x))
        return begun

    def run(self, x: Voxels) -> Voxels:
        """See `Engine.run`.

        Raises:
            OutOfMemory: not even one fits.
        """
        done: list[Voxels] = []
        while (start := sum(map(len, done))) < len(x):
            size = min(self._most or len(x), len(x) - start)
            result = self._try(self._engine.run, x[start : start + size])
            if result is None:
                self._halve(size)
            else:
                done.append(result)
        return done[0] if len(done) == 1 else np.concatenate(done)

    def _halve(self, size: int) -> None:
        self.halved, self._most = self.halved + 1, (size + 1) // 2
        log.warning("out of memory: a batch of %d is now of %d", size, self._most)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _try(self, work: Callable[[Voxels], Done], x: Voxels) -> Done | None:
        """None: it does not fit. Nothing is kept of the failure, whose traceback holds memory."""
        try:
            return work(x)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(x) == 1:
                raise OutOfMemory("not even one slice fits in memory") from error
            return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an engine failed because memory ran out, of the device or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
