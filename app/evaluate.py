"""Loads the merged model of a run alone and scores it on the held-out samples.

python app/evaluate.py runs/latest                    accuracy, confusion matrix, worst mistakes
mpirun -np 4 python app/evaluate.py runs/latest       the same, shared by four ranks
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from app.cluster.comm import Cluster
from app.cluster.failure import StorageError
from app.cluster.program import run_program
from app.tasks.classify import Classify
from app.training.run_folder import RunFolder, storage_errors

NUM_MISTAKES = 24


def main(cluster: Cluster) -> None:
    folder = cluster.on_root(lambda: RunFolder.open(_parse_args().run))
    settings = cluster.on_root(folder.load_settings)
    settings = replace(settings, model=replace(settings.model, compile=False))  # not worth a minute for one pass
    task = Classify(settings, cluster)
    model = task.build_model()
    cluster.on_every_rank(lambda: _load(model, folder))
    evaluation = task.evaluate(model, partial(task.outputs, model), cluster.rank, cluster.size)
    if cluster.is_root:
        _print_confusion(evaluation.confusion)
        print(evaluation)
        picture = folder.path / "mistakes.png"
        _draw_worst_mistakes(task, model, picture)
        print(f"Worst mistakes: {picture}")


def _load(model: nn.Module, folder: RunFolder) -> None:
    try:
        model.load_state_dict(folder.load_model())
    except RuntimeError as error:
        raise StorageError(f"{folder.path}: the merged model does not fit its own settings.yaml: {error}") from error


def _print_confusion(confusion: Tensor) -> None:
    classes = [str(index) for index in range(len(confusion))]
    table = Table(title="Confusion matrix (rows: true class, columns: predicted)")
    for heading in ("", *classes):
        table.add_column(heading, justify="right")
    for name, row in zip(classes, confusion.tolist(), strict=True):
        table.add_row(name, *(str(count) if count else "." for count in row))
    Console(color_system=None).print(table)  # a launcher's pipe may pass for a terminal, even into a file


def _draw_worst_mistakes(task: Classify, model: nn.Module, picture: Path) -> None:
    """The wrong answers in which the true class was held least likely."""
    from app.training.plots import plot_mistakes  # matplotlib is for rank 0 alone

    held_out = task.held_out
    output, labels = task.predict(model, torch.arange(len(held_out), device=held_out.labels.device))
    predicted = output.argmax(1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[output[wrong, labels[wrong]].argsort()][:NUM_MISTAKES]
    titles = [f"{labels[index]} taken for {predicted[index]}" for index in worst.tolist()]
    with storage_errors():
        plot_mistakes(
            held_out.images[worst], titles, picture, f"{len(wrong)} mistakes of {len(labels)}, the worst first"
        )


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="app/evaluate.py", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run, such as runs/latest")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
