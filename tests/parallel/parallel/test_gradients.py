"""What becomes of gradients between the ranks: buckets, wire types, Adasum, micro-batches."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockstep.comm import backend
from lockstep.comm.cluster import Cluster
from lockstep.data.batch import DataBatch
from lockstep.parallel.replicated import Replicated, sum_over_wire_
from lockstep.parallel.step import train_step
from lockstep.runtime.errors import NonFiniteError, SettingsError
from lockstep.settings import GradientSettings
from tests.parallel.building import CrossEntropy, make_batch


def _model() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(20, 7), nn.Linear(7, 3))
    return model.double().to(memory_format=torch.channels_last)


def _batch(cluster: Cluster, num_samples: int) -> DataBatch:
    return make_batch(cluster.rank, cluster.size, num_samples)


def _gradients(cluster: Cluster, settings: GradientSettings, num_updates: int = 3) -> dict[str, Tensor]:
    """Those of the last of some updates without a change of the model, so that each gives the same."""
    model = _model()
    strategy = Replicated(model, torch.optim.SGD(model.parameters(), lr=0.0), cluster, settings)
    for _ in range(num_updates):
        metric_sums = train_step(strategy, _batch(cluster, 11), CrossEntropy(), seed=0)
        assert cluster.sum_(metric_sums, name="metric_sums")[2] == 11
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.world_size(3)
@pytest.mark.parametrize("bucket_kib", [None, 0.001, 1.0])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 9])
def test_buckets_and_micro_batches_give_the_exact_mean(
    cluster: Cluster, bucket_kib: float | None, num_micro_batches: int
) -> None:
    """9 pieces of at most 4 samples: a rank has fewer of them than asked for, and than another rank."""
    size = bucket_kib / 1024 if bucket_kib else None
    settings = GradientSettings(bucket_mib=size, num_micro_batches=num_micro_batches)
    gradients = _gradients(cluster, settings)
    reference = _model()
    whole = _batch(Cluster.alone(), 11)
    F.cross_entropy(reference(whole.inputs), whole.data[1]).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.world_size(3)
def test_all_buckets_but_the_last_leave_during_the_last_backward_pass(cluster: Cluster) -> None:
    model = _model()
    settings = GradientSettings(bucket_mib=1e-6, num_micro_batches=2)
    strategy = Replicated(model, torch.optim.SGD(model.parameters(), lr=0.0), cluster, settings)
    for send in (False, True):
        with nullcontext() if send else strategy.local_gradients():
            strategy.forward_backward(_batch(cluster, 11), CrossEntropy(), 0)
        left = [bucket.arrives is not None for bucket in strategy.gradients._buckets]
        assert left == [send] * (len(left) - 1) + [False]
    strategy.gradients.reduce()


@pytest.mark.world_size(3)
def test_a_parameter_without_a_gradient_does_not_hold_up_its_bucket(cluster: Cluster) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(18, 3), nn.Linear(9, 9)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.used(x.flatten(1))
            return output

    model = Idle().double()
    settings = GradientSettings(bucket_mib=1e-6)
    strategy = Replicated(model, torch.optim.SGD(model.parameters(), lr=0.0), cluster, settings)
    for _ in range(2):
        train_step(strategy, _batch(cluster, 11), CrossEntropy(), seed=0)
    assert model.idle.weight.grad is not None
    assert not model.idle.weight.grad.any()
    assert model.used.weight.grad is not None
    assert model.used.weight.grad.any()


@pytest.mark.world_size(3)
def test_nan_in_a_bucket_that_has_left_stops_all_ranks_and_the_next_update_is_whole(cluster: Cluster) -> None:
    model = _model()
    settings = GradientSettings(bucket_mib=1e-6, num_micro_batches=2)
    strategy = Replicated(model, torch.optim.SGD(model.parameters(), lr=0.0), cluster, settings)
    batch = _batch(cluster, 11)
    bad = replace(batch, inputs=batch.inputs * (float("nan") if cluster.rank == 1 else 1.0))
    with pytest.raises(NonFiniteError, match="the loss on rank 1"):
        train_step(strategy, bad, CrossEntropy(), seed=0)
    train_step(strategy, batch, CrossEntropy(), seed=0)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.world_size(3)
@pytest.mark.parametrize(("wire", "bits"), [("bf16", 8), ("fp16", 11)])
def test_two_bytes_on_the_wire_round_twice_and_leave_all_ranks_with_the_same(
    cluster: Cluster, wire: str, bits: int
) -> None:
    """Each addend and the sum are off by half a unit in the last of `bits` places at most, so by 2^-bits of the sum of
    magnitudes, twice."""
    settings = GradientSettings(wire=wire, bucket_mib=1e-6)  # type: ignore[arg-type]
    gradients = _gradients(cluster, settings)
    exact = _gradients(cluster, GradientSettings())
    magnitudes = {
        name: cluster.sum_(_own(cluster)[name].abs().contiguous(), name=f"magnitude.{name}") for name in exact
    }
    for name, gradient in gradients.items():
        assert not torch.equal(gradient, exact[name])
        assert ((gradient - exact[name]).abs() <= 2 * 2.0**-bits * magnitudes[name] + 1e-7).all(), name
        everyone = cluster.all_gather_object(gradient.tolist())
        assert all(other == everyone[0] for other in everyone)


def _own(cluster: Cluster) -> dict[str, Tensor]:
    """This rank's part of the mean gradient."""
    model, batch = _model(), _batch(cluster, 11)
    (F.cross_entropy(model(batch.inputs), batch.data[1], reduction="sum") / 11).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.world_size(3)
