"""The pure parts of the benchmarks, and how they refuse."""

import math

import pytest

from lockstep.benchmark.communication import Fit, bus_bytes, fit_alpha_beta
from lockstep.benchmark.launching import _efficiency
from lockstep.benchmark.throughput import Throughput, _split


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_the_fit_finds_what_made_the_times(num_ranks: int) -> None:
    truth = Fit(alpha=5e-6, beta=1e-10, constant=4e-4)
    found = fit_alpha_beta(num_ranks, 5e-6, {2**n: truth.seconds(num_ranks, 2**n) for n in range(10, 27)})
    assert (found.alpha, found.beta, found.constant) == pytest.approx((5e-6, 1e-10, 4e-4), rel=1e-9)


def test_the_forecast_is_that_of_its_formula() -> None:
    fit = Fit(alpha=1e-5, beta=1e-9, constant=1e-4)
    assert fit.seconds(1, 10**6) == 0
    assert fit.seconds(4, 10**6) == pytest.approx(1e-4 + 4 * 1e-5 + 1.5e6 * 1e-9)
    assert fit.efficiency(4, 10**6, compute_seconds=0.1) == pytest.approx(0.1 / (0.1 + 1.64e-3))
    assert fit.efficiency(4096, 10**6, 0.1) < fit.efficiency(64, 10**6, 0.1) < 1


def test_a_ring_sends_nearly_twice_the_bytes() -> None:
    assert bus_bytes(2, 100) == 100
    assert math.isclose(bus_bytes(10**6, 100), 200, rel_tol=1e-5)


def test_the_rank_that_enters_last_tells_what_the_all_reduce_takes() -> None:
    """Two ranks, one update: (sampler, whole, in the strategy, in the all-reduce), in seconds."""
    split = _split([[(0.001, 0.098, 0.09, 0.05)], [(0.003, 0.098, 0.09, 0.01)]])
    assert split == pytest.approx(
        {
            "sampler": 2,
            "forward, backward, check, step": 60,
            "waiting for the slowest rank": 20,
            "all-reduce": 10,
            "ledger, replica check, run log": 8,
        }
    )
    assert sum(split.values()) == pytest.approx(100)


def test_ratios_are_taken_round_by_round() -> None:
    found = Throughput(run=[90, 50], limit=[100, 100], ideal=[100, 50], split={})
    assert found.ratios(found.limit) == [0.9, 0.5]
    assert found.ratios(found.ideal) == [0.9, 1.0]


def test_efficiency_is_to_the_fewest_ranks_and_leaves_out_what_failed() -> None:
    medians = {"weak, 1 ranks": 100.0, "weak, 4 ranks": 300.0, "strong, 4 ranks": 300.0}
    assert _efficiency(medians, "weak", [1, 2, 4]) == {1: 1.0, 4: 0.75}
    assert _efficiency(medians, "strong", [1, 4]) == {}
