"""Optimizers and learning-rate schedules.

Lars and Lamb are for large batches: each layer's step is scaled to the norm of its weights. Vectors (biases,
normalisation) are not scaled, as is usual. Norms are of whole layers, so that a rank must hold each parameter whole.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lockstep.parallel.strategy import Blocks
from lockstep.parallel.weight_average import keep_average
from lockstep.runtime.errors import SettingsError
from lockstep.settings import OptimizerSettings

FACTOR = "learning_rate_factor"  # of a group
NUM_NAMES = 12  # of parameters, in a message

Groups = Iterable[dict[str, Any]]


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Build the optimizer of `settings` over all parameters of `model`.

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
    """Group trainable parameters by their weight decay (all in one group, or matrices and vectors in one each), and
    those that match a pattern of `settings.groups` apart.

    The groups are the same for every part of a model; of one that has none of its parameters, a group is empty.
    """
    rest = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    special: list[dict[str, Any]] = []
    for pattern, own in settings.groups.items():
        mine = [rest.pop(name) for name in list(rest) if fnmatchcase(name, pattern)]
        factor = own.get(FACTOR, 1.0)
        by_decay = [(mine, own["weight_decay"])] if "weight_decay" in own else _by_decay(mine, settings)
        special += [
            {"params": parameters, "weight_decay": decay, "lr": factor * settings.learning_rate, FACTOR: factor}
            for parameters, decay in by_decay
        ]
    usual = _by_decay(list(rest.values()), settings)
    return [*({"params": parameters, "weight_decay": decay} for parameters, decay in usual), *special]


def _by_decay(parameters: list[nn.Parameter], settings: OptimizerSettings) -> list[tuple[list[nn.Parameter], float]]:
    if settings.decay_vectors:
        return [(parameters, settings.weight_decay)]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    return [(matrices, settings.weight_decay), (vectors, 0.0)]


def freeze(blocks: Blocks, patterns: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield `blocks`, of which the parameters that match one of `patterns` do not learn; tied ones go by their first
    name.
    """
    names = WeakIdKeyDictionary()  # no block stays in memory for its name
    for name, block in blocks:
        for inner, parameter in block.named_parameters():
            first = names.setdefault(parameter, f"{name}.{inner}")
            if any(fnmatchcase(first, pattern) for pattern in patterns):
                parameter.requires_grad_(False)
        yield name, block


def check_patterns(blocks: Blocks, settings: OptimizerSettings) -> None:
    """Check that each pattern of `freeze` and `groups` matches a parameter of `blocks`, and that some learn.

    Raises:
        SettingsError: a pattern matches none, or none learns.
    """
    if not settings.freeze and not settings.groups:
        return
    names = WeakIdKeyDictionary()
    found: dict[str, bool] = {}
    for name, block in freeze(blocks, settings.freeze):
        for inner, parameter in block.named_parameters():
            found.setdefault(names.setdefault(parameter, f"{name}.{inner}"), parameter.requires_grad)
    for pattern in settings.freeze:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise SettingsError(f"optimizer.freeze has {pattern}, which matches no parameter: {_list(found)}")
    rest = [name for name, learns in found.items() if learns]
    if not rest:
        raise SettingsError(f"optimizer.freeze is {settings.freeze}: no parameter is left that learns")
    for pattern in settings.groups:
        if not any(fnmatchcase(name, pattern) for name in rest):
            raise SettingsError(
                f"optimizer.groups has {pattern}, which matches no parameter that learns and is in no group before: "
                f"{_list(rest)}"
            )
        rest = [name for name in rest if not fnmatchcase(name, pattern)]


def _list(names: Iterable[str]) -> str:
    first = list(names)
    more = len(first) - NUM_NAMES
    return f"{', '.join(first[:NUM_NAMES]) or 'none is left'}{f' and {more} more' if more > 0 else ''}"


def learning_rate_at(step: int, num_steps: int, settings: OptimizerSettings, num_ranks: int) -> float:
    """Compute the learning rate of update `step`, 0 ... num_steps - 1: a linear warm-up, then `schedule`, all times
    `learning_rate_scale`.
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
    """Set the learning rate; a group with a factor of its own gets that many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(FACTOR, 1.0)


@cache
def _lean(kind: type[torch.optim.Optimizer]) -> Any:
    """Unwrap the methods of an optimizer class from what excludes them from compiled code: for it, PyTorch imports its
    compiler, 1.4 s of each rank's start. None of our optimizers is compiled or differentiated.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    bare = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**bare, "step": torch.no_grad()(inspect.unwrap(kind.step))})


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, algorithm 1).

    Args:
        trust: eta, the norm of a layer's step at learning rate 1, as a fraction of the norm of its weights.
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
    """Adam whose step of each layer has the norm of the layer's weights (You et al. 2020, algorithm 2)."""

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
    """Divide the norms; 1 where either is 0. Does not wait for the device."""
    known = (weight_norm > 0) & (step_norm > 0)
    return torch.where(known, weight_norm / step_norm, torch.ones_like(weight_norm))
