"""Plot the results of benchmarks. Only rank 0 imports this, after measuring, since matplotlib takes memory."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")  # no display is needed; must come before pyplot is imported

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

if TYPE_CHECKING:  # at run time, these imports would start MPI
    from lockstep.benchmark.communication import Fit
    from lockstep.benchmark.throughput import Throughput


def plot_throughput(found: "Throughput") -> Figure:
    """Plot images/s by round, and how the time of an update is spent."""
    figure, (rates, split) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = {
        "run": "the run as launched",
        "limit": "without communication",
        "ideal": "the same, waiting for the slowest",
    }
    for kind, style in (("limit", "k--"), ("ideal", "k:"), ("run", "o-")):
        values = getattr(found, kind)
        if values:
            rates.plot(range(1, len(values) + 1), values, style, label=names[kind])
    rates.set(xlabel="round", ylabel="images/s", ylim=(0, None))
    rates.legend(loc="lower right")
    split.barh(list(found.split), list(found.split.values()))
    split.invert_yaxis()
    split.set(xlabel="ms of an update", xscale="log")
    return figure


def plot_communication(
    num_ranks: int,
    all_reduce: dict[int, float],
    copy: dict[int, float],
    fit: "Fit",
    num_bytes: int,
    compute_seconds: float,
) -> Figure:
    """Plot the all-reduce by size with its fit and a memory copy, and the forecast of the efficiency."""
    figure, (times, forecast) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    sizes = list(all_reduce)
    times.loglog(sizes, [seconds * 1e3 for seconds in all_reduce.values()], "o", label=f"all-reduce, {num_ranks} ranks")
    times.loglog(sizes, [fit.seconds(num_ranks, size) * 1e3 for size in sizes], "-", label="fit")
    times.loglog(sizes, [copy[size] * 1e3 for size in sizes], "k--", label="a memory copy")
    times.axvline(num_bytes, color="gray", linewidth=0.8, label="the gradient")
    times.set(xlabel="bytes", ylabel="ms")
    times.legend()
    ranks = [2**exponent for exponent in range(13)]
    forecast.semilogx(ranks, [fit.efficiency(n, num_bytes, compute_seconds) for n in ranks], "o-", base=2)
    forecast.set(xlabel="ranks", ylabel="efficiency (forecast)", ylim=(0, 1.05))
    forecast.grid(alpha=0.3)
    return figure


def plot_peers(rates: Mapping[str, Sequence[float]], unit: str = "images/s") -> Figure:
    """Plot each peer's median as a bar, with its spread."""
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    chosen = {name: values for name, values in rates.items() if values}
    medians = [statistics.median(values) for values in chosen.values()]
    low = [median - min(values) for median, values in zip(medians, chosen.values(), strict=True)]
    high = [max(values) - median for median, values in zip(medians, chosen.values(), strict=True)]
    colors = ["tab:blue" if name.startswith("Lockstep") else "tab:gray" for name in chosen]
    axis.barh(list(chosen), medians, xerr=[low, high], color=colors, capsize=3)
    axis.invert_yaxis()
    axis.set(xlabel=unit)
    return figure


def plot_scaling(efficiency: Mapping[str, Mapping[int, float]]) -> Figure:
    """Plot the efficiency of weak and strong scaling by the number of ranks."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for how, of_ranks in efficiency.items():
        axis.plot(list(of_ranks), list(of_ranks.values()), "o-", label=how)
    axis.set(xlabel="ranks", ylabel="efficiency", ylim=(0, 1.1))
    axis.set_xticks(sorted({ranks for of_ranks in efficiency.values() for ranks in of_ranks}))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def plot_sharding(strategies: Mapping[str, Mapping[str, float | None]]) -> Figure:
    """Plot the bytes that a rank holds, and sends per update, by strategy; a red line marks what the formula says."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, what in zip(axes, ("held", "sent"), strict=True):
        for index, of in enumerate(strategies.values()):
            axis.bar(index, (of[f"{what}_bytes"] or 0) / 2**20, color="tab:blue", width=0.6)
            if (formula := of[f"{what}_formula"]) is not None:
                axis.hlines(formula / 2**20, index - 0.4, index + 0.4, color="tab:red")
        axis.set_xticks(range(len(strategies)), list(strategies))
        axis.set(ylabel=f"MiB {what} by a rank", title="red: by the formula")
    return figure
