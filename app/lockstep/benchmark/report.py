"""Write the results of a benchmark: tables, JSON and figures."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lockstep.runtime.command_line import plain_console
from lockstep.runtime.errors import StorageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lockstep.benchmark.communication import Fit  # these would start MPI
    from lockstep.benchmark.throughput import Throughput


def new_folder(out: str) -> Path:
    """The folder `out`, which is created if it is missing.

    Raises:
        StorageError: it cannot be created.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the folder {folder} for the results cannot be created: {error}; choose another by --out"
        ) from None
    return folder


def save(folder: Path, name: str, result: Mapping[str, Any], figure: "Figure") -> None:
    """Write `name`.json and `name`.png.

    Raises:
        StorageError: the folder cannot be written.
    """
    try:
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        figure.savefig(folder / f"{name}.png", dpi=120)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}") from None
    print(f"{folder / name}.json, {folder / name}.png")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. The first column is left-aligned, the others, which are numbers, right-aligned."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    plain_console().print(table)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`median (lowest ... highest)`."""
    lowest, median, highest = min(values), statistics.median(values), max(values)
    return f"{median:.{digits}f} ({lowest:.{digits}f} ... {highest:.{digits}f})"


# -- figures -----------------------------------------------------------------------------------------------------------


def _subplots(num_columns: int, size: tuple[float, float]) -> tuple["Figure", Any]:
    """A figure of `size` in inches, and its axes in a row."""
    from matplotlib.figure import Figure  # takes memory, and only rank 0 draws, after measuring

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, num_columns)


def plot_throughput(found: "Throughput") -> "Figure":
    """Plot images/s by round, and how the time of an update is spent."""
    figure, (rates, split) = _subplots(2, (11, 4))
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
) -> "Figure":
    """Plot the all-reduce by size with its fit and a memory copy, and the forecast of the efficiency."""
    figure, (times, forecast) = _subplots(2, (11, 4))
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


def plot_peers(rates: Mapping[str, Sequence[float]], unit: str = "images/s") -> "Figure":
    """Plot each peer's median as a bar, with its spread."""
    figure, axis = _subplots(1, (9, 4.5))
    chosen = {name: values for name, values in rates.items() if values}
    medians = [statistics.median(values) for values in chosen.values()]
    low = [median - min(values) for median, values in zip(medians, chosen.values(), strict=True)]
    high = [max(values) - median for median, values in zip(medians, chosen.values(), strict=True)]
    colors = ["tab:blue" if name.startswith("Lockstep") else "tab:gray" for name in chosen]
    axis.barh(list(chosen), medians, xerr=[low, high], color=colors, capsize=3)
    axis.invert_yaxis()
    axis.set(xlabel=unit)
    return figure


def plot_scaling(efficiency: Mapping[str, Mapping[int, float]]) -> "Figure":
    """Plot the efficiency of weak and strong scaling by the number of ranks."""
    figure, axis = _subplots(1, (6, 4))
    for how, of_ranks in efficiency.items():
        axis.plot(list(of_ranks), list(of_ranks.values()), "o-", label=how)
    axis.set(xlabel="ranks", ylabel="efficiency", ylim=(0, 1.1))
    axis.set_xticks(sorted({ranks for of_ranks in efficiency.values() for ranks in of_ranks}))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def plot_sharding(strategies: Mapping[str, Mapping[str, float | None]]) -> "Figure":
    """Plot the bytes that a rank holds, and sends per update, by strategy; a red line marks what the formula says."""
    figure, axes = _subplots(2, (11, 4))
    for axis, what in zip(axes, ("held", "sent"), strict=True):
        for index, of in enumerate(strategies.values()):
            axis.bar(index, (of[f"{what}_bytes"] or 0) / 2**20, color="tab:blue", width=0.6)
            if (formula := of[f"{what}_formula"]) is not None:
                axis.hlines(formula / 2**20, index - 0.4, index + 0.4, color="tab:red")
        axis.set_xticks(range(len(strategies)), list(strategies))
        axis.set(ylabel=f"MiB {what} by a rank", title="red: by the formula")
    return figure
