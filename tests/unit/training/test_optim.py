"""Optimizers and the learning rate as a pure function of the step."""

import sys
from typing import Any

import pytest
import torch

from lockstep.models.networks import Net
from lockstep.parallel.weight_average import exchange_with_average, has_average
from lockstep.settings import OptimizerSettings
from lockstep.training.optim import Lamb, Lars, build_optimizer, learning_rate_at, set_learning_rate
from tests.launching import ROOT, launch


def test_net_has_the_references_parameters_and_gives_log_probabilities() -> None:
    net = Net()
    assert sum(parameter.numel() for parameter in net.parameters()) == 1_199_882
    output = net(torch.rand(3, 1, 28, 28))
    assert output.shape == (3, 10)
    assert output.exp().sum(1).tolist() == pytest.approx([1, 1, 1], rel=1e-5)


def test_net_drops_units_in_training_only() -> None:
    net, images = Net(), torch.rand(2, 1, 28, 28)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))
    calm = Net(dropout1=0, dropout2=0)
    assert torch.equal(calm(images), calm(images))


def test_a_constant_rate_stays() -> None:
    settings = OptimizerSettings(learning_rate=0.3, schedule="constant")
    assert {learning_rate_at(step, 10, settings, num_ranks=4) for step in range(10)} == {0.3}


def test_the_warm_up_rises_linearly_to_the_highest_rate() -> None:
    settings = OptimizerSettings(learning_rate=0.4, schedule="constant", warmup_steps=4)
    assert [learning_rate_at(step, 10, settings, 1) for step in range(6)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    )


def test_the_cosine_falls_from_the_highest_rate_to_0() -> None:
    settings = OptimizerSettings(learning_rate=0.4, schedule="cosine", warmup_steps=2)
    rates = [learning_rate_at(step, 12, settings, 1) for step in range(13)]
    assert rates[2] == pytest.approx(0.4)
    assert rates[7] == pytest.approx(0.2)
    assert rates[12] == pytest.approx(0, abs=1e-15)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_the_rate_grows_with_the_ranks_only_where_asked() -> None:
    plain = OptimizerSettings(learning_rate=0.1, schedule="constant")
    scaled = OptimizerSettings(learning_rate=0.1, schedule="constant", scale_learning_rate=True)
    assert learning_rate_at(0, 10, plain, num_ranks=8) == 0.1
    assert learning_rate_at(0, 10, scaled, num_ranks=8) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("settings", "kind", "decay"),
    [
        (OptimizerSettings(name="sgd", momentum=0.8, weight_decay=0.1), torch.optim.SGD, 0.1),
        (OptimizerSettings(name="adam", weight_decay=0.2), torch.optim.Adam, 0.2),
        (OptimizerSettings(name="adamw", weight_decay=0.3), torch.optim.AdamW, 0.3),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_optimizer_is_the_one_asked_for(
    settings: OptimizerSettings, kind: type[torch.optim.Optimizer], decay: float
) -> None:
    optimizer = build_optimizer(Net(), settings)
    assert isinstance(optimizer, kind)
    assert type(optimizer).__name__ == kind.__name__
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (settings.learning_rate, decay)
    if kind is torch.optim.SGD:
        assert group["momentum"] == 0.8
    set_learning_rate(optimizer, 0.7)
    assert group["lr"] == 0.7


def test_the_line_falls_to_0_and_the_steps_fall_where_they_say() -> None:
    line = OptimizerSettings(learning_rate=0.4, schedule="linear", warmup_steps=2)
    assert [learning_rate_at(step, 10, line, 1) for step in (1, 2, 6, 10)] == pytest.approx([0.4, 0.4, 0.2, 0.0])
    steps = OptimizerSettings(learning_rate=0.8, schedule="step", step_at=[0.5, 0.7], step_factor=0.25)
    rates = [learning_rate_at(step, 10, steps, 1) for step in range(10)]
    assert rates == pytest.approx([0.8] * 5 + [0.2] * 2 + [0.05] * 3)


def _layers() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    matrix, vector = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (4,)))
    return torch.nn.Parameter(matrix), torch.nn.Parameter(vector)


def _gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (4,))]