@pytest.mark.parametrize("num_elements", [0, 1, 3, 10])
def test_any_length_goes_over_the_wire(cluster: Cluster, num_elements: int) -> None:
    tensor = torch.arange(num_elements, dtype=torch.float32) * (cluster.rank + 1)
    sum_over_wire_(cluster, tensor, torch.bfloat16, name="test")
    assert tensor.tolist() == [6.0 * index for index in range(num_elements)]


@pytest.mark.world_size(2)
def test_adasum_combines_each_tensor_of_the_ranks_own_means(cluster: Cluster) -> None:
    """Maleki et al. 2020, equation 2: (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b, layer by layer."""
    gradients = _gradients(cluster, GradientSettings(reduction="adasum"))
    model, batch = _model(), _batch(cluster, 11)
    F.cross_entropy(model(batch.inputs), batch.data[1]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        a, b = (
            torch.tensor(of_rank, dtype=torch.float64) for of_rank in cluster.all_gather_object(parameter.grad.tolist())
        )
        dot = (a * b).sum()
        expected = (1 - dot / (2 * (a * a).sum())) * a + (1 - dot / (2 * (b * b).sum())) * b
        torch.testing.assert_close(gradients[name], expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.world_size(3)
def test_adasum_refuses_three_ranks(cluster: Cluster) -> None:
    with pytest.raises(SettingsError, match="adasum on 3 ranks") as caught:
        Replicated(_model(), torch.optim.SGD(_model().parameters()), cluster, GradientSettings(reduction="adasum"))
    assert caught.value.shared


@pytest.mark.world_size(2)
def test_adasum_refuses_what_it_cannot_count(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    num_elements = sum(parameter.numel() for parameter in model.parameters())
    settings = GradientSettings(reduction="adasum")
    monkeypatch.setattr(backend, "MAX_PER_CALL", num_elements)
    Replicated(model, torch.optim.SGD(model.parameters()), cluster, settings)
    monkeypatch.setattr(backend, "MAX_PER_CALL", num_elements - 1)
    with pytest.raises(SettingsError, match=f"adasum for {num_elements:,} parameters") as caught:
        Replicated(model, torch.optim.SGD(model.parameters()), cluster, settings)
    assert caught.value.shared
