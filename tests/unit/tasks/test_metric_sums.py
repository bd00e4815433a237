"""Metrics as sums: means and counts in one vector."""

from typing import Any

import pytest
import torch

from lockstep.runtime.errors import UserCodeError
from lockstep.tasks.metric_sums import MetricLayout, check_metrics

CPU = torch.device("cpu")


def test_means_and_counts_come_back_from_the_sums_of_batches() -> None:
    batches: list[dict[str, Any]] = [
        {"loss": (torch.tensor(3.0), 2), "pairs": torch.tensor([[1, 0], [2, 4]]), "seldom": (0.0, 0)},
        {"loss": (torch.tensor(5.0), 6), "pairs": torch.tensor([[1, 1], [0, 0]]), "seldom": (0.0, 0)},
    ]
    layout = MetricLayout.of(batches[0])
    assert layout.size == 2 + 4 + 2
    means, counts = layout.unpack(sum(layout.pack(batch, CPU) for batch in batches))  # type: ignore[arg-type]
    assert means == {"loss": 1.0}  # of what nobody has counted there is no mean
    assert counts["pairs"].tolist() == [[2, 1], [2, 4]]


def test_the_order_of_a_batchs_metrics_does_not_matter() -> None:
    """A user's may come from a set, whose order differs from process to process."""
    layout = MetricLayout.of({"a": (1.0, 2), "b": (3.0, 4)})
    assert layout.pack({"b": (3.0, 4), "a": (1.0, 2)}, CPU).tolist() == [1, 2, 3, 4]


def test_metrics_that_change_are_told() -> None:
    layout = MetricLayout.of({"loss": (1.0, 1)})
    with pytest.raises(UserCodeError, match="all need the same"):
        layout.pack({"loss": (1.0, 1), "more": (1.0, 1)}, CPU)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (3.0, "must return a dictionary of metrics, and returned float"),
        ({"accuracy": 0.5}, r"must give accuracy as \(sum, weight\)"),
        ({"accuracy": (1, 2, 3)}, r"must give accuracy as \(sum, weight\)"),
        ({"accuracy": (torch.zeros(2), 1)}, r"must give accuracy as \(sum, weight\)"),
    ],
)
def test_what_is_no_metric_is_told(found: Any, told: str) -> None:
    with pytest.raises(UserCodeError, match=f"my.Task.metrics {told}"):
        check_metrics(found, "my.Task.metrics")
