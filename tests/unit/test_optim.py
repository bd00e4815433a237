"""Optimizers and the learning rate as a pure function of the step."""

import pytest
import torch

from app.config import OptimizerSettings
from app.models.net import Net
from app.training.optim import build_optimizer, learning_rate_at, set_learning_rate


def test_net_has_the_seeds_parameters_and_gives_log_probabilities() -> None:
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
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (settings.learning_rate, decay)
    if kind is torch.optim.SGD:
        assert group["momentum"] == 0.8
    set_learning_rate(optimizer, 0.7)
    assert group["lr"] == 0.7
