"""One run in several processes that torchrun started: each takes its share of every batch.

The mean of their gradients is the gradient of the whole batch, so all hold the same weights, and
two processes do what one does with the same `batch_size`. Without torchrun everything here leaves
its argument as it is. Written out instead of DistributedDataParallel, whose hooks count one forward
per backward: a GAN's step has several.
"""

import importlib
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from training.errors import TrainingError
from training.recipes.batch import Batch

_WAIT = timedelta(hours=6)
"""How long one process waits for another, which may be judging a large validation."""
_Any = TypeVar("_Any")


def start(device: str) -> torch.device:
    """Join the other processes of torchrun, if there are any; returns where this one computes.

    Args:
        device: cpu, cuda, cuda:0 ...; auto is CUDA where there is one.

    Raises:
        TrainingError: CUDA is asked for and not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise TrainingError(f"device: {device}: torch finds no CUDA here; take cpu or auto")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Its functions' defaults keep the group that is there when an optimiser first imports it,
        # past `stop`; a thread of gloo that then lives while Python ends may abort the process.
        importlib.import_module("torch.distributed.nn")
        if place.type == "cuda":
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(place)
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=_WAIT)
    return place


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """How many processes share this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait() -> None:
    """Until all have come here."""
    if count() > 1:
        dist.barrier()


def from_first(value: _Any) -> _Any:
    """What the first process has; plain values only."""
    if count() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def any_of(asked: bool) -> bool:
    """Whether any process says so; the same answer in all of them."""
    if count() == 1:
        return asked
    return bool(mean_([torch.tensor([float(asked)])])[0].item() > 0)


def own_share(batch: Batch) -> Batch:
    """The samples of a batch that are this process's."""
    return Batch(*(own_rows(part) for part in batch))


def own_rows(whole: Tensor) -> Tensor:
    """This process's rows of the first axis."""
    if count() == 1:
        return whole
    return whole.chunk(count())[dist.get_rank()]


def gather(mine: Tensor) -> Tensor:
    """The rows of all processes, in their order; detached."""
    if count() == 1:
        return mine.detach()
    parts = [torch.empty_like(mine) for _ in range(count())]
    dist.all_gather(parts, mine.detach().contiguous())
    return torch.cat(parts)


def mean_(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Put the mean over all processes into each of these, in place; one message for all."""
    if count() == 1 or not tensors:
        return tensors
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    if dist.get_backend() == "nccl":
        flat = flat.cuda()
    dist.all_reduce(flat)
    parts = (flat / count()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view_as(tensor))
    return tensors


def share_gradients(networks: Iterable[nn.Module]) -> None:
    """The mean of the gradients, and of the running statistics of batch normalisation."""
    if count() == 1:
        return
    networks = list(networks)
    weights = [weight for network in networks for weight in network.parameters()]
    mean_([weight.grad for weight in weights if weight.grad is not None])
    buffers = [buffer for network in networks for buffer in network.buffers()]
    mean_([buffer for buffer in buffers if buffer.is_floating_point()])
