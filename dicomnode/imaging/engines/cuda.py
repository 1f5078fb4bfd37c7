"""CUDA's part of the engine: three streams as lanes, page-locked memory, graphs, room for a batch.

Written after PyTorch's documentation and source; it has not been run on a GPU yet.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dicomnode.errors import DeviceLost
from dicomnode.imaging.engines.base import EngineError
from dicomnode.imaging.engines.conveyor import Compute
from dicomnode.imaging.engines.memory import is_out_of_memory

CHANNELS_KEPT = 1024
"""Channels at full resolution that a pass is reckoned to keep at once: ResNet-9 with 64 channels
needs about six layers of 64, some of them twice, and room for the convolution's workspace."""
SHARE_OF_FREE_MEMORY = 0.25
"""Of one batch: a graph keeps its memory, while another shape, or another model, needs its own."""
LARGEST_BATCH = 32
ROOM_FOR_A_CAPTURE = 2.0
"""So many times what the computation takes has to be free before it is captured: a capture that
fails for want of memory keeps what it has until the process ends (pytorch/pytorch PR 190308)."""
TIMED_RUNS = 3


def batch_for(free_bytes: int, bytes_each: int) -> int:
    """How many slices go at once: a power of two, so that little difference in free memory makes
    none in the kernels, and so in the last bits, of the next start."""
    most = max(1, min(LARGEST_BATCH, int(free_bytes * SHARE_OF_FREE_MEMORY) // bytes_each))
    return 1 << (most.bit_length() - 1)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that this process can have: free, or kept by PyTorch and unused."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free) + int(unused)


class CudaLanes:
    """See `conveyor.Lanes`. Streams of their own, none of which waits for the default stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._computing = _stream(device)
        self.there = StreamLane(_stream(device))
        self.compute = StreamLane(self._computing)
        self.back = StreamLane(_stream(device))

    def on_host(self, shape: Sequence[int]) -> Tensor:
        """See `conveyor.Lanes`."""
        with torch.inference_mode():
            return torch.empty(tuple(shape), dtype=torch.float32, pin_memory=True)

    def on_device(self, shape: Sequence[int]) -> Tensor:
        """See `conveyor.Lanes`: memory is shared out and given back in the order of one stream."""
        with torch.inference_mode(), torch.cuda.stream(self._computing):
            return torch.empty(tuple(shape), dtype=torch.float32, device=self._device)

    def settle(self) -> None:
        """See `conveyor.Lanes`; memory that is not used goes back to the device."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def seconds(self, work: Callable[[], object]) -> float:
        """That the stream of `compute` takes for `work`; called in work of that lane."""
        began = _event(timed=True)
        ended = _event(timed=True)
        began.record(self._computing)
        for _ in range(TIMED_RUNS):
            work()
        ended.record(self._computing)
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000 / TIMED_RUNS

    def capture(self, compute: Compute, x: Tensor) -> Compute:
        """`compute` for the shape of `x` as a CUDA graph; called in work of `compute`.

        The graph reads and writes memory of its own: `x` is copied in, and the result is to be
        copied out before the next call, by work of the same lane.

        Raises:
            EngineError: it cannot be captured, or there is too little memory for it.
        """
        self._check_room(compute, x)
        graph, given = torch.cuda.CUDAGraph(), x.clone()
        try:
            with torch.cuda.graph(graph, stream=self._computing, capture_error_mode="thread_local"):
                made = compute(given)
        except RuntimeError as error:
            torch.cuda.synchronize(self._device)  # raises if the device itself has failed
            raise EngineError(f"not captured: {type(error).__name__}") from error

        def replay(x: Tensor) -> Tensor:
            given.copy_(x)
            graph.replay()
            return made

        return replay

    def _check_room(self, compute: Compute, x: Tensor) -> None:
        self.settle()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        compute(x)
        needed = torch.cuda.max_memory_allocated(self._device) - before
        self.settle()
        free, _ = torch.cuda.mem_get_info(self._device)
        if free < ROOM_FOR_A_CAPTURE * needed:
            raise EngineError(f"{free >> 20} MB are free, a capture needs {needed >> 20}")


class StreamLane:
    """A CUDA stream; see `conveyor.Lane`. Work is launched at once and done by the device later."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def give(self, work: Callable[[], None], after: "Sequence[EventMoment]" = ()) -> "EventMoment":
        """See `conveyor.Lane`. Raises: DeviceLost."""
        with _told_if_lost():
            for moment in after:
                self._stream.wait_event(moment.event)
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                work()
            event = _event()
            event.record(self._stream)
            return EventMoment(event)


class EventMoment:
    """A CUDA event. Who waits for it sleeps: other threads need the processor."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        """See `conveyor.Moment`. Raises: DeviceLost."""
        with _told_if_lost():
            self.event.synchronize()


def no_capture(compute: Compute, x: Tensor) -> Compute:
    """In place of `CudaLanes.capture`. Raises: EngineError: graphs are not wanted."""
    raise EngineError("graphs are not wanted")


@contextlib.contextmanager
def same_kernels() -> Iterator[None]:
    """cuDNN with the same kernels on every run, and no TF32 under the name of fp32."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield


@contextlib.contextmanager
def _told_if_lost() -> Iterator[None]:
    """After an error of the device, other than of memory, CUDA refuses this process all work."""
    try:
        yield
    except torch.AcceleratorError as error:
        if is_out_of_memory(error):
            raise
        raise DeviceLost(
            f"the GPU failed ({type(error).__name__}): see its driver's log"
        ) from error


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _event(*, timed: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timed, blocking=True)  # type: ignore[no-untyped-call]
