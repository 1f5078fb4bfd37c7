"""From a loss to changed weights: scaled for fp16, meant over processes, clipped, checked."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from training import processes
from training.errors import TrainingError

Precision = Literal["fp32", "bf16", "fp16"]
"""Of the middle of the networks; losses, first and last layers, weights and optimisers are fp32."""
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, images: Tensor) -> AbstractContextManager[None]:
    """Within it networks compute in `precision`, on the device of `images`."""
    kind = _TYPES[precision]
    return torch.autocast(images.device.type, kind, enabled=precision != "fp32")


class Descent:
    """Steps of the optimisers of one recipe."""

    def __init__(self, precision: Precision, clip: float) -> None:
        """`clip`: largest norm of a gradient; 0: any."""
        self.clip = clip
        self.scaler: torch.amp.GradScaler | None = None
        if precision == "fp16":
            place = "cuda" if torch.cuda.is_available() else "cpu"
            self.scaler = torch.amp.GradScaler(place)

    def __call__(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        networks: Sequence[nn.Module],
        step: int,
    ) -> None:
        """One step of `optimizer`, which holds the weights of `networks`, down `loss`.

        With fp16 a gradient that overflows is left out and the scale halved.

        Raises:
            TrainingError: the gradient is not finite; no weight has been changed by it.
        """
        optimizer.zero_grad(set_to_none=True)
        scaler = self.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        processes.share_gradients(networks)
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = self._clipped([w for network in networks for w in network.parameters()])
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        elif torch.isfinite(norm):
            optimizer.step()
        else:
            names = " and ".join(sorted({type(network).__name__ for network in networks}))
            raise TrainingError(
                f"step {step}: the gradient of {names} is not finite; lower the learning rate"
            )

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(state))

    def _clipped(self, weights: Sequence[Tensor]) -> Tensor:
        """The norm of the gradient, clipped where it is to be."""
        if self.clip > 0:
            return nn.utils.clip_grad_norm_(weights, self.clip)
        return nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
