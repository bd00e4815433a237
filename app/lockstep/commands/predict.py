"""Writes what the merged model of a finished run predicts for inputs without labels: each sample once, in order.

env/run lockstep predict runs/latest                                      the held-out data of the run
env/run lockstep predict runs/latest --data my_package.my_inputs          inputs of your own
env/run lockstep predict runs/latest --folder photos                      of a classifier: image files
env/run mpirun -np 3 lockstep predict runs/latest --output outputs.safetensors   shared by three ranks, into one file

The function my_inputs is called with the run's data.root, or with --root, and gives a map-style data set or a tree of
tensors, as the data_set of a task does. The file has one row for each sample: class and probabilities of a classifier,
or outputs. No rank holds more than one batch of each rank, so the file can be larger than memory.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.comm.cluster import Cluster
from lockstep.comm.program import run_program
from lockstep.data.data_sets import image_files
from lockstep.data.item_set import ImageFiles
from lockstep.data.sharding import Ids
from lockstep.data.tree_set import DataSet
from lockstep.runtime.command_line import command_parser
from lockstep.runtime.errors import DataError, SettingsError, UserCodeError
from lockstep.runtime.importing import import_object
from lockstep.runtime.user_code import call
from lockstep.settings.trust import add_trust
from lockstep.tasks.classify import Classify
from lockstep.tasks.supervised import SupervisedTask
from lockstep.training.build import load_task
from lockstep.training.model_file import TYPES, TensorFileWriter
from lockstep.training.run_folder import RunFolder, replacing

Part = tuple[int, dict[str, Tensor]]
"""The number of the first sample, and the predictions (n, ...) for it and those that follow, by flat names."""


def run(cluster: Cluster) -> None:
    """
    Raises:
        LockstepError: on every rank; an error that only rank 0 has ends the job.
    """
    arguments = cluster.on_root(_parse_args)
    folder = RunFolder(arguments.run)
    settings = cluster.on_root(lambda: RunFolder.open(folder.path).load_settings(arguments.trust == "true"))
    if settings.task == "ppo":
        message = f"{folder.path} has learned ppo: predict is for samples; lockstep evaluate --record shows an agent"
        raise SettingsError(message).as_shared()
    files = cluster.on_root(lambda: image_files(arguments.folder)) if arguments.folder else None
    task, model = load_task(settings, folder, cluster)
    if not isinstance(task, SupervisedTask):
        raise SettingsError(f"{folder.path} has learned {settings.task}, which has no samples to predict").as_shared()
    data_set = cluster.on_every_rank(partial(_data_set, arguments, files, task))
    num_samples = len(task.held_out if data_set is None else data_set)
    if len(found := set(cluster.all_gather_object(num_samples))) > 1:
        raise DataError(f"the ranks found {sorted(found)} samples: each needs the same ones").as_shared()

    parts = gathered(task.predict(model, data_set, cluster.rank, cluster.size), cluster)
    about: dict[str, Any] = {"num_samples": num_samples}
    if isinstance(task, Classify):
        about["classes"] = list(task.held_out.classes)
    if files:
        about["files"] = list(files.names)
    path = arguments.output or folder.path / "predictions.safetensors"
    write(parts, path, num_samples, about)
    if cluster.is_root:
        print(f"Predicted {num_samples} {task.samples}: {path}, {path.stat().st_size:,} bytes")


def gathered(mine: Iterator[tuple[Ids, dict[str, Tensor]]], cluster: Cluster) -> Iterator[Part]:
    """Collective: yield the predictions of all ranks, batch by batch, on rank 0 alone.

    Args:
        mine: this rank's predictions, in equally many batches on every rank.

    Raises:
        LockstepError: on every rank: `mine` has raised it on some, or batches do not fit each other.
    """
    first: dict[str, tuple[torch.dtype, tuple[int, ...]]] | None = None
    while (batch := cluster.on_every_rank(partial(next, mine, None))) is not None:
        cluster.recorder.beat()
        ids, tensors = batch
        layout = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors.items()}
        found = cluster.all_gather_object((ids[:1].tolist(), len(ids), layout))
        first = first or found[0][2]
        for _, _, other in found:
            if other != first:
                raise UserCodeError(
                    f"the predictions of one batch are {_described(first)}, those of another {_described(other)}: all "
                    "rows of a file need the same shape and type; let the task's method predictions make them so"
                ).as_shared()
        of_ranks = {name: cluster.gather_parts(tensor.reshape(-1)) for name, tensor in tensors.items()}
        if cluster.is_root:
            for rank, (start, num_rows, _) in enumerate(found):
                rows = {name: parts[rank].view(num_rows, *first[name][1]) for name, parts in of_ranks.items()}
                yield (start[0] if start else 0), rows


def write(parts: Iterator[Part], path: Path, num_samples: int, about: Mapping[str, Any]) -> None:
    """Collective: write what rank 0 gets of `parts` to `path`, with `about` in its metadata, each value in JSON.

    Raises:
        StorageError: on rank 0: the file cannot be written.
        UserCodeError: on rank 0: safetensors has no such type of numbers.
    """
    if (first := next(parts, None)) is None:
        return
    meta_state = {
        name: torch.empty(num_samples, *rows.shape[1:], dtype=rows.dtype, device="meta")
        for name, rows in first[1].items()
    }
    for name, tensor in meta_state.items():
        if tensor.dtype not in TYPES:
            raise UserCodeError(f"{name} is {tensor.dtype}, which the file cannot hold: let predictions convert it")
    in_json = {name: json.dumps(value) for name, value in about.items()}
    with replacing(path) as temporary, TensorFileWriter(temporary, meta_state, in_json) as writer:
        for start, tensors in chain([first], parts):
            for name, rows in tensors.items():
                writer.write_rows(name, start, rows)


def _described(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(
        f"{name} (n, {', '.join(map(str, shape))}) {str(dtype).removeprefix('torch.')}"
        for name, (dtype, shape) in layout.items()
    )


def _data_set(arguments: argparse.Namespace, files: ImageFiles | None, task: SupervisedTask) -> DataSet | None:
    """Load the unlabelled data; None for the held-out data.

    Raises:
        DataError, SettingsError, UserCodeError: it cannot be loaded, or is not for this task.
    """
    if files:
        if not isinstance(task, Classify):
            raise SettingsError(f"{arguments.run} has learned {task.settings.task}: --folder is for classify")
        found, name = files, f"--folder {arguments.folder}"
    elif arguments.data:
        name = arguments.data
        function = import_object(name, "--data")
        root = arguments.root or task.settings.data.root
        found = call(name, lambda: function(root))
    else:
        return None
    return task.unlabelled(found, name).to(task.cluster.device)


def _parse_args() -> argparse.Namespace:
    parser = command_parser("predict", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run, such as runs/latest")
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument("--data", metavar="NAME", help="a function that gives the inputs (default: the held-out data)")
    inputs.add_argument(
        "--folder", type=Path, metavar="DIR", help="of a classifier: a folder of image files, at any depth"
    )
    parser.add_argument("--root", help="what the function of --data is called with (default: the run's data.root)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="(default: predictions.safetensors in the run's folder)"
    )
    add_trust(parser)
    arguments = parser.parse_args()
    if arguments.root and not arguments.data:
        parser.error("--root is for the function of --data")
    return arguments


def main() -> None:
    run_program(run)
