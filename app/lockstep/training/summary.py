"""How a run ended: summary.json for programs, a short table for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.parallel.step import PHASES
from lockstep.runtime.command_line import suggest
from lockstep.runtime.flight_recorder import stragglers
from lockstep.tasks.task import Evaluation
from lockstep.training.model_file import TensorFileWriter
from lockstep.training.progress import Progress
from lockstep.training.run_folder import EVALUATION, MODEL, SUMMARY, RunFolder, json_number

GROUPS = {  # of the phases that ranks record
    "computing": PHASES,
    "waiting": ("waiting",),
    "input": ("data loading", "steps of the environments"),
    "checkpoint": ("checkpoint", "merging"),
    "evaluation": ("evaluation",),
}
OTHER = "other"
TOLD_IF_LOST = 0.05  # of the ranks' time


def by_group(seconds: Mapping[str, float]) -> dict[str, float]:
    """Add up seconds by group of phases."""
    grouped = {group: sum(seconds.get(phase, 0.0) for phase in phases) for group, phases in GROUPS.items()}
    return {**grouped, OTHER: sum(seconds.values()) - sum(grouped.values())}


def write_summary(
    folder: RunFolder,
    merged: TensorFileWriter,
    num_parameters: int,
    evaluation: Evaluation,
    progress: Progress,
    seconds_of_ranks: Sequence[Mapping[str, float]],
    peak_mib_of_ranks: Sequence[float],
    judgement: Mapping[str, Any],
) -> dict[str, Any]:
    """Write summary.json and evaluation.json; returns the content of the first.

    Args:
        seconds_of_ranks: of each rank, by phase.
        judgement: of an early stop and of the best checkpoint.

    Raises:
        StorageError: it cannot be written.
    """
    slowest, lost = stragglers(seconds_of_ranks)
    summary = {
        **{name: json_number(value) for name, value in evaluation.scores.items()},
        **evaluation.counts,
        "num_parameters": num_parameters,
        "model_digest": merged.digest,
        "num_ranks": len(seconds_of_ranks),
        "peak_mib_of_ranks": list(peak_mib_of_ranks),
        "seconds_of_ranks": [{phase: round(s, 3) for phase, s in rank.items()} for rank in seconds_of_ranks],
        "slowest_rank": slowest,
        "share_lost_waiting_for_it": round(lost, 4),
        "num_updates": progress.step,
        "num_skipped": progress.num_skipped,
        "training_seconds": round(progress.seconds, 3),
        "num_samples": progress.num_samples,
        "samples_per_second": round(progress.samples_per_second, 1),
        **judgement,
    }
    folder.write_json(EVALUATION, {**evaluation.counts, **evaluation.details})
    folder.write_json(SUMMARY, summary)  # last: a run folder with one is finished
    return summary


def summary_lines(folder: RunFolder, summary: Mapping[str, Any], samples: str) -> list[str]:
    """Format summary.json for people, as plain text for narrow terminals and log files.

    Args:
        samples: what samples are called.
    """
    rows = {
        "Trained": f"{summary['num_updates']} updates in {summary['training_seconds']:.1f} s, "
        f"{summary['samples_per_second']:.0f} {samples}/s",
        "Ranks": f"{summary['num_ranks']}, at most {max(summary['peak_mib_of_ranks']):.0f} MiB each",
    }
    groups = [by_group(seconds) for seconds in summary["seconds_of_ranks"]]
    if total := sum(sum(rank.values()) for rank in groups):
        shares = {group: sum(rank[group] for rank in groups) / total for group in groups[0]}
        rows["Time"] = ", ".join(f"{group} {share:.0%}" for group, share in shares.items() if share >= 0.005)
    if (lost := summary["share_lost_waiting_for_it"]) >= TOLD_IF_LOST:
        rows["Slowest"] = f"rank {summary['slowest_rank']}: {lost:.0%} of all ranks' time went into waiting for it"
    if why := summary.get("stopped_early"):
        rows["Stopped"] = f"early: {why}"
    if best := summary.get("best"):
        scores = ", ".join(f"{name} {value}" for name, value in best.items() if name != "update")
        rows["Best"] = f"after update {best['update']}, {scores}"
    rows["Model"] = f"{folder.path / MODEL}, {summary['num_parameters']:,} parameters"
    rows["Report"] = suggest("report", folder.path)
    return [f"{name:<9}{value}" for name, value in rows.items()]
