"""The benchmarks that run as ranks of one job: `throughput`, `comm`, `sharding` and `pipeline`."""

import contextlib
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from lockstep.benchmark.communication import (
    FORECAST_RANKS,
    SIZES,
    bus_bytes,
    fit_alpha_beta,
    measure_all_reduce,
    measure_alpha,
    measure_copy,
    measure_wires,
)
from lockstep.benchmark.report import (
    new_folder,
    plot_communication,
    plot_peers,
    plot_sharding,
    plot_throughput,
    print_table,
    save,
    spread,
)
from lockstep.benchmark.sharding import STRATEGIES, StrategyResult, measure_pipeline, measure_strategy, proof_settings
from lockstep.benchmark.throughput import Throughput, measure_throughput
from lockstep.comm.cluster import Cluster
from lockstep.comm.inventory import describe_binding, describe_briefly, take_inventory
from lockstep.parallel.pipeline_plan import bubble
from lockstep.runtime.errors import SettingsError
from lockstep.runtime.resources import peak_mib
from lockstep.settings import Settings
from lockstep.settings.reading import parse_benchmark
from lockstep.tasks.classify import Classify


@dataclass(frozen=True)
class BenchmarkOptions:
    """How long to measure, and where to write the results."""

    rounds: int = 5
    """Rounds; in each, everything that is compared is measured once."""

    updates: int = 100
    """Updates per round of each."""

    limit: bool = True
    """Compare with the same ranks without communication."""

    link_gbits: float | None = None
    """Bandwidth of a node's link in Gbit/s, to compare the all-reduce with."""

    json: bool = False
    """Print one line of JSON only, and write no files."""

    out: str = "runs/benchmark"
    """Folder for the results, visible on all nodes."""


def main(cluster: Cluster, kind: str, args: Sequence[str]) -> None:
    """Collective: run the benchmark `kind` with the command line `args`."""
    settings, options = cluster.on_root(lambda: parse_benchmark(BenchmarkOptions, args))
    if settings.task != "classify":
        message = f"task is {settings.task}: {kind} measures classify only; for ppo use lockstep benchmark ppo"
        raise SettingsError(message).as_shared()
    inventory = take_inventory(cluster)
    if cluster.is_root and not options.json:
        print(describe_briefly(cluster, inventory), *describe_binding(inventory), sep="\n", flush=True)
    folder = cluster.on_root(lambda: new_folder(options.out))
    scratch = Path(cluster.on_root(lambda: mkdtemp(prefix="scratch-", dir=folder)))
    measure = {"throughput": _throughput, "comm": _comm, "sharding": _sharding, "pipeline": _pipeline}[kind]
    with contextlib.ExitStack() as stack:
        if cluster.is_root:
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        result, present = measure(cluster, settings, options, scratch)
        cluster.barrier()  # no rank writes to the scratch folder after this
    if cluster.is_root and options.json:
        print(json.dumps(result), flush=True)
    elif cluster.is_root:
        present(folder, {**result, "environment": inventory})


Present = Callable[[Path, dict[str, Any]], None]  # prints tables of a result, and saves it with a figure


def _throughput(
    cluster: Cluster, settings: Settings, options: BenchmarkOptions, scratch: Path
) -> tuple[dict[str, Any], Present]:
    """Collective: measure a run as launched, its limit and how an update is spent."""
    found = measure_throughput(cluster, settings, scratch, options.rounds, options.updates, options.limit)
    rate = statistics.median(found.run)
    result: dict[str, Any] = {
        "images_per_second": rate,
        "num_ranks": cluster.size,
        "peak_mib": max(cluster.all_gather_object(peak_mib())),
        "rounds": {"run": found.run, "limit": found.limit, "ideal": found.ideal},
        "milliseconds": found.split,
    }

    def present(folder: Path, result: dict[str, Any]) -> None:
        rows = [("the run as launched", spread(found.run, 0), "")]
        if options.limit:
            rows += [
                ("its limit: ranks without communication", spread(found.limit, 0), spread(found.ratios(found.limit))),
                ("the limit, waiting for the slowest rank", spread(found.ideal, 0), spread(found.ratios(found.ideal))),
            ]
        title = f"{cluster.size} rank(s), {options.rounds} rounds of {options.updates} updates; {settings.precision}"
        print_table(title, ("", "images/s: median (spread)", "run / this"), rows)
        _print_split(found)
        save(folder, "throughput", result, plot_throughput(found))

    return result, present


