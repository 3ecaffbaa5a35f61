"""A training step as a function of nothing, for a clock: losses, their backward, clipping and the optimizer, as in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Highest learning rate of a measured step. It changes no time, and weights that stay as they are keep as many tokens in every round.
_RATE = 1e-5


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=_RATE, fused=True)


@dataclass(frozen=True)
class Update:
    """What turns the losses of a step into new weights.

    Attributes:
        optimizer: makes the optimizer of a model.
        clip: largest norm of the gradient; 0 does not clip.
        accumulate: batches of a step.
    """

    optimizer: Callable[[Any], torch.optim.Optimizer] = _adamw
    clip: float = 0.0
    accumulate: int = 1


class TrainingStep:
    """A training step of one model. Learning rates are at most 1e-5.

    Args:
        model: dense or compressed model on its device; put into training mode, and trained by every call.
        loss: the loss of a batch, a function of it and of what the step is called with.
        batches: batches without end, on the model's device.
        update: what turns losses into new weights.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], batches: Iterator[Mapping[str, Any]], update: Update) -> None:
        self.model = model.train()
        self.loss = loss
        self.batches = batches
        self.update = update
        self.optimizer = update.optimizer(model)
        for group in self.optimizer.param_groups:
            group["lr"] = min(group["lr"], _RATE)
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def __call__(self, *given: Any) -> None:
        """One step; ``given`` are further arguments of the loss."""
        # First, so that the last step's gradients take no memory beside this one's activations.
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.update.accumulate):
            self.backward(*given)
        if self.update.clip:
            nn.utils.clip_grad_norm_(self.trained, self.update.clip)
        self.optimizer.step()

    def backward(self, *given: Any) -> None:
        """Forward and backward of one batch."""
        (self.loss(next(self.batches), *given) / self.update.accumulate).backward()
