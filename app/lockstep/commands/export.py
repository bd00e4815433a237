"""Exports the merged model of a finished run for programs without Lockstep.

env/run lockstep export runs/latest                 model.pt2, for torch.export.load; model.onnx, for ONNX Runtime
env/run lockstep export runs/latest --formats onnx  one of them

The inputs are those of the network: normalised images or observations, in batches of any size. Several inputs are one
tuple or dictionary, as the task's method inputs gives it; in ONNX each tensor has a name: inputs or outputs, inputs.0,
inputs.1 and so on, or the keys of a dictionary. ONNX is in float32. Each file also holds the run's settings.yaml. It is
loaded again, and its outputs must equal the model's. `model.safetensors`, which every run leaves, has the weights only.
"""

import argparse
import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.comm.program import run_program
from lockstep.data.batch import Tree, map_tensors, named_tensors, tensors_of
from lockstep.data.tree_set import as_dtype
from lockstep.models.block_sequence import BlockSequence, apply
from lockstep.runtime.command_line import command_parser
from lockstep.runtime.errors import LockstepError, SettingsError
from lockstep.settings.reading import SETTINGS_FILE
from lockstep.settings.trust import add_trust
from lockstep.training.build import load_task
from lockstep.training.run_folder import RunFolder, replacing

Outputs = Callable[[Tree], Tree]
NUM_EXAMPLES = 3  # batch size of the example inputs for tracing
NUM_CHECKED = 64  # batch size of the comparison: another size, and other inputs
TOLERANCE = 1e-5  # relative to the largest output; other runtimes sum float32 in another order


def run(cluster: Cluster) -> None:
    """
    Raises:
        LockstepError: an exported file gives other outputs than the model.
        SettingsError: this was started as several ranks.
        StorageError: the run is not finished, or a file cannot be written.
    """
    arguments = _parse_args()
    if cluster.size > 1:
        raise SettingsError("export runs on one rank: start it without a launcher").as_shared()
    folder = RunFolder.open(arguments.run)
    settings = folder.load_settings(arguments.trust == "true")
    task, model = load_task(settings, folder, cluster)
    model.cpu().eval()
    examples = as_dtype(map_tensors(Tensor.cpu, task.example_inputs(NUM_EXAMPLES)), task.dtype)
    for name in arguments.formats:
        difference = export(model, examples, folder, name)
        path = folder.path / f"model.{name}"
        print(
            f"Exported {path}, {path.stat().st_size:,} bytes: outputs within {difference:.1e} of the model's",
            flush=True,
        )


def export(model: nn.Module, examples: Tree, folder: RunFolder, name: str) -> float:
    """Write `model` as model.`name`, load it again, and return the largest difference of the outputs.

    The difference is relative to the largest number in each tensor of outputs.

    Raises:
        LockstepError: the difference is above `TOLERANCE`, or the exporter does not support this network.
        StorageError: the file cannot be written.
    """
    torch.manual_seed(0)
    inputs = map_tensors(_others_like, examples)
    with torch.no_grad(), warnings.catch_warnings(), replacing(folder.path / f"model.{name}") as temporary:
        warnings.simplefilter("ignore")  # the exporters warn about their own code
        expected = apply(model, inputs)
        settings = (folder.path / SETTINGS_FILE).read_text()
        try:
            found = FORMATS[name](model, examples, temporary, settings)(inputs)
        except Exception as error:  # exporters raise many types of errors
            why = " ".join(str(error).split())[:300]
            raise LockstepError(f"this network cannot be written as model.{name}: {why}") from error
        pairs = zip(tensors_of(found), tensors_of(expected), strict=True)
        differences = [_difference(of_file.double(), of_model.double()) for of_file, of_model in pairs]
        for difference in differences:
            if not difference <= TOLERANCE:
                raise LockstepError(
                    f"model.{name} would give other outputs than the model: they differ by {difference:.1e}"
                )
    return max(differences)


class _OfOneArgument(nn.Module):
    """A network that takes all of its inputs as one tuple or dictionary: torch.export traces no `**named` arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tree) -> Tree:
        return apply(self.model, inputs)


def _others_like(examples: Tensor) -> Tensor:
    """Draw other inputs: any floating-point numbers, but of integers, such as words, only what there is."""
    if examples.is_floating_point():
        return examples.mean() + torch.randn(NUM_CHECKED, *examples.shape[1:], dtype=examples.dtype)
    return examples[torch.randint(len(examples), (NUM_CHECKED,))]


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny))


def _traced(model: nn.Module, examples: Tree) -> torch.export.ExportedProgram:
    """Trace the network of one argument, for batches of any size."""
    batch = torch.export.Dim("batch")
    one: nn.Module = _OfOneArgument(model).eval()
    if isinstance(examples, Tensor):
        one = nn.Sequential(OrderedDict(model.named_children())).eval() if isinstance(model, BlockSequence) else model
    return torch.export.export(one, (examples,), dynamic_shapes=(map_tensors(lambda _: {0: batch}, examples),))


def _write_pt2(model: nn.Module, examples: Tree, file: Path, settings: str) -> Outputs:
    with file.open("wb") as opened:
        torch.export.save(_traced(model, examples), opened, extra_files={SETTINGS_FILE: settings})
    with file.open("rb") as opened:
        outputs: Outputs = torch.export.load(opened).module()
    return outputs


def _write_onnx(model: nn.Module, examples: Tree, file: Path, settings: str) -> Outputs:
    import onnxruntime

    # ONNX Runtime supports most operators in float32 only.
    model, examples = copy.deepcopy(model).float(), as_dtype(examples, torch.float32)
    names = [name for name, _ in named_tensors(apply(model, examples), "outputs")]
    program: Any = torch.onnx.export(
        _traced(model, examples),
        dynamo=True,
        input_names=[name for name, _ in named_tensors(examples, "inputs")],
        output_names=names,
        verbose=False,
    )
    program.model.metadata_props[SETTINGS_FILE] = settings
    program.save(str(file), external_data=False)
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])

    def outputs(inputs: Tree) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in named_tensors(as_dtype(inputs, torch.float32), "inputs")}
        return [torch.from_numpy(array) for array in session.run(names, given)]

    return outputs


FORMATS = {"pt2": _write_pt2, "onnx": _write_onnx}


def _parse_args() -> argparse.Namespace:
    parser = command_parser("export", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run, such as runs/latest")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="(default: %(default)s)")
    add_trust(parser)
    return parser.parse_args()


def main() -> None:
    run_program(run)