def _print_split(found: Throughput) -> None:
    total = sum(found.split.values())
    rows = [(name, f"{value:.3f}", f"{value / total:.1%}") for name, value in found.split.items()]
    print_table("Time of an update", ("", "ms", "share"), [*rows, ("total", f"{total:.3f}", "")])


def _comm(
    cluster: Cluster, settings: Settings, options: BenchmarkOptions, scratch: Path
) -> tuple[dict[str, Any], Present]:
    """Collective: measure the all-reduce by size, and forecast runs on more ranks."""
    if cluster.size == 1:
        raise SettingsError("comm needs two ranks or more: start it by mpirun -np 2").as_shared()
    model = Classify(settings, cluster).build_model()
    num_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    alpha = measure_alpha(cluster)
    all_reduce = measure_all_reduce(cluster, SIZES)
    copy = measure_copy(cluster, SIZES)
    wires = measure_wires(cluster, num_bytes)
    fit = fit_alpha_beta(cluster.size, alpha, all_reduce)
    found = measure_throughput(cluster, settings, scratch, options.rounds, options.updates)
    batch = settings.data.global_batch_size(cluster.size)
    compute_seconds, measured = (batch / statistics.median(rates) for rates in (found.ideal, found.run))
    bound = bus_bytes(cluster.size, num_bytes) * 8 / (options.link_gbits * 1e9) if options.link_gbits else None
    result: dict[str, Any] = {
        "num_ranks": cluster.size,
        "gradient_bytes": num_bytes,
        "all_reduce_seconds": all_reduce,
        "copy_seconds": copy,
        "gradient_seconds_by_wire": wires,
        "link_bound_seconds": bound,
        "fit": {"alpha": fit.alpha, "beta": fit.beta, "constant": fit.constant},
        "update_seconds": {
            "alone": compute_seconds,
            "predicted": compute_seconds + fit.seconds(cluster.size, num_bytes),
            "measured": measured,
        },
        "forecast": {n: fit.efficiency(n, num_bytes, compute_seconds) for n in FORECAST_RANKS},
    }

    def present(folder: Path, result: dict[str, Any]) -> None:
        rows = [
            (
                f"{size:,} B",
                f"{seconds * 1e3:.3f}",
                f"{fit.seconds(cluster.size, size) * 1e3:.3f}",
                f"{bus_bytes(cluster.size, size) / seconds / 1e9:.3f}",
                f"{size / copy[size] / 1e9:.3f}",
            )
            for size, seconds in all_reduce.items()
        ]
        title = f"All-reduce over {cluster.size} rank(s), float32"
        print_table(title, ("size", "ms", "ms by the fit", "bus GB/s", "a memory copy, GB/s"), rows)
        print(
            f"fit: {fit.constant * 1e6:.0f} us + 2 log2(n) {fit.alpha * 1e6:.1f} us "
            f"+ 2(n-1)/n S / {1 / max(fit.beta, 1e-15) / 1e9:.2f} GB/s"
        )
        by_wire = [
            (
                name,
                f"{seconds * 1e3:.2f}",
                f"{wires['float32'] / seconds:.2f}",
                f"{bound * (1 if name == 'float32' else 0.5) / seconds:.3f}" if bound else "",
            )
            for name, seconds in wires.items()
        ]
        title = f"All-reduce of the gradient, {num_bytes:,} B"
        print_table(title, ("sent as", "ms", "times as fast", "the link's bound / this"), by_wire)
        updates = result["update_seconds"]
        print(
            f"An update takes {updates['alone'] * 1e3:.2f} ms without communication; with it, "
            f"{updates['predicted'] * 1e3:.2f} ms by the fit, {updates['measured'] * 1e3:.2f} ms measured"
        )
        forecast = [(f"{n:,}", f"{efficiency:.3f}") for n, efficiency in result["forecast"].items()]
        print_table("Forecast for more nodes with such links", ("ranks", "efficiency"), forecast)
        save(
            folder, "comm", result, plot_communication(cluster.size, all_reduce, copy, fit, num_bytes, compute_seconds)
        )

    return result, present


