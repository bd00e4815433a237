"""Measure the network of a job, and forecast runs on more ranks from it.

An all-reduce of S bytes over n ranks is modelled to take

    T(n, S) = c + 2 log2(n) alpha + 2 (n - 1) / n * S * beta

(Thakur, Rabenseifner and Gropp 2005, section 4.5). alpha, the latency of a message, is measured by a barrier, which
takes log2(n) of them. beta, the time per byte, and c, Horovod's overhead per all-reduce, are fitted to measured times.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from lockstep.comm.cluster import Cluster
from lockstep.parallel.replicated import WIRE_TYPES, sum_over_wire_

SIZES = [2**exponent for exponent in range(10, 27, 2)]  # bytes
NUM_BARRIERS = 200
SECONDS_PER_SIZE = 1.0
FORECAST_RANKS = [4, 16, 64, 256, 1024, 4096]


@dataclass(frozen=True)
class Fit:
    """The parameters of the model above: alpha and constant in seconds, beta in seconds per byte."""

    alpha: float
    beta: float
    constant: float

    def seconds(self, num_ranks: int, num_bytes: float) -> float:
        """T(n, S)."""
        if num_ranks == 1:
            return 0.0
        return self.constant + 2 * math.log2(num_ranks) * self.alpha + bus_bytes(num_ranks, num_bytes) * self.beta

    def efficiency(self, num_ranks: int, num_bytes: float, compute_seconds: float) -> float:
        """Weak scaling: the speed of each of `num_ranks` relative to a rank that does not communicate."""
        return compute_seconds / (compute_seconds + self.seconds(num_ranks, num_bytes))


def bus_bytes(num_ranks: int, num_bytes: float) -> float:
    """The bytes that each rank must send, at least, in an all-reduce of `num_bytes`: 2 (n - 1) / n times as many."""
    return 2 * (num_ranks - 1) / num_ranks * num_bytes


def fit_alpha_beta(num_ranks: int, alpha: float, seconds: dict[int, float]) -> Fit:
    """Fit beta and the constant by least squares of the *relative* errors, so that small messages count as much.

    Args:
        alpha: latency of a message in seconds.
        seconds: seconds of an all-reduce, by its bytes.
    """
    sizes, times = np.array(list(seconds)), np.array(list(seconds.values()))
    rows = np.stack([np.ones(len(sizes)), bus_bytes(num_ranks, 1) * sizes], axis=1) / times[:, None]
    start, beta = np.linalg.lstsq(rows, np.ones(len(sizes)), rcond=None)[0]
    return Fit(alpha, max(0.0, float(beta)), max(0.0, float(start) - 2 * math.log2(num_ranks) * alpha))


def measure_alpha(cluster: Cluster) -> float:
    """Collective: the latency of a message in seconds: the time of a barrier / log2(n)."""
    cluster.barrier()
    started = time.perf_counter()
    for _ in range(NUM_BARRIERS):
        cluster.barrier()
    return (time.perf_counter() - started) / NUM_BARRIERS / max(1.0, math.log2(cluster.size))


def measure_all_reduce(cluster: Cluster, sizes: Sequence[int]) -> dict[int, float]:
    """Collective: median seconds of a float32 all-reduce, by its bytes."""
    return {size: _median(cluster, lambda tensor: cluster.sum_(tensor, name="benchmark"), size) for size in sizes}


def measure_wires(cluster: Cluster, num_bytes: int) -> dict[str, float]:
    """Collective: median seconds of an all-reduce of `num_bytes` of float32, by the data type that is sent."""
    seconds = {"float32": measure_all_reduce(cluster, [num_bytes])[num_bytes]}
    for name, wire in WIRE_TYPES.items():
        seconds[name] = _median(cluster, partial(_sum_over_wire, cluster, wire), num_bytes)
    return seconds


def _sum_over_wire(cluster: Cluster, wire: torch.dtype, tensor: torch.Tensor) -> None:
    sum_over_wire_(cluster, tensor, wire, name="benchmark")


def measure_copy(cluster: Cluster, sizes: Sequence[int]) -> dict[int, float]:
    """Collective: median seconds of a memory copy by all ranks at once, by its bytes."""
    return {size: _median(cluster, torch.clone, size) for size in sizes}


def _median(cluster: Cluster, function: Callable[[torch.Tensor], object], num_bytes: int) -> float:
    """Collective: the median seconds of `function` over several calls, all ranks starting together.

    Returns the mean of the ranks' medians, so that all ranks have the same number.
    """
    tensor = torch.zeros(max(1, num_bytes // 4), device=cluster.device)
    seconds: list[float] = []
    function(tensor)
    one_call = sum(cluster.all_gather_object(_time(cluster, function, tensor))) / cluster.size
    for _ in range(max(5, min(50, int(SECONDS_PER_SIZE / max(one_call, 1e-6))))):
        seconds.append(_time(cluster, function, tensor))
    return statistics.mean(cluster.all_gather_object(statistics.median(seconds)))


def _time(cluster: Cluster, function: Callable[[torch.Tensor], object], tensor: torch.Tensor) -> float:
    cluster.barrier()
    started = time.perf_counter()
    function(tensor)
    if cluster.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
