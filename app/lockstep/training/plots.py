"""Plots of a run, drawn without a display."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure  # not pyplot, whose backend is the user's own choice in a notebook
from torch import Tensor


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


def plot_mistakes(images: Tensor, titles: Sequence[str], picture: Path, heading: str) -> None:
    """Plot a grid of (n, channels, height, width) uint8 `images` with their titles, as a PNG."""
    num_columns = 8
    num_rows = max(1, -(-len(images) // num_columns))
    figure = Figure(figsize=(1.5 * num_columns, 1.9 * num_rows + 0.5), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images.cpu().to(torch.uint8), titles, strict=False):
        axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r")
        axis.set_title(title, fontsize=9)
    figure.suptitle(heading)
    figure.savefig(picture, dpi=120)
