"""Evaluates the merged model of a finished run: on the held-out samples, or in seeded episodes.

env/run lockstep evaluate runs/latest                     accuracy, confusion matrix, worst mistakes; or the return
env/run mpirun -np 4 lockstep evaluate runs/latest        the same, shared by four ranks
env/run lockstep evaluate runs/latest --episodes 20       the return of an agent over 20 episodes
env/run lockstep evaluate runs/latest --record play.gif   one episode as an animation
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from lockstep.comm.cluster import Cluster
from lockstep.comm.program import run_program
from lockstep.runtime.command_line import command_parser, plain_console
from lockstep.runtime.errors import SettingsError
from lockstep.runtime.user_code import call
from lockstep.settings import Settings
from lockstep.settings.trust import add_trust
from lockstep.tasks.supervised import SupervisedTask
from lockstep.tasks.task import Task, evaluating
from lockstep.training.build import load_task
from lockstep.training.run_folder import RunFolder, storage_errors

MAX_CLASSES_SHOWN = 25


def run(cluster: Cluster) -> None:
    arguments = cluster.on_root(_parse_args)
    folder = RunFolder(arguments.run)
    settings = cluster.on_root(lambda: _settings_for(arguments))
    task, model = load_task(settings, folder, cluster)
    evaluation = task.evaluate(model, partial(task.outputs, model), cluster.rank, cluster.size)
    if cluster.is_root:
        if "confusion" in evaluation.details:
            _print_confusion(evaluation.details["confusion"], evaluation.details["classes"])
        print(evaluation)
        if isinstance(task, SupervisedTask):
            _draw(task, model, folder)
        elif arguments.record:
            _record(task, model, arguments.record)


def _settings_for(arguments: argparse.Namespace) -> Settings:
    """The settings of the run, changed by `arguments`.

    Raises:
        StorageError: the run is not finished.
        SettingsError: `arguments` are for another kind of task.
    """
    settings = RunFolder.open(arguments.run).load_settings(arguments.trust == "true")
    if settings.task != "ppo" and (arguments.record or arguments.episodes):
        raise SettingsError(f"{arguments.run} has learned {settings.task}: --episodes and --record are for agents")
    if arguments.episodes:
        settings = replace(settings, env=replace(settings.env, num_evaluation_episodes=arguments.episodes))
    return settings


def _print_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    if len(classes) > MAX_CLASSES_SHOWN:
        return
    table = Table(title="Confusion matrix (rows: true class, columns: predicted)")
    for heading in ("", *classes):
        table.add_column(heading, justify="right")
    for name, row in zip(classes, confusion, strict=True):
        table.add_row(name, *(str(count) if count else "." for count in row))
    plain_console().print(table)


def _draw(task: SupervisedTask, model: nn.Module, folder: RunFolder) -> None:
    """Draw what the task shows of its held-out samples."""
    from lockstep.training.plots import plot_pictures  # imports matplotlib, which only rank 0 needs

    with evaluating(model), torch.no_grad():
        pictures = call(f"{type(task).__module__}.{type(task).__qualname__}.pictures", partial(task.pictures, model))
    if pictures:
        path = folder.path / f"{pictures.name}.png"
        with storage_errors():
            plot_pictures(pictures, path)
        print(f"{pictures.heading}: {path}")


def _record(task: Task, model: nn.Module, picture: Path) -> None:
    from lockstep.tasks.ppo import Ppo  # imports Gymnasium
    from lockstep.tasks.recording import record

    assert isinstance(task, Ppo)
    with storage_errors():
        episode = record(partial(task.act, partial(task.outputs, model)), task.settings.env, picture)
    print(f"Recorded: {picture}, {episode.length} steps with a return of {episode.total_reward:.2f}")


def _parse_args() -> argparse.Namespace:
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run, such as runs/latest")
    parser.add_argument(
        "--episodes", type=_at_least_one, help="number of episodes (default: the run's env.num_evaluation_episodes)"
    )
    parser.add_argument("--record", type=Path, metavar="FILE.gif", help="record an episode as an animation")
    add_trust(parser)
    return parser.parse_args()


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def main() -> None:
    run_program(run)
