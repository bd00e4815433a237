"""Networks as lists of blocks."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from lockstep.models.networks import Net, net_blocks, vit_blocks
from lockstep.settings import OptimizerSettings, Settings
from lockstep.settings.reading import parse_settings
from lockstep.training.optim import parameter_groups


def _vit(**changes: Any) -> nn.Sequential:
    size = {"width": 32, "depth": 3, "num_heads": 4, "patch_size": 7, "dropout": 0.0, **changes}
    return nn.Sequential(OrderedDict(vit_blocks(**size)))


def test_a_vision_transformer_gives_log_probabilities_in_the_type_of_its_weights() -> None:
    for dtype in (torch.float32, torch.float64):
        output = _vit().to(dtype)(torch.rand(5, 1, 28, 28, dtype=dtype))
        assert (output.shape, output.dtype) == ((5, 10), dtype)
        assert output.exp().sum(1).tolist() == pytest.approx([1] * 5, rel=1e-5)
    assert _vit().eval()(torch.rand(0, 1, 28, 28)).shape == (0, 10)


def test_its_size_is_12_depth_width_squared() -> None:
    num_parameters = sum(parameter.numel() for parameter in _vit(width=256, depth=8).parameters())
    assert num_parameters == pytest.approx(12 * 8 * 256**2, rel=0.02)


def test_the_order_of_patches_matters_to_it() -> None:
    torch.manual_seed(0)
    model, images = _vit().eval(), torch.rand(2, 1, 28, 28)
    assert not torch.allclose(model(images), model(images.roll(7, dims=2)), atol=1e-4)


def test_net_is_the_list_of_its_blocks_under_the_references_names() -> None:
    parameters = [name for name, _ in Net().named_parameters()]
    assert parameters == [
        f"{layer}.{kind}" for layer in ("conv1", "conv2", "fc1", "fc2") for kind in ("weight", "bias")
    ]
    assert [name for name, _ in net_blocks()] == [name for name, _ in Net().named_children()]


def test_log_probabilities_are_in_full_where_layers_are_in_bfloat16() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert Net()(torch.rand(2, 1, 28, 28)).dtype == torch.float32


def test_biases_and_normalisations_need_not_decay() -> None:
    model = _vit()
    matrices, vectors = parameter_groups(model, OptimizerSettings(weight_decay=0.1, decay_vectors=False))
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() > 1 for parameter in matrices["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
    (both,) = parameter_groups(model, OptimizerSettings(weight_decay=0.1))
    assert len(both["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_not_for_the_optimizer() -> None:
    model = _vit()
    model[0].requires_grad_(False)
    (group,) = parameter_groups(model, OptimizerSettings())
    assert all(parameter.requires_grad for parameter in group["params"])


def test_where_the_model_lives_is_one_setting() -> None:
    settings, _ = parse_settings(["--parallel", "pipeline", "--pipeline.cuts", "[conv2, fc1]", "--model.name", "vit"])
    assert (settings.parallel, settings.pipeline.cuts, settings.model.name) == ("pipeline", ["conv2", "fc1"], "vit")
    assert Settings().parallel == "replicated"
