"""Optimizers and learning-rate schedules."""

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from lockstep.parallel.weight_average import keep_average
from lockstep.settings import OptimizerSettings
from lockstep.training.large_batch import Lamb, Lars


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of `settings` over all parameters of `model`, made once and kept through the run.

    SGD and Adam are fused: one pass over the parameters, where PyTorch's default on CPUs makes one for each operation.
    """
    rate, groups, momentum = settings.learning_rate, parameter_groups(model, settings), settings.momentum
    build: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: _lean(torch.optim.SGD)(groups, lr=rate, momentum=momentum, fused=True),
        "adam": lambda: _lean(torch.optim.Adam)(groups, lr=rate, fused=True),
        "adamw": lambda: _lean(torch.optim.AdamW)(groups, lr=rate, fused=True),
        "lars": lambda: _lean(Lars)(groups, lr=rate, momentum=momentum),
        "lamb": lambda: _lean(Lamb)(groups, lr=rate),
    }
    optimizer = build[settings.name]()
    if settings.average_decay is not None:
        keep_average(optimizer, settings.average_decay)
    return optimizer


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """All parameters that learn, with their weight decay: in one group, or matrices and vectors each in their own."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = settings.weight_decay
    if settings.decay_vectors:
        return [{"params": parameters, "weight_decay": decay}]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def learning_rate_at(step: int, num_steps: int, settings: OptimizerSettings, num_ranks: int) -> float:
    """The learning rate of update `step`, 0 ... num_steps - 1: a linear warm-up, then as `schedule` says.

    All of it is times `learning_rate_scale`.
    """
    highest = settings.learning_rate * learning_rate_scale(settings, num_ranks)
    warmup = settings.warmup_steps
    if step < warmup:
        return highest * (step + 1) / warmup
    if settings.schedule == "constant":
        return highest
    if settings.schedule == "step":
        return highest * settings.step_factor ** sum(step >= share * num_steps for share in settings.step_at)
    done = (step - warmup) / max(1, num_steps - warmup)
    return highest * (1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def learning_rate_scale(settings: OptimizerSettings, num_ranks: int) -> int:
    """`num_ranks` with `scale_learning_rate` (Goyal et al. 2017, section 2.1), else 1."""
    return num_ranks if settings.scale_learning_rate else 1


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@cache
def _lean(kind: type[torch.optim.Optimizer]) -> Any:
    """`kind` without what keeps its methods out of compiled code, for which PyTorch imports its compiler: 1.4 s of each
    rank's start. No optimizer of ours is compiled, or differentiated.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    bare = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**bare, "step": torch.no_grad()(inspect.unwrap(kind.step))})
