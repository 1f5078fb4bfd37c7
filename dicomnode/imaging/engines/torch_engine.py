"""PyTorch as engine: the reference on the CPU, and the GPU.

The CUDA part follows PyTorch's documentation; it has not been run on a GPU yet.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from dicomnode.imaging.engines import cuda
from dicomnode.imaging.engines.base import EngineError, Precision, Voxels
from dicomnode.imaging.engines.conveyor import Conveyor
from dicomnode.imaging.engines.forms import Forms
from dicomnode.imaging.engines.memory import is_out_of_memory
from dicomnode.imaging.engines.subpixel import without_transposed
from dicomnode.imaging.networks import Generator
from dicomnode.imaging.pending import Pending, Ready, in_order

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
AHEAD = 2
"""Batches begun beyond the one that is waited for: one is computed, one copied to the device."""


class TorchEngine:
    """PyTorch on one device. fp32 on the CPU is what every other engine is held to."""

    def __init__(
        self,
        generator: Generator,
        device: str,
        precision: Precision,
        *,
        graphs: bool = True,
        at_once: int | None = None,
    ) -> None:
        """
        Args:
            graphs: on a GPU, capture the network as a CUDA graph where that is faster.
            at_once: slices of a batch on a GPU; None: as many as have room.

        Raises:
            EngineError: there is no such device here, or it has no such number format.
        """
        if precision not in DTYPES:
            raise EngineError(f"torch does not run {precision}")
        self.precision: Precision = precision
        self._dtype = DTYPES[precision]
        self._at_once = at_once
        self._batches: dict[tuple[int, int], int] = {}
        self._conveyor: Conveyor[cuda.EventMoment] | None = None
        try:
            self._device = torch.device(device)
            own = generator if self._is_reference() else without_transposed(generator)
            self._generator = own.to(self._device).eval()
            if not self._is_reference():
                self._generator = self._generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if self._device.type == "cuda":
                self._convey(graphs)
        except (RuntimeError, AssertionError) as error:  # no CUDA in this build: AssertionError
            raise EngineError(f"cannot load on {device}: {error}") from error

    def _convey(self, graphs: bool) -> None:
        lanes = cuda.CudaLanes(self._device)
        capture = lanes.capture if graphs else cuda.no_capture
        eager = functools.partial(_on_gpu, self._generator, self._dtype)  # and not the engine
        self._forms = Forms(eager, capture, lanes.seconds, lanes.settle)
        self._conveyor = Conveyor(lanes, self._forms)
        lanes.settle()  # the weights are there before another stream reads them

    @property
    def name(self) -> str:
        return f"torch {torch.__version__}"

    @property
    def ahead(self) -> int:
        """See `Starting.ahead`."""
        return 0 if self._conveyor is None else AHEAD

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `Starting.remarks`."""
        return () if self._conveyor is None else self._forms.words

    def batch(self, rows: int, columns: int) -> int:
        """One on a CPU; on a GPU what a share of its free memory is reckoned to hold when that size
        is first asked for, or less if that did not fit."""
        if self._conveyor is None:
            return 1
        if (rows, columns) not in self._batches:
            each = rows * columns * cuda.CHANNELS_KEPT * self._dtype.itemsize
            room = self._at_once or cuda.batch_for(cuda.free_bytes(self._device), each)
            self._batches[rows, columns] = room
        return self._batches[rows, columns]

    def run(self, x: Voxels) -> Voxels:
        """See `Engine.run`."""
        size = self.batch(*x.shape[2:])
        parts = (x[i : i + size] for i in range(0, len(x), size))
        if self._conveyor is None:  # on a CPU kernels of another batch size may round otherwise
            return np.concatenate([self._run(part) for part in parts])
        begun = (self._start(self._conveyor, part, size) for part in parts)
        return np.concatenate(list(in_order(begun, AHEAD)))

    def start(self, x: Voxels) -> Pending[Voxels]:
        """See `Starting.start`."""
        size = self.batch(*x.shape[2:])
        if self._conveyor is None or len(x) > size:
            return Ready(self.run(x))
        return self._start(self._conveyor, x, size)

    def _start(self, conveyor: Conveyor[cuda.EventMoment], x: Voxels, size: int) -> Pending[Voxels]:
        try:
            return conveyor.start(x, size)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):  # the next is half as large, and has what captures had
                self._batches[x.shape[2], x.shape[3]] = max(1, size // 2)
                self._forms.clear()
                conveyor.clear()
            raise

    @torch.inference_mode()
    def _run(self, x: Voxels) -> Voxels:
        tensor = torch.from_numpy(x)
        if not self._is_reference():
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", self._dtype, enabled=self.precision != "fp32"):
            result: Voxels = self._generator(tensor).float().contiguous().numpy()
            return result

    def _is_reference(self) -> bool:
        return self._device.type == "cpu" and self.precision == "fp32"


def _on_gpu(generator: Generator, dtype: torch.dtype, x: Tensor) -> Tensor:
    """See `conveyor.Compute`. A graph must not read casted weights that autocast keeps outside."""
    lower = dtype != torch.float32
    with cuda.same_kernels(), torch.autocast("cuda", dtype, enabled=lower, cache_enabled=False):
        result: Tensor = generator(x.contiguous(memory_format=torch.channels_last))
        return result
