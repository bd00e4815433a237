"""Plots of a run, drawn without a display."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot, whose backend is the user's own choice in a notebook

from lockstep.tasks.pictures import Pictures


def plot_curves(metrics: Path, picture: Path, names: Sequence[str], samples: str) -> None:
    """Plot the metrics `names` of metrics.jsonl over the number of `samples` (their name), as a PNG."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for kind, style in (("train", "-"), ("held_out", "o-")):
            chosen = [record for record in records if record["kind"] == kind and record.get(name) is not None]
            places, values = [record["samples"] for record in chosen], [record[name] for record in chosen]
            if chosen:
                axis.plot(places, values, style, label=kind.replace("_", "-"), markersize=4)
                axis.legend()
        axis.set(xlabel=samples, ylabel=name)
        axis.grid(alpha=0.3)
        if name == "loss":
            axis.set_yscale("log")
    figure.savefig(picture, dpi=120)


def plot_pictures(pictures: Pictures, picture: Path) -> None:
    """Plot a grid of images with their titles, as a PNG. Numbers have one scale for all images."""
    num_rows = max(1, -(-len(pictures.images) // pictures.num_columns))
    figure = Figure(figsize=(1.5 * pictures.num_columns, 1.9 * num_rows + 0.5), layout="constrained")
    axes = figure.subplots(num_rows, pictures.num_columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, pictures.images, pictures.titles, strict=False):
        if image.dtype == np.uint8:
            axis.imshow(image, cmap="gray_r")
        else:
            largest = max(float(np.abs(other).max()) for other in pictures.images)
            axis.imshow(image, cmap="RdBu_r", vmin=-largest, vmax=largest)
        axis.set_title(title, fontsize=9)
    figure.suptitle(pictures.heading)
    figure.savefig(picture, dpi=120)