def test_lars_is_algorithm_1() -> None:
    parameters = _layers()
    optimizer = Lars([{"params": parameters, "weight_decay": 0.1}], lr=0.5, momentum=0.9, trust=0.02)
    expected = [parameter.detach().clone() for parameter in parameters]
    velocities = [torch.zeros_like(tensor) for tensor in expected]
    for step in range(3):
        for index, gradient in enumerate(_gradients(step)):
            parameters[index].grad = gradient
            weights = expected[index]
            norms = float((weights**2).sum()) ** 0.5, float((gradient**2).sum()) ** 0.5
            local = 0.02 * norms[0] / (norms[1] + 0.1 * norms[0]) if index == 0 else 1.0
            velocities[index] = 0.9 * velocities[index] + 0.5 * local * (gradient + 0.1 * weights)
            expected[index] = weights - velocities[index]
        optimizer.step()
    for parameter, tensor in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), tensor, rtol=1e-12, atol=1e-12)


def test_lamb_is_algorithm_2() -> None:
    parameters = _layers()
    optimizer = Lamb([{"params": parameters, "weight_decay": 0.1}], lr=0.05)
    expected = [parameter.detach().clone() for parameter in parameters]
    means, squares = ([torch.zeros_like(tensor) for tensor in expected] for _ in range(2))
    for step in range(1, 4):
        for index, gradient in enumerate(_gradients(step)):
            parameters[index].grad = gradient
            means[index] = 0.9 * means[index] + 0.1 * gradient
            squares[index] = 0.999 * squares[index] + 0.001 * gradient**2
            mean, square = means[index] / (1 - 0.9**step), squares[index] / (1 - 0.999**step)
            update = mean / (square.sqrt() + 1e-6) + 0.1 * expected[index]
            norms = float((expected[index] ** 2).sum()) ** 0.5, float((update**2).sum()) ** 0.5
            expected[index] = expected[index] - 0.05 * (norms[0] / norms[1] if index == 0 else 1.0) * update
        optimizer.step()
    for parameter, tensor in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", [Lars, Lamb])
def test_a_layer_of_zeros_can_learn(optimizer: type[Lars] | type[Lamb]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    parameter.grad = torch.ones(2, 2, dtype=torch.float64)
    optimizer([{"params": [parameter]}], lr=0.1).step()
    assert parameter.detach().abs().min() > 0.05


@pytest.mark.parametrize("name", ["sgd", "adam", "lars", "lamb"])
def test_the_average_follows_the_weights(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    optimizer = build_optimizer(model, OptimizerSettings(name=name, average_decay=0.75))  # type: ignore[arg-type]
    expected: torch.Tensor | None = None
    for _ in range(5):
        model(torch.ones(1, 3, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        weights = model.weight.detach().clone()
        expected = weights if expected is None else 0.75 * expected + 0.25 * weights
    assert expected is not None
    assert has_average(optimizer)
    exchange_with_average(optimizer)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=1e-12)
    exchange_with_average(optimizer)
    assert torch.equal(model.weight.detach(), weights)


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_without_the_compiler_every_bit_is_the_same(name: Any, kind: type[torch.optim.Optimizer]) -> None:
    settings = OptimizerSettings(name=name, momentum=0.9, weight_decay=0.01)
    options: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {}
    torch.manual_seed(0)
    models = [torch.nn.Linear(7, 5) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    theirs = kind(models[1].parameters(), lr=settings.learning_rate, weight_decay=0.01, fused=True, **options)  # type: ignore[call-arg]
    optimizers = [build_optimizer(models[0], settings), theirs]
    for _ in range(4):
        inputs = torch.randn(3, 7)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    assert torch.equal(models[0].weight, models[1].weight)
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for index, state in states[1]["state"].items():
        assert all(torch.equal(value, states[0]["state"][index][key]) for key, value in state.items())
    optimizers[0].load_state_dict(states[1])


def test_pytorchs_compiler_is_not_imported_for_an_optimizer() -> None:
    """A second and a half of each rank's start."""
    code = """
import sys, torch
from lockstep.settings import OptimizerSettings
from lockstep.training.optim import build_optimizer
for name in ("sgd", "adam", "adamw", "lars", "lamb"):
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimizerSettings(name=name, average_decay=0.9))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
"""
    finished = launch([sys.executable, "-c", code], cwd=ROOT)
    assert finished.returncode == 0, finished.output
