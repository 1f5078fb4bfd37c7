"""PyTorch as engine: the reference on the CPU, and the GPU.

The CUDA part follows PyTorch's documentation; it has not been run on a GPU yet.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dicomnode.imaging.engines.base import EngineError, Precision, Voxels
from dicomnode.imaging.engines.subpixel import without_transposed
from dicomnode.imaging.networks import Generator

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CHANNELS_KEPT = 1024
"""Channels at full resolution that a pass is reckoned to keep at once: ResNet-9 with 64 channels
needs about six layers of 64, some of them twice, and room for the convolution's workspace."""
SHARE_OF_FREE_MEMORY = 0.5
LARGEST_BATCH = 32


class TorchEngine:
    """Eager PyTorch on one device. fp32 on the CPU is what every other engine is held to."""

    def __init__(self, generator: Generator, device: str, precision: Precision) -> None:
        """
        Raises:
            EngineError: there is no such device here, or it has no such number format.
        """
        if precision not in DTYPES:
            raise EngineError(f"torch does not run {precision}")
        self.precision: Precision = precision
        self._dtype = DTYPES[precision]
        try:
            self._device = torch.device(device)
            own = generator if self._is_reference() else without_transposed(generator)
            self._generator = own.to(self._device).eval()
            if not self._is_reference():
                self._generator = self._generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        except (RuntimeError, AssertionError) as error:  # no CUDA in this build: AssertionError
            raise EngineError(f"cannot load on {device}: {error}") from error

    @property
    def name(self) -> str:
        return f"torch {torch.__version__}"

    def batch(self, rows: int, columns: int) -> int:
        """One on a CPU; on a GPU what half of its free memory is reckoned to hold."""
        if self._device.type != "cuda":
            return 1
        free, _ = torch.cuda.mem_get_info(self._device)
        each = rows * columns * CHANNELS_KEPT * self._dtype.itemsize
        return max(1, min(LARGEST_BATCH, int(free * SHARE_OF_FREE_MEMORY) // each))

    def run(self, x: Voxels) -> Voxels:
        """See `Engine.run`."""
        if self._device.type == "cpu":  # kernels of another batch size may round otherwise
            return np.concatenate([self._run(one) for one in np.split(x, len(x))])
        return self._run(x)

    @torch.inference_mode()
    def _run(self, x: Voxels) -> Voxels:
        with self._numbers():
            return self._back(self._generator(self._there(x)))

    def _is_reference(self) -> bool:
        return self._device.type == "cpu" and self.precision == "fp32"

    def _there(self, x: Voxels) -> Tensor:
        tensor = torch.from_numpy(x)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory().to(self._device, non_blocking=True)
        if not self._is_reference():
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def _back(self, y: Tensor) -> Voxels:
        result: Voxels = y.float().contiguous().cpu().numpy()
        return result

    @contextlib.contextmanager
    def _numbers(self) -> Iterator[None]:
        """The number format, and the same kernels on every run; no TF32 under the name of fp32."""
        with contextlib.ExitStack() as stack:
            if self._device.type == "cuda":
                stack.enter_context(
                    torch.backends.cudnn.flags(
                        benchmark=False, deterministic=True, allow_tf32=False
                    )
                )
            if self.precision != "fp32":
                stack.enter_context(torch.autocast(self._device.type, self._dtype))
            yield
