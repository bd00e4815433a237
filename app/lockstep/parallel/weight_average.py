"""The moving average of a model's weights (Polyak and Juditsky 1992), often better than the last ones.

It is one more entry of the optimizer's state for each parameter, so that it is saved, resumed on any number of ranks,
sharded as the parameters are, and compared over the ranks like the rest.
"""

from typing import Any

import torch

AVERAGE = "average"


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """After each step, set average = decay * average + (1 - decay) * weights; it starts as the first step's weights."""

    def follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        averages, weights = [], []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if AVERAGE in state:
                    averages.append(state[AVERAGE])
                    weights.append(parameter.detach())
                else:
                    state[AVERAGE] = torch.empty_like(parameter).copy_(parameter.detach()).detach()
        if averages:
            torch._foreach_lerp_(averages, weights, 1 - decay)

    optimizer.defaults[AVERAGE] = decay
    optimizer.register_step_post_hook(follow)


def has_average(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` keeps an average: the same on every rank, also on one that holds no parameter."""
    return AVERAGE in optimizer.defaults


@torch.no_grad()
def exchange_with_average(optimizer: torch.optim.Optimizer) -> None:
    """Exchange the weights and their average; a second call undoes it."""
    for parameter, state in optimizer.state.items():
        if AVERAGE in state:  # there is none before the first step
            before = parameter.clone()
            parameter.copy_(state[AVERAGE])
            state[AVERAGE].copy_(before)
