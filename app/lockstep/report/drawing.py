"""Draw the pictures of a report, as SVG data URIs that can be embedded in its page."""

import io
from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure  # not pyplot, which would look for a display

from lockstep.report.records import Record, data_uri
from lockstep.training.summary import GROUPS, OTHER

FIRST = ("return", "accuracy", "top5_accuracy", "loss")  # before all other curves
NO_CURVES = {"kind", "step", "epoch", "samples", "episodes"}
MAX_RANKS = 40
COLUMNS = 3


def curve_names(records: Sequence[Record]) -> list[str]:
    """The metrics that at least one run has recorded more than once."""
    counted = [
        Counter(name for line in record.metrics for name in line if line[name] is not None) for record in records
    ]
    names = dict.fromkeys(name for counts in counted for name, count in counts.items() if count > 1)
    return [*(name for name in FIRST if name in names), *(n for n in names if n not in NO_CURVES and n not in FIRST)]


def draw_curves(records: Sequence[Record]) -> str | None:
    """Draw each metric over the number of samples, all runs in one plot: training as a line, evaluations as points."""
    names = curve_names(records)
    if not names:
        return None
    num_rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(4.4 * COLUMNS, 2.9 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, COLUMNS, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        for index, record in enumerate(records):
            for kind, style in (("train", "-"), ("held_out", "o--")):
                points = [(line["samples"], line[name]) for line in record.metrics if _has(line, kind, name)]
                if points:
                    label = record.name if len(records) > 1 else kind.replace("_", "-")
                    several = len(records) > 1
                    colour = f"C{index}" if several else ("C0" if kind == "train" else "C1")
                    axis.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=3, linewidth=1.2)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))  # one for each run
        axis.legend(handles.values(), handles.keys(), fontsize=7)
    return _as_svg(figure)


def draw_time(record: Record) -> str | None:
    """Draw how each rank spent its time, sorted by waiting: the slowest rank waits least, and comes first."""
    ranks = sorted(enumerate(record.seconds_of_ranks), key=lambda ranked: ranked[1]["waiting"])[:MAX_RANKS]
    if not ranks:
        return None
    figure = Figure(figsize=(9, 0.9 + 0.28 * len(ranks)), layout="constrained")
    axis = figure.subplots()
    left = np.zeros(len(ranks))
    for group in (*GROUPS, OTHER):
        seconds = np.array([of_rank[group] for _, of_rank in ranks])
        axis.barh(range(len(ranks)), seconds, left=left, label=group)
        left += seconds
    axis.set_yticks(range(len(ranks)), [f"rank {rank}" for rank, _ in ranks], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("seconds", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, ncols=len(GROUPS) + 1, loc="lower left", bbox_to_anchor=(0, 1))
    return _as_svg(figure)


def draw_confusion(record: Record) -> str | None:
    """Draw the confusion matrix: rows are true classes, columns predicted ones; colours are relative to the row."""
    if "confusion" not in record.evaluation:
        return None
    counts, classes = np.array(record.evaluation["confusion"]), record.evaluation["classes"]
    side = 2.2 + 0.36 * len(classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(counts / np.maximum(1, counts.sum(1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count and len(classes) <= 25:
            shade = "white" if row == column else "black"
            axis.text(column, row, str(count), ha="center", va="center", fontsize=7, color=shade)
    axis.set_xticks(range(len(classes)), classes, fontsize=8, rotation=90 if max(map(len, classes)) > 2 else 0)
    axis.set_yticks(range(len(classes)), classes, fontsize=8)
    axis.set_xlabel("predicted", fontsize=8)
    axis.set_ylabel("true", fontsize=8)
    return _as_svg(figure)


def draw_returns(record: Record) -> str | None:
    """Draw a histogram of the returns of the evaluation's episodes."""
    if not record.evaluation.get("episodes"):
        return None
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.hist([episode["total_reward"] for episode in record.evaluation["episodes"]], bins=20)
    axis.set_xlabel("return of an episode", fontsize=8)
    axis.tick_params(labelsize=8)
    return _as_svg(figure)


def _has(line: object, kind: str, name: str) -> bool:
    return isinstance(line, dict) and line["kind"] == kind and line.get(name) is not None


def _as_svg(figure: Figure) -> str:
    """The figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")
