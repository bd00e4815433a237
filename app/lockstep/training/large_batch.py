"""Optimizers for large batches: each layer's step is made proportional to its weights.

Vectors (biases, normalisations) take the step as it is, as is usual. Norms are those of whole layers: a rank must hold
each parameter whole.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Groups = Iterable[dict[str, Any]]


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, algorithm 1).

    Args:
        trust: eta, the share of a layer's norm that a step with learning rate 1 has.
    """

    def __init__(self, groups: Groups, lr: float, momentum: float = 0.9, trust: float = 0.001) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            for parameter in _with_gradients(group):
                gradient, state = parameter.grad, self.state[parameter]
                ratio: float | Tensor = 1.0
                if parameter.dim() > 1:
                    weight_norm, gradient_norm = parameter.norm(), gradient.norm()
                    ratio = _ratio(group["trust"] * weight_norm, gradient_norm + decay * weight_norm)
                scaled = (rate * ratio) * gradient.add(parameter, alpha=decay)
                if "momentum_buffer" in state:
                    velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(scaled)
                else:
                    velocity = state["momentum_buffer"] = torch.zeros_like(parameter).copy_(scaled)
                parameter.sub_(velocity)


class Lamb(torch.optim.Optimizer):
    """Adam with a step for each layer that is as long as its weights (You et al. 2020, algorithm 2)."""

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in _with_gradients(group):
                gradient, state = parameter.grad, self.state[parameter]
                if "step" not in state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] += 1
                step = float(state["step"])
                mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1**step)
                square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                update = mean / ((square / (1 - beta2**step)).sqrt() + group["eps"])
                update.add_(parameter, alpha=group["weight_decay"])
                ratio = _ratio(parameter.norm(), update.norm()) if parameter.dim() > 1 else 1.0
                parameter.sub_(group["lr"] * ratio * update)


def _with_gradients(group: dict[str, Any]) -> list[Any]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _ratio(weight_norm: Tensor, step_norm: Tensor) -> Tensor:
    """1 where either is 0, and nothing is known of the layer. No wait for the device."""
    known = (weight_norm > 0) & (step_norm > 0)
    return torch.where(known, weight_norm / step_norm, torch.ones_like(weight_norm))