def _sharding(
    cluster: Cluster, settings: Settings, options: BenchmarkOptions, scratch: Path
) -> tuple[dict[str, Any], Present]:
    """Collective: compare each strategy with `replicated`, and its memory and traffic with the formulas."""
    found = {
        how: measure_strategy(cluster, proof_settings(settings.model, how), scratch, options.updates)
        for how in STRATEGIES
    }
    result: dict[str, Any] = {
        "num_ranks": cluster.size,
        "strategies": {how: _compare(of, found["replicated"]) for how, of in found.items()},
    }

    def present(folder: Path, result: dict[str, Any]) -> None:
        rows = [
            (
                how,
                f"{of['largest_loss_difference']:.1e}",
                f"{of['largest_weight_difference']:.1e}",
                f"{of['held_bytes'] / 2**20:.3f} / {of['held_formula'] / 2**20:.3f}",
                f"{of['sent_bytes'] / 2**20:.3f}"
                + (f" / {of['sent_formula'] / 2**20:.3f}" if of["sent_formula"] is not None else ""),
            )
            for how, of in result["strategies"].items()
        ]
        columns = ("", "losses", "weights", "held / formula", "sent / formula")
        title = f"{cluster.size} ranks, {options.updates + 1} updates: differences; MiB per rank"
        print_table(title, columns, rows)
        save(folder, "sharding", result, plot_sharding(result["strategies"]))

    return result, present


def _compare(found: StrategyResult, reference: StrategyResult) -> dict[str, float | None]:
    """Compare a strategy with the reference; differences are relative to the largest value, or to 1 if that is more."""
    losses = zip(found.losses, reference.losses, strict=True)
    weights = [
        float((found.weights[name] - tensor).abs().max() / max(1.0, float(tensor.abs().max())))
        for name, tensor in reference.weights.items()
    ]
    return {
        "largest_loss_difference": _largest([abs(mine - other) / max(1.0, abs(other)) for mine, other in losses]),
        "largest_weight_difference": _largest(weights),
        "held_bytes": found.held,
        "held_formula": found.held_formula,
        "sent_bytes": found.sent,
        "sent_formula": found.sent_formula,
    }


def _largest(differences: list[float]) -> float:
    """The largest difference; 0 if there is none, NaN if any is NaN (which Python's max ignores)."""
    return float(torch.tensor([0.0, *differences], dtype=torch.float64).max())


def _pipeline(
    cluster: Cluster, settings: Settings, options: BenchmarkOptions, scratch: Path
) -> tuple[dict[str, Any], Present]:
    """Collective: measure a pipeline, and the ideal of its schedule."""
    found = measure_pipeline(cluster, settings, scratch, options.rounds, options.updates)
    ratios = [run / ideal for run, ideal in zip(found.run, found.ideal, strict=True)]
    num_stages, num_micro_batches = len(found.stage_milliseconds), settings.gradient.num_micro_batches
    result: dict[str, Any] = {
        "num_stages": num_stages,
        "num_micro_batches": num_micro_batches,
        "schedule": settings.pipeline.schedule,
        "bubble": bubble(num_stages, num_micro_batches),
        "updates_per_second": {"run": found.run, "ideal": found.ideal},
        "stage_milliseconds": found.stage_milliseconds,
    }

    def present(folder: Path, result: dict[str, Any]) -> None:
        stages = ", ".join(f"{one:.2f}" for one in found.stage_milliseconds)
        what = f"{num_stages} stages x {num_micro_batches} micro-batches, {settings.pipeline.schedule}"
        title = f"{what}; ms per stage: {stages}"
        rows = [("the pipeline", spread(found.run), ""), ("its ideal", spread(found.ideal), spread(ratios))]
        print_table(title, ("", "updates/s: median (spread)", "pipeline / this"), rows)
        print(f"The bubble is {result['bubble']:.3f} of the ideal time")
        rates = {"pipeline": found.run, "ideal": found.ideal}
        save(folder, "pipeline", result, plot_peers(rates, "updates/s"))

    return result, present
