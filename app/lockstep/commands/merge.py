"""Merges a checkpoint of any number of ranks and any strategy into one model file. Needs no MPI.

env/run lockstep merge runs/latest                            the last checkpoint -> runs/latest/model.safetensors
env/run lockstep merge runs/latest --step 200                 update 200 -> runs/latest/model-200.safetensors

It merges one tensor at a time, and needs memory for the largest one only. `lockstep evaluate` then scores the model.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lockstep.parallel.merge import merge_shards
from lockstep.parallel.weight_average import AVERAGE
from lockstep.runtime.command_line import command_parser
from lockstep.runtime.errors import SettingsError, StorageError, run_alone
from lockstep.training.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints, verify_checkpoint
from lockstep.training.model_file import TensorFileWriter
from lockstep.training.run_folder import MODEL, SUMMARY, replacing

PREFIX = "model/"
AVERAGE_PREFIX = f"optimizer/{AVERAGE}/"


def run() -> None:
    """
    Raises:
        SettingsError: there is no such checkpoint.
        StorageError: the checkpoint is damaged, or the file cannot be written.
    """
    arguments = _parse_args()
    step = _best_update(arguments.run) if arguments.step is None else arguments.step
    checkpoint = _find(arguments.run, step)
    out = arguments.out or arguments.run / (MODEL if arguments.step is None else f"model-{checkpoint.step}.safetensors")
    digest = merge_checkpoint(checkpoint, out)
    print(f"Merged the model after update {checkpoint.step}: {out}, {out.stat().st_size:,} bytes, digest {digest}")


def merge_checkpoint(checkpoint: Checkpoint, out: Path) -> str:
    """Write the model in `checkpoint` to `out`, and return its digest.

    Raises:
        StorageError: a shard is missing, or the file cannot be written.
    """
    names = [name for name in checkpoint.shapes if name.startswith(PREFIX)]
    tied = _tied_weights(checkpoint)  # the weight average has them under their first name only
    meta_state = {name.removeprefix(PREFIX): _meta_tensor(checkpoint, name) for name in names}
    with replacing(out) as temporary, TensorFileWriter(temporary, meta_state) as writer:
        for name, tensor in meta_state.items():
            average = f"{AVERAGE_PREFIX}{tied.get(name, name)}"  # if the run averages weights, the average is its model
            parts = checkpoint.parts(average if average in checkpoint.shapes else f"{PREFIX}{name}")
            try:
                merged = merge_shards({name: parts}, meta_state={name: tensor})
            except ValueError as error:
                raise StorageError(f"{checkpoint.path}: {error}") from error
            writer.write(name, merged[name])
    return writer.digest


def _tied_weights(checkpoint: Checkpoint) -> dict[str, str]:
    """Map each further name of a tied parameter to its first name.

    Older checkpoints do not record these; there, tied parameters are those with equal contents.
    """
    if "tied_weights" in checkpoint.counters:
        return dict(checkpoint.counters["tied_weights"])
    names = [name.removeprefix(PREFIX) for name in checkpoint.shapes if name.startswith(PREFIX)]
    averaged = [name for name in names if f"{AVERAGE_PREFIX}{name}" in checkpoint.shapes]
    return {
        name: first
        for name in (names if averaged else ())
        if name not in averaged
        for first in averaged
        if checkpoint.shapes[f"{PREFIX}{first}"] == checkpoint.shapes[f"{PREFIX}{name}"]
        and torch.equal(checkpoint.read(f"{PREFIX}{first}"), checkpoint.read(f"{PREFIX}{name}"))
    }


def _meta_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    return torch.empty(checkpoint.shapes[name], dtype=checkpoint.read(name, 0, 0).dtype, device="meta")


def _best_update(run: Path) -> int | None:
    """Read which checkpoint a finished run has merged as its best; None if it has not chosen one."""
    summary = run / SUMMARY
    best = json.loads(summary.read_text()).get("best") if summary.exists() else None
    return int(best["update"]) if best else None


def _find(run: Path, step: int | None) -> Checkpoint:
    if step is None:
        found = latest_checkpoint(run, tell=print)
    else:
        found = next((verify_checkpoint(path) for path in list_checkpoints(run) if int(path.name) == step), None)
    if found is None:
        steps = ", ".join(str(int(path.name)) for path in list_checkpoints(run)) or "none"
        raise SettingsError(f"{run} has no checkpoint{'' if step is None else f' of update {step}'}: it has {steps}")
    return found


def _parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("merge", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/latest")
    parser.add_argument(
        "--step",
        type=int,
        help="the checkpoint after this update (default: the best, if the run has chosen one, else the last one)",
    )
    parser.add_argument(
        "--out", type=Path, help=f"the file to write (default: {MODEL}, or model-STEP.safetensors, in the run's folder)"
    )
    return parser.parse_args(args)


def main() -> None:
    run_alone(run)
